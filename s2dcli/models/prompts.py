"""Tokenizers and prompts: the one place where text becomes token ids.

Ids are made once, here, and stored; engines and trainers are only ever given ids, so that no
second tokenisation can add a BOS or split a completion differently.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2dcli.errors import ModelError, UsageError
from s2dcli.files.records import Message, sha256_text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# `--chat-template plain`: the contents, one after the other, and nothing else.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"


# How completions become text, for every record: the same ids must always give the same text.
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
ROWS_TO_CHECK = 16
PROMPTS_TO_CHECK = 256


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder. Raises ModelError if there is none or it has no EOS."""
    from transformers import AutoTokenizer

    with loading("the tokenizer", str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so no completion could ever end", where=str(folder))
    return tokenizer


@contextmanager
def loading(what: str, where: str) -> Iterator[None]:
    """Turn whatever transformers raises over the files of a checkpoint into a ModelError of one line."""
    try:
        yield
    except Exception as error:  # a wrong type or number in a config surfaces anywhere in the library
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # Errors of a config's validation name the field first and what is wrong with it behind.
        text = " ".join(lines) if type(error).__name__.startswith("StrictDataclass") else lines[0]
        plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
        hint = "--trust-remote-code runs the code that it brings" if "trust_remote_code" in text else ""
        kind = "" if plain or type(error).__name__.startswith("StrictDataclass") else f"{type(error).__name__}: "
        raise ModelError(f"cannot load {what}: {kind}{text.rstrip(' .')}", where=where, hint=hint) from None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that the tokenizer knows (highest id + 1).

    A model's output may be wider, padded for speed; the columns beyond have probability 0 here.
    """
    return max(tokenizer.get_vocab().values()) + 1


def unused_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids below `vocabulary_size` that no token has, ascending: models have weights for them, and no text decodes to them."""
    used = set(tokenizer.get_vocab().values())
    return tuple(index for index in range(vocabulary_size(tokenizer)) if index not in used)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the mapping from tokens to ids: equal iff ids mean the same."""
    return sha256_text(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))))


def require_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raise ModelError, naming the first id that differs, unless both map tokens to the same ids."""
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ModelError(
                f"teacher and student have different tokenizers: id {index} is {theirs.get(index)!r} "
                f"in the teacher and {ours.get(index)!r} in the student",
                hint="distillation compares probabilities token by token and needs one tokenizer for both",
            )


def require_made_with(tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping]) -> None:
    """Raise ModelError unless the stored ids of rollouts decode, with this tokenizer, to their stored text.

    Looks at every id, at the text of the first completions, and at what users said in the first distinct prompts:
    whatever the chat template, it stands in there.
    """
    size = vocabulary_size(tokenizer)
    for record in records:
        if not record["prompt_ids"]:
            raise ModelError(f"group {record['group_id']!r} has no prompt_ids to continue")
        if max(max(record["prompt_ids"]), max(record["completion_ids"], default=0)) >= size:
            raise ModelError(f"group {record['group_id']!r} holds token ids that the tokenizer does not know")
    for record in records[:ROWS_TO_CHECK]:
        if tokenizer.decode(record["completion_ids"], **DECODING) != text_of(record["completion"]):
            raise ModelError(
                f"sample {record['sample_index']} of group {record['group_id']!r} was made with another tokenizer: "
                "its completion_ids decode to another text",
                hint="teacher, student and rollouts must share one tokenizer",
            )
    distinct = {tuple(record["prompt_ids"]): record for record in reversed(records)}
    for prompt_ids, record in list(reversed(distinct.items()))[:PROMPTS_TO_CHECK]:
        seen = _folded(tokenizer.decode(list(prompt_ids)))
        prompt = record.get("prompt") or []
        for message in [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt:
            said = str(message.get("content"))
            # What a tokenizer does not keep (capitals, rare characters) is missing on both sides.
            kept = tokenizer.decode(tokenizer(said, add_special_tokens=False)["input_ids"])
            if message.get("role") == "user" and _folded(said) not in seen and _folded(kept) not in seen:
                raise ModelError(
                    f"group {record['group_id']!r} was made with another tokenizer: its prompt_ids decode to another text than its prompt",
                    hint="teacher, student and rollouts must share one tokenizer",
                )


def _folded(text: str) -> str:
    """Text without white space, which chat templates strip."""
    return "".join(text.split())


class PromptEncoder:
    """Turns chat messages into the ids that a model sees, by its chat template.

    `chat_template` is None for the tokenizer's own, "plain" for none at all, or a Jinja file.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Raises UsageError for a template that cannot be read, and for arguments that are not the template's."""
        self.tokenizer = tokenizer
        self.kwargs = chat_template_kwargs or {}
        self.description = " ".join([chat_template or "own", *([json.dumps(self.kwargs, sort_keys=True)] if self.kwargs else [])])
        if chat_template is None:
            if not tokenizer.chat_template:
                raise UsageError(
                    "this model has no chat template",
                    where=str(tokenizer.name_or_path),
                    hint="--chat-template plain joins the messages as they are, --chat-template FILE brings one",
                )
            self.template: str = tokenizer.chat_template
        elif chat_template == "plain":
            self.template = PLAIN_TEMPLATE
        else:
            try:
                self.template = Path(chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot read the chat template: {error.strerror}", where=chat_template) from None

        reserved = sorted(self.kwargs.keys() & {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"})
        if reserved:
            raise UsageError(f"--chat-template-kwargs: {', '.join(reserved)} cannot be set", hint="give variables of the template only")
        self._where = chat_template if chat_template not in (None, "plain") else f"chat template of {tokenizer.name_or_path}"

    @contextmanager
    def _rendering(self, what: str) -> Iterator[None]:
        """Turn what a template raises into a UsageError that names its line and `what` was to be rendered."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            yield
        except TemplateSyntaxError as error:
            raise UsageError(f"is no valid Jinja: {error.message}", where=f"{self._where}, line {error.lineno}") from None
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"cannot render {what or 'a prompt'}: {text}",
                where=self._where,
                hint="see which roles and --chat-template-kwargs it takes, or give another --chat-template",
            ) from None

    @cached_property
    def template_sha256(self) -> str:
        """Hash of template, its arguments and tokenizer: equal iff prompts become the same ids."""
        parts = [self.template, json.dumps(self.kwargs, sort_keys=True), tokenizer_sha256(self.tokenizer)]
        return sha256_text("\n".join(parts))

    def encode(self, messages: list[Message], what: str = "") -> list[int]:
        """Return the ids of a prompt, ready for the answer to follow; one BOS where the model wants it.

        `what` names the prompt in an error, such as "problem 'gsm8k-17'". Raises UsageError.
        """
        with self._rendering(what):
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, **self.kwargs
            )
        bos = self.tokenizer.bos_token
        # A template that writes BOS itself must not get a second one from the tokenizer.
        add_special = self.template == PLAIN_TEMPLATE and not (bos and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=add_special)["input_ids"]
        eos = self.tokenizer.eos_token_id
        while add_special and ids and ids[-1] == eos:  # a tokenizer that closes every text would end the prompt here
            ids = ids[:-1]
        if not ids:
            raise UsageError("a prompt became no tokens at all", where=str(self.tokenizer.name_or_path))
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Return the ids of a completion's text, closed by EOS: for texts that no model has sampled."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        """Return the text of a completion, without special tokens."""
        return self.tokenizer.decode(ids, **DECODING)


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """Parse `--chat-template-kwargs`. Raises UsageError unless it is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--chat-template-kwargs is not JSON ({error})", hint="e.g. '{\"enable_thinking\": false}'") from None
    if not isinstance(value, dict):
        raise UsageError("--chat-template-kwargs must be a JSON object", hint="e.g. '{\"enable_thinking\": false}'")
    return value
