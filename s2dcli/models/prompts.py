"""Tokenizers and prompts: the one place where text becomes token ids.

Ids are made once, here, and stored; engines and trainers are only ever given ids, so that no
second tokenisation can add a BOS or split a completion differently.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2dcli.errors import ModelError, UsageError
from s2dcli.files.records import Message, Rollout, sha256_text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from s2dcli.models.rows import Row

# `--chat-template plain`: the contents, one after the other, and nothing else.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"


# How completions become text, for every record: the same ids must always give the same text.
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
_ANSWER = "the-answer"  # stands for a completion where a template is rendered to see what it writes after one
REASONING_TAGS = ("<think>", "</think>")  # stay in the text also where they are special tokens


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
        hint = "--trust-remote-code runs the code that it brings" if "trust_remote_code" in str(error) else ""
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


def require_same_tokens(teacher: Mapping[str, int], student: Mapping[str, int], where: str = "") -> None:
    """Raise ModelError, naming the first id that differs, unless both map tokens to the same ids, special and added ones too.

    `where`: whose tokens the teacher's are.
    """
    ours, theirs = ({index: token for token, index in tokens.items()} for tokens in (student, teacher))
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise ModelError(
                f"teacher and student have different tokenizers: id {index} is {theirs.get(index)!r} "
                f"in the teacher and {ours.get(index)!r} in the student",
                where=where,
                hint="distillation compares probabilities token by token and needs one tokenizer for both",
            )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[set[int], set[int]]:
    """Return the ids of special tokens, and those of them that are tags around the reasoning."""
    special = set(tokenizer.all_special_ids)
    return special, special.intersection(tokenizer.convert_tokens_to_ids(list(REASONING_TAGS))) - {tokenizer.unk_token_id}


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], specials: tuple[set[int], set[int]] | None = None) -> str:
    """Return the text of a completion: without special tokens, apart from the tags around the reasoning.

    `specials`: what `special_ids` returns, for those who decode many.
    """
    special, kept = specials or special_ids(tokenizer)
    if kept.isdisjoint(ids):
        return tokenizer.decode(ids, **DECODING)
    shown = [token for token in ids if token not in special or token in kept]
    return tokenizer.decode(shown, **DECODING | {"skip_special_tokens": False})


def require_made_with(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], samples: Sequence[Rollout]) -> None:
    """Raise ModelError unless stored rollouts were made with this tokenizer.

    It has to know all ids, and to decode those of `samples` to their text: a completion's to the whole of it, a
    prompt's to what users said in it, which stands in there whatever the chat template.
    """
    size = vocabulary_size(tokenizer)
    for row in rows:
        if not len(row.prompt_ids):
            raise ModelError(f"group {row.group_id!r} has no prompt_ids to continue")
        if max(row.prompt_ids.max(), row.completion_ids.max(initial=0)) >= size:
            raise ModelError(f"group {row.group_id!r} holds token ids that the tokenizer does not know")
    for sample in samples:
        ids, text = sample.completion_ids, text_of(sample.completion)
        # Other tools, and older files, leave the tags of the reasoning out.
        if text not in (decode(tokenizer, ids), tokenizer.decode(ids, **DECODING)):
            raise ModelError(
                f"sample {sample.sample_index} of group {sample.group_id!r} was made with another tokenizer: "
                "its completion_ids decode to another text",
                hint="teacher, student and rollouts must share one tokenizer",
            )
        seen = _folded(tokenizer.decode(sample.prompt_ids))
        for said in (message["content"] for message in sample.prompt if message["role"] == "user"):
            # What a tokenizer does not keep (capitals, rare characters) is missing on both sides.
            kept = tokenizer.decode(tokenizer(said, add_special_tokens=False)["input_ids"])
            if _folded(said) not in seen and _folded(kept) not in seen:
                raise ModelError(
                    f"group {sample.group_id!r} was made with another tokenizer: its prompt_ids decode to another text than its prompt",
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

    def render(self, messages: list[Message], what: str = "") -> str:
        """Return the text of a prompt, ready for the answer to follow. `what` names it in an error. Raises UsageError."""
        with self._rendering(what):
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, **self.kwargs
            )

    def opens_reasoning(self, messages: list[Message]) -> bool:
        """Whether the rendered prompt ends inside `<think>`; a message that merely speaks of the tag does not count."""
        text = self.render(messages).rstrip()
        opening, closing = REASONING_TAGS
        last = messages[-1]["content"].strip()
        written_here = text[text.rfind(last) + (0 if messages[-1]["role"] == "assistant" else len(last)) :] if last in text else ""
        return text.endswith(opening) or written_here.rfind(opening) > written_here.rfind(closing)

    def encode(self, messages: list[Message], what: str = "") -> list[int]:
        """Return the ids of a prompt, ready for the answer to follow; one BOS where the model wants it.

        `what` names the prompt in an error, such as "problem 'gsm8k-17'". Raises UsageError.
        """
        text = self.render(messages, what)
        bos = self.tokenizer.bos_token
        # A template that writes BOS itself must not get a second one from the tokenizer.
        add_special = self.template == PLAIN_TEMPLATE and not (bos and text.startswith(bos))
        ids = self.tokenizer(text, add_special_tokens=add_special)["input_ids"]
        eos = self.tokenizer.eos_token_id
        while add_special and ids and ids[-1] == eos:  # a tokenizer that closes every text would end the prompt here
            ids = ids[:-1]
        if not ids:
            raise UsageError("a prompt encodes to no tokens", where=str(self.tokenizer.name_or_path))
        return ids

    @cached_property
    def _after_answer(self) -> list[int]:
        """Ids that the template writes after an assistant's answer; none for `plain`."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
        text = self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False, **self.kwargs)
        _, found, after = text.rpartition(_ANSWER)
        return self.tokenizer(after, add_special_tokens=False)["input_ids"] if found else []

    def encode_completion(self, text: str, eos_ids: Collection[int] = ()) -> list[int]:
        """Return the ids of a completion's text and of the end of its turn: for texts that no model has sampled.

        The end of the turn is the first of the model's `eos_ids` that the template writes after an answer, else
        the first special token there, else the tokenizer's EOS.
        """
        ends = (i for known in (eos_ids, self.tokenizer.all_special_ids) for i in self._after_answer if i in known)
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], next(ends, self.tokenizer.eos_token_id)]

    @cached_property
    def _specials(self) -> tuple[set[int], set[int]]:
        return special_ids(self.tokenizer)

    def decode(self, ids: list[int]) -> str:
        """Return the text of a completion, without special tokens other than the tags around the reasoning."""
        return decode(self.tokenizer, ids, self._specials)


def parse_template_kwargs(text: str) -> dict[str, Any]:
    """Parse `--chat-template-kwargs`. Raises UsageError unless it is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--chat-template-kwargs is not JSON ({error})", hint="e.g. '{\"enable_thinking\": false}'") from None
    if not isinstance(value, dict):
        raise UsageError("--chat-template-kwargs must be a JSON object", hint="e.g. '{\"enable_thinking\": false}'")
    return value
