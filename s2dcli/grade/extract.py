r"""Which part of a completion is its answer.

The policy: what stands before the last `</think>` is dropped; a `<think>` that was opened, in the
prompt or in the completion, and never closed means that there is no answer; the last complete box
counts (`\boxed{42}`, `\boxed 42`, `\fbox{42}`), and an empty one is no answer. Boxes that nothing but
`and`, `or`, a comma or spacing joins are one answer of several parts. Prose does not outvote a box.
Without a box the last stated answer counts, if `lenient`.

Everything here is linear in the length of the text, whatever the text holds.
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache
from typing import Any, NamedTuple

from s2dcli.grade.normalise import is_prose

OPEN = "<think>"
CLOSE = "</think>"
STATED_LENGTH = 300  # characters that a stated answer may have
JOINT_LENGTH = 80  # characters between two boxes of one answer, `\\boxed{1} \\quad \\text{and} \\quad \\boxed{2}`
STATED_DEPTH = 3  # "Final answer: the answer is 42"
STATED_TRIES = 50  # mentions of "answer", from the end, that are looked at

PROBLEM_LENGTH = 20_000  # characters of a problem, from its end, that are searched for what it asks
CACHE = 1024  # problems whose wish is remembered: groups share them

_ORDER = re.compile(
    r"\bin (?:\w+ )?order\b(?! to\b| that\b)|\b(?:in|de)creasing(?:ly)? order|\b(?:as|de)scending\b|\brespectively\b"
    r"|\bfrom (?:the )?(?:small|larg|great|low|high|least|most)|\bsorted\b|\bordered list\b|\bfirst (?:\w+ )?terms\b",
    re.IGNORECASE,
)
_ALL = re.compile(
    r"\b(?:find|determine|list|give|what are|compute) all\b|(?<!for )\ball (?:\w+ ){0,3}(?:solutions?|roots?|zeros|values?)\b"
    r"|\bsolve\b|\b(?:solutions|roots|zeros|possible values)\b",
    re.IGNORECASE,
)
# A box with or without its brace, a doubled backslash before a brace, an escaped brace, a brace.
_TOKEN = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*+(\{)?|\\\\(?=[{}])|\\[{}]|[{}]")
_JOINT = re.compile(
    r"(?:[\s,$~*&]|\\[()\[\],;:! ]|\\q?quad(?![a-z])|\\\\|\\(?:text|mbox|textrm|mathrm|textbf) ?\{\s*+(?:,?\s*+(?:and|or)\b,?\s*+)?\}"
    r"|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))++\Z"
)
_WORD = re.compile(r"and|or")
_BARE = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t]*+([^\s{}$\\]++)")
_BARE_START = re.compile(r"[-+(\[.\w]")
_STATED = re.compile(r"[\s*_]*+(?:is|are|was|=|:|：|equals)?[\s*_]*+(?:therefore|thus)?[:：\s*_]*+")
_FORMULA = re.compile(r"\$\$[^$]++\$\$|\$[^$\n]++\$|\\\([^\n]*?\\\)|\\\[.*?\\\]", re.DOTALL)
_NUMBER = re.compile(r"(?<![A-Za-z0-9.,/])(-?[$€£]?[0-9]++(?:[.,][0-9]++)*+(?: ?/ ?[0-9]++)?%?)")
_DECIMAL_COMMA = re.compile(r"-?[0-9]++,[0-9]{1,2}")
_SENTENCE_END = re.compile(r"\n|[.;!?](?:\s|$)|(?:\*\*)")


def text_of_answer(value: Any) -> str:
    """Return a gold answer as text; "" where there is none. Numbers count as their digits."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, str) else ""


def _text_of_content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # the parts of a multimodal message
        return "\n".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def text_of_completion(value: Any) -> str:
    """Return what the model said: a string, or the assistant's turns of a list of messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return ""
    messages = [message for message in value if isinstance(message, dict)]
    spoken = [message for message in messages if message.get("role", "assistant") == "assistant"]
    return "\n".join(_text_of_content(message.get("content")) for message in spoken or messages)


def opens_thinking(prompt: Any) -> bool:
    """Whether a prompt ends inside `<think>`: a prefilled assistant turn, or a text with the tag at its end.

    A system prompt that merely speaks of the tag does not count.
    """
    if isinstance(prompt, list):
        last = prompt[-1] if prompt else None
        if not isinstance(last, dict) or last.get("role") != "assistant":
            return False
        text = _text_of_content(last.get("content"))
        return text.rfind(OPEN) > text.rfind(CLOSE)
    return isinstance(prompt, str) and prompt.rstrip().endswith(OPEN)


@lru_cache(maxsize=CACHE)
def _order_in(text: str) -> bool | None:
    if _ORDER.search(text):
        return True
    return False if _ALL.search(text) else None


def asks_for_order(prompt: Any) -> bool | None:
    """Whether a problem asks for its answers in an order: False where it asks for all solutions, None where it does not say."""
    if isinstance(prompt, list):
        turns = [message for message in prompt if isinstance(message, dict) and message.get("role") == "user"]
        prompt = _text_of_content(turns[-1].get("content")) if turns else ""
    return _order_in(prompt[-PROBLEM_LENGTH:]) if isinstance(prompt, str) and prompt else None


def visible(text: str, thinking: bool) -> str | None:
    """Return what follows the reasoning, None if the reasoning never ended."""
    end = text.rfind(CLOSE)
    if end >= 0:
        text = text[end + len(CLOSE) :]
        thinking = False
    return None if thinking or OPEN in text else text


class Box(NamedTuple):
    """A complete box: where it starts and ends in the text, and what it holds."""

    start: int
    end: int
    content: str


def last_box(text: str) -> str | None:
    """Return the content of the complete box that starts last, together with those that are joined to it; None if there is none."""
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if last < 0:
        return None
    found = boxes(text, last) or boxes(text)
    if not found:
        return None
    box = max(found)
    if text.rfind("boxed", 0, box.start) < 0 and text.rfind("fbox", 0, box.start) < 0:
        return box.content
    return _joined(text, boxes(text), box) if _JOINT.search(text, max(0, box.start - JOINT_LENGTH), box.start) else box.content


def _joined(text: str, found: list[Box], last: Box) -> str:
    """Return the contents of `last` and of the boxes before it that only `and`, `or`, a comma or spacing separates from it."""
    parts = [last.content]
    for box in sorted(found, reverse=True):
        between = text[box.end : last.start]
        if box.end > last.start or len(between) > JOINT_LENGTH or not _JOINT.fullmatch(between):
            continue
        if _WORD.search(between) or "," in between or box.content != last.content:  # else the same answer, boxed twice
            parts.insert(0, box.content)
        last = box
    return ", ".join(parts)


def boxes(text: str, start: int | None = None) -> list[Box]:
    """Return the complete boxes at or after `start`, as they end: one pass, matching braces."""
    if start is None:
        start = min((at for at in (text.find("\\boxed"), text.find("\\fbox")) if at >= 0), default=len(text))
    found = []
    opened: list[tuple[int, int]] = []  # where a box and its content start, (-1, -1) for other braces
    for token in _TOKEN.finditer(text, start):
        mark = token[0]
        if mark == "{":
            opened.append((-1, -1))
        elif mark == "}":
            begin, content = opened.pop() if opened else (-1, -1)
            if begin >= 0:
                found.append(Box(begin, token.end(), text[content : token.start()]))
        elif token[1]:
            opened.append((token.start(), token.end()))
        elif len(mark) > 2:  # a box without a brace
            bare = _BARE.match(text, token.start())
            if bare and _BARE_START.match(bare[1]):
                found.append(Box(token.start(), bare.end(), bare[1].rstrip(".,;:?")))
    return found


def last_stated(text: str) -> str | None:
    """Return the last answer that is stated in words, `The answer is 42`, `#### 42`; None if there is none."""
    lowered = text.lower() if len(text.lower()) == len(text) else text
    at = len(lowered)
    for _ in range(STATED_TRIES):
        word = lowered.rfind("answer", 0, at)
        hashes = lowered.rfind("####", 0, at)
        at = max(word, hashes)
        if at < 0:
            return None
        begin = at + (6 if at == word else 4)
        connective = _STATED.match(text, begin)
        begin = connective.end() if connective else begin
        end = _SENTENCE_END.search(text, begin, begin + STATED_LENGTH)
        stated = text[begin : end.start() if end else begin + STATED_LENGTH].strip(" \t*_").removesuffix("\\]").removesuffix("]").rstrip()
        if stated:
            return stated
    return None


def from_prose(text: str) -> str | None:
    """Return the answer that a sentence gives: the last stated one, or else the last formula or number."""
    for _ in range(STATED_DEPTH):
        stated = last_stated(text)
        if stated is None or stated == text:
            break
        text = stated
    if not is_prose(text):
        return text
    formula, number = (deque(pattern.finditer(text), maxlen=1) for pattern in (_FORMULA, _NUMBER))
    formula, number = (found[0] if found else None for found in (formula, number))
    if formula and not is_prose(formula[0]) and (number is None or number.end() <= formula.end()):
        return formula[0]
    if number is None:
        return None
    return number[1].replace(",", ".") if _DECIMAL_COMMA.fullmatch(number[1]) else number[1]


def extract(text: str, thinking: bool, lenient: bool) -> tuple[str | None, str]:
    """Return (answer, ""), or (None, why there is none)."""
    seen = visible(text, thinking)
    if seen is None:
        return None, "<think> was never closed"
    found = last_box(seen)
    if found is None and lenient:
        found = last_stated(seen)
    if found is None:
        return None, "no box" if not lenient else "no box and no stated answer"
    return (found, "") if found.strip() else (None, "the box is empty")
