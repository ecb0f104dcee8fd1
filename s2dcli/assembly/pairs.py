"""Preflight of a teacher and a student: what must be the same of both before a token of one says something to the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from s2dcli import console
from s2dcli.assembly.forms import is_teacher
from s2dcli.errors import ModelError
from s2dcli.files.manifest import MANIFEST, read_manifest
from s2dcli.files.teacher_cache import TeacherCache
from s2dcli.models.checkpoints import Checkpoint, eos_ids, model_config, require_same_ends, require_same_eos
from s2dcli.models.prompts import load_tokenizer, require_same_tokens, vocabulary_size
from s2dcli.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 24  # characters of a chat template on either side of the first difference


def require_same_pair(teacher: Checkpoint, student: Checkpoint, tokenizer: PreTrainedTokenizerBase, loading: ModelOptions) -> None:
    """Check a teacher against a student, whose `tokenizer` it is; raise ModelError for the first thing that differs.

    Ids must stand for the same tokens, special and added ones too, both heads must have a column for each of them, and
    completions must end by the same EOS: else the student would never learn to stop, or the teacher never mean it to.
    Chat templates may differ, which is told: prompts are the student's, and the teacher may not know them.
    """
    theirs = load_tokenizer(teacher.folder, loading.trust_remote_code)
    require_same_tokens(theirs.get_vocab(), tokenizer.get_vocab(), where=teacher.name)
    for role, checkpoint in (("teacher", teacher), ("student", student)):
        _require_wide_head(role, checkpoint, vocabulary_size(tokenizer), loading)
    require_same_eos(teacher, student, tokenizer, loading.trust_remote_code)
    if loading.chat_template is None and theirs.chat_template != tokenizer.chat_template:
        console.warn(
            f"the chat templates of teacher and student differ {_first_difference(theirs.chat_template, tokenizer.chat_template)}; "
            "prompts are made by the student's: --chat-template FILE chooses another for both"
        )


def _require_wide_head(role: str, checkpoint: Checkpoint, vocabulary: int, loading: ModelOptions) -> None:
    width = model_config(checkpoint, loading.trust_remote_code).get_text_config().vocab_size
    if width < vocabulary:
        raise ModelError(
            f"the {role}'s head has {width} ids, its tokenizer {vocabulary}: tokens were added and the model was not resized",
            where=checkpoint.name,
            hint=f"transformers' model.resize_token_embeddings({vocabulary}), or the tokenizer that it was trained with",
        )


def _first_difference(theirs: str | dict | None, ours: str | dict | None) -> str:
    if not isinstance(theirs, str) or not isinstance(ours, str):
        return f"(the {'teacher' if not theirs else 'student'} has none)" if not theirs or not ours else "(one of them is several)"
    at = next((index for index, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
    shown = [repr(text[max(0, at - SHOWN) : at + SHOWN]) for text in (theirs, ours)]
    return f"from character {at} on, {shown[0]} and {shown[1]}"


def open_cache(folder: Path, student: Checkpoint, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> TeacherCache:
    """Open a teacher cache for a student. Raises DataError for a damaged one, ModelError for a teacher that is none of the student's."""
    cache = TeacherCache(folder)
    require_same_tokens(cache.tokens, tokenizer.get_vocab())
    teacher = f"the teacher of {folder}, {cache.meta.teacher['name']}"
    require_same_ends(cache.meta.eos_ids, teacher, eos_ids(tokenizer, student, trust_remote_code), student.name, tokenizer)
    return cache


def warn_of_other_teacher(cache: TeacherCache, student: Checkpoint) -> None:
    """Warn where the student was warmed up by another teacher than the cache's: OPD then pulls it elsewhere (arXiv 2604.13010)."""
    path = student.folder / MANIFEST
    if not path.is_file():
        return
    manifest = read_manifest(path)
    records = {**manifest["ancestors"], "": manifest}
    warmups = [record for record in records.values() if record["command"] == "fkl-warmup"]
    teachers = [parent for record in warmups for parent in record["parents"] if is_teacher(parent["role"])]
    for record in (records.get(item["record"]) for warmup in warmups for item in warmup["inputs"] if item["record"]):
        if record and record["command"] == "score":
            teachers += [parent for parent in record["parents"] if parent["role"] == "model"]
    known = {parent["weights_sha256"]: parent["name"] for parent in teachers}
    if known and cache.meta.teacher["weights_sha256"] not in known:
        console.warn(
            f"{student.name} was warmed up by {', '.join(known.values())}, and {cache.folder} holds {cache.meta.teacher['name']}: "
            "distillation from a second teacher undoes what the first has taught"
        )
