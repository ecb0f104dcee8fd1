r"""One spelling for answers that are written in many ways.

Everything here works on strings, in time linear in their length: invisible and full-width
characters, Unicode mathematics, LaTeX spacing and sizing, delimiters around the whole answer. The
result is LaTeX that `exact.py` and math-verify read; it is never shown to anyone.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = {ord(c): d for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True)}
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]++")
_CIRCLED = re.compile("[①②③④⑤⑥⑦⑧⑨](?=[①②③④⑤⑥⑦⑧⑨])")  # statements by number, one after the other
_SUBSCRIPTS = {ord(c): d for c, d in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)}
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]++")
_HTML_SCRIPT = re.compile(r"<(sup|sub)>([^<>]{1,40})</\1>")
_VULGAR = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_SYMBOLS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "∞": r"\infty ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "±": r"\pm ", "√": r"\sqrt ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
    "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "…": r"\ldots ",
    "∅": r"\emptyset ", "∀": r"\forall ", "∃": r"\exists ", "、": ",", "“": "", "”": "", "≈": r"\approx ", "→": r"\to ", "。": ".",
}  # fmt: skip
_SYMBOL_TABLE = {ord(k): v for k, v in _SYMBOLS.items()}

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>")
_TOO_MANY_BACKSLASHES = re.compile(r"\\\\(?=[A-Za-z]{2})")
_SIZES = re.compile(r"\\(?:left|right|middle|[bB]ig[glmr]*+|displaystyle|textstyle|limits)(?![A-Za-z])\.?")
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|\\(?:hspace|hfill)(?:\{[^{}]*\})?|~|\s++")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BINOMIALS = re.compile(r"\\[dt]binom(?![A-Za-z])")
_COMPARISONS = re.compile(r"\\(le|ge|ne)(?:qslant|qq|q)?(?![A-Za-z])")
_TEXT_NAMES = re.compile(r"\\(?:textnormal|textup|textsf|mbox)(?![A-Za-z])")
_UNIT_LETTER = re.compile(r"(?<=[\d}]) ?\\(?:mathrm|text|rm|operatorname)\s*+\{\s*+([mgshLNJWVCK])\s*+\}")
_BLANK_TEXT = re.compile(r"\\text\s*+\{\s*+\}")
# `\text{ for all } x \in \mathbb{R}`, and `, k \in \mathbb{Z}` or `\text{ where } k \text{ is an integer}` at the end.
_FOR_ALL = re.compile(
    r",? ?(?:\\text ?\{[ ,]*+)?(?<![A-Za-z])for (?:all|any|every|each) ?"
    r"(?:(?:real|integers?|positive|rational|natural|numbers?|values? of) ?)*+\}? ?"
    r"\$?[A-Za-z](?![A-Za-z])\$?(?: ?\\in ?\\mathbb ?\{?[A-Z]\}?(?: ?[\^_] ?(?:[+*]|\{[^{}]*+\}))?)?\}?(?= ?(?:$|[,;]|\\text|and(?![a-z])))"
)
_WHERE = r"(?:\\text ?\{[ ,]*+(?:where|for|with)(?: some)? ?\} ?|(?:where|for|with)(?: some)? )?"
_DOMAIN = re.compile(
    rf"(?<=.)[,;]? ?(?:{_WHERE}\(? ?[a-z] ?\\in ?(?:\\mathbb ?)?(?:\{{ ?[ZR] ?\}}|[ZR]) ?\)?"
    r"|\\text ?\{[ ,]*+(?:where|for|with) ?\} ?[a-z] ?\\text ?\{ ?is an integer ?\}"
    r"|\\text ?\{[ ,]*+(?:where|for|with) (?:some |any |all )?integers? ?\} ?[a-z])$"
)
_REAL = re.compile(r"[a-z] ?\\in ?\\mathbb ?(?:\{ ?R ?\}|R) ?(?:, ?|\\text ?\{ ?and ?\} ?)(?=[a-z])")
_SYSTEM = re.compile(r"(?:\\\{ ?)?\\begin ?\{(cases|array|aligned)\}(?: ?\{[lcr]+\})?([^&]*?)\\end ?\{\1\}")
_MEASURE = re.compile(r"\\text ?\{ ?(-?\d[\d.,]*+) ?([A-Za-z ]*+)\}")
_FONTS = re.compile(r"\\(?:mathrm|mathbf|mathit|mathsf|text|textbf|textit|textrm|operatorname|rm|bf)\s*+\{\s*+([A-Za-z])\s*+\}")
_FUNCTIONS = re.compile(
    r"\\(?:mathrm|text|operatorname)\s*+\{\s*+(sin|cos|tan|cot|sec|csc|log|ln|lg|exp|arcsin|arccos|arctan|max|min|gcd|lcm)\s*+\}"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*+\{([^{}]*+)\}")
_BOLD = re.compile(r"\\(?:boldsymbol|mathbf|bm|pmb|bf)(?![A-Za-z])")
_GROUP = r"(?<![\d.,])([1-9]\d{0,2})((?:%s\d{3})++)(?!\d|,\d)"
_SPACED = re.compile(_GROUP % r"(?:\{,\}|,\\! *|\\! *|\\,|\\ |\\;|\\:| |~|')")
_THOUSANDS = re.compile(_GROUP % ",")
_DOLLARS = re.compile(r"(?<!\\)\$(?!\d) ?|(?<=\d)\$")  # of formulas inside the answer, not of prices
_BRACKET = re.compile(r"[(\[{]")
_NOT_DIGIT = re.compile(r"\D")
_GROUPED_COMMAS = re.compile(r"\{\s*,\s*\}")
_DECIMAL_COMMA = re.compile(r"(-?)0,(\d++)")
_HALF_BRACED = re.compile(r"\\frac ?(\{[^{}]*+\}) ?([A-Za-z0-9])(?![A-Za-z0-9])")
_SET_BUILDER = re.compile(
    r"\\\{ ?([A-Za-z]) ?(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:) ?"
    r"(?:\1 ?\\in ?\\mathbb ?\{?R\}? ?, ?)?([^{}]*?)\\\}"
)
_SIGN_RUN = re.compile(r"[-+]\s*+[-+]")
_SIGNS = re.compile(r"[-+\s]*[-+][-+\s]*")
_PREFIX = re.compile(
    r"(?:\\text\s*+\{\s*+)?only\s*+\}?\s*+(?=[A-Za-z]\s*+=|\d)"
    r"|(?:\\approx|approximately|about|roughly)(?![A-Za-z])\s*+(?=\S)"
    r"|(?:\\text\s*+\{\s*+)(?:the\s+)?(?:final\s+)?answer\s*+(?:is|:|=)?\s*+:?\s*+\}\s*+"
    r"|(?:the\s+)?(?:final\s+)?answer\s*+(?:is|:|=)?\s*+:?\s*+(?=\S)|result\s*+(?:is|:)\s*+",
    re.IGNORECASE,
)
_PARENTHESISED_ROOT = re.compile(r"\\sqrt\s*+\(([^()]*+)\)")
_ONE_WORD = re.compile(r"[A-Za-z]{3,}")
_PROSE = re.compile(
    r"(?<![\\A-Za-z])[A-Za-zÀ-ÿ]{2,}[,:]? +(?:[a-z]\w* +)?[A-Za-zÀ-ÿ]{2,}"
    r"|[\u0600-\u06ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]{2}"
)
_BRACKETS = {")": "(", "]": "[", "}": "{"}


def _unicode(text: str) -> str:
    """Spell Unicode mathematics in LaTeX and remove what cannot be seen."""
    if text.isascii() and text.isprintable() and "<su" not in text:
        return text
    text = _SUPERSCRIPT_RUN.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _HTML_SCRIPT.sub(lambda m: f"{'^' if m[1] == 'sup' else '_'}{{{m[2]}}}", text)
    text = _CIRCLED.sub(r"\g<0>,", text)
    text = _VULGAR.sub(lambda m: r"\frac{" + unicodedata.normalize("NFKC", m[0]).replace("⁄", "}{") + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOL_TABLE)).translate(_SYMBOL_TABLE)
    return "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) not in ("Cf", "Cc", "Cs", "Mn"))


def _matches(text: str) -> dict[int, int]:
    """Return where each bracket that opens is closed; `\\{` pairs with `\\}`."""
    stack: list[tuple[str, int]] = []
    closed_at: dict[int, int] = {}
    for at, mark in enumerate(text):
        if mark in "([{":
            stack.append((mark, at))
        elif mark in _BRACKETS and stack and stack[-1][0] == _BRACKETS[mark]:
            closed_at[stack.pop()[1]] = at
    return closed_at


def unwrap(text: str) -> str:
    r"""Remove `{...}`, `$...$`, `\(...\)`, `\[...\]` and, around one element, `(...)`, from the outside inwards."""
    begin, end = 0, len(text)
    closed_at: dict[int, int] | None = None
    parenthesis: tuple[int, int] | None = None
    while True:
        while begin < end and text[begin] in " \n\t":
            begin += 1
        while end > begin and text[end - 1] in " \n\t":
            end -= 1
        if end - begin < 2:
            break
        if text[begin] == "$" and text[end - 1] == "$":
            begin, end, parenthesis = begin + 1, end - 1, None
        elif text[begin : begin + 2] in (r"\(", r"\[") and text[end - 2 : end] in (r"\)", r"\]") and end - begin >= 4:
            begin, end, parenthesis = begin + 2, end - 2, None
        elif text[begin] in "{(" and text[end - 1] in "})":
            if closed_at is None:
                closed_at = _matches(text)
            if closed_at.get(begin) != end - 1:
                break
            parenthesis = (begin, end) if text[begin] == "(" else parenthesis
            begin, end = begin + 1, end - 1
        else:
            break
    if parenthesis and len(split(text[begin:end])) != 1:
        begin, end = parenthesis
    return text[begin:end]


def split(text: str, separators: str = ",;") -> list[str]:
    """Cut a text at the separators that stand outside all brackets."""
    parts, depth, begin = [], 0, 0
    for at, mark in enumerate(text):
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif depth <= 0 and mark in separators:
            parts.append(text[begin:at])
            begin = at + 1
    parts.append(text[begin:])
    return parts


def bracketed(text: str) -> bool:
    """Whether a text is one pair of round or square brackets, of any mix, and what they hold."""
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]"):
        return False
    depth = 0
    for at, mark in enumerate(text):
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
            if depth == 0:
                return at == len(text) - 1
    return False


def is_prose(text: str) -> bool:
    r"""Whether a text has two neighbouring words, or Chinese, Japanese, Korean or Arabic script, outside `\text{...}`."""
    return bool(_PROSE.search(_TEXT.sub(" ", text)))


def is_words(text: str) -> bool:
    """Whether an answer is words and not a formula: prose or one word, in `\\text{...}` or not."""
    text = _TEXT.sub(r"\1", text)
    return bool(_PROSE.search(text) or _ONE_WORD.fullmatch(text.strip()))


def words(text: str) -> str:
    """Return an answer as plain lower-case words, to compare answers that are prose."""
    text = _TEXT.sub(r"\1", _unicode(text)).replace("\\", " ").replace("$", " ")
    text = re.sub(r"\band\b|\b(?:an?|the) (?=[a-z]{3})", " ", text.lower())
    return " ".join(re.sub(r"[^\w+\-*/=<>.]+", " ", text).split()).rstrip(".")


def _digits(match: re.Match[str]) -> str:
    return match[1] + _NOT_DIGIT.sub("", match[2])


def signs(text: str) -> str:
    """Fold runs of signs: an even number of minus is none."""
    return _SIGNS.sub(lambda m: ("-" if m[0].count("-") % 2 else "+") if len(m[0].strip()) > 1 else m[0], text)


def _commands(text: str) -> str:
    """Write the LaTeX commands of a text, whose spacing is plain, in one way each."""
    text = _FRACTIONS.sub(r"\\frac", text)
    text = _BINOMIALS.sub(r"\\binom", text)
    text = _COMPARISONS.sub(r"\\\1q", text)
    text = _UNIT_LETTER.sub(r" \\mbox{\1}", text)
    text = _FONTS.sub(r"\1", text)
    text = _FUNCTIONS.sub(r"\\\1 ", text)
    text = _BOLD.sub("", text)
    text = _PARENTHESISED_ROOT.sub(r"\\sqrt{\1}", text)
    if "\\begin" in text or "\\langle" in text or "\\underline" in text:
        text = text.replace(r"\langle", "(").replace(r"\rangle", ")").replace(r"\underline", "")
        if (match := _SYSTEM.fullmatch(text.strip())) and "=" in match[2]:
            text = match[2].replace(r"\\", ",")
    return text


def normalise(text: str) -> str:
    """Return an answer in the one spelling that the comparisons read."""
    text = _unicode(text)
    text = _SPECIAL_TOKEN.sub("", text).strip()
    has_commands = "\\" in text
    if has_commands:
        text = _TOO_MANY_BACKSLASHES.sub(r"\\", text) if "matrix" not in text and "cases" not in text else text
        text = _SIZES.sub("", text)
    text = _SPACED.sub(_digits, text)
    text = _GROUPED_COMMAS.sub(",", text)
    if has_commands:
        text = _BLANK_TEXT.sub(" ", _TEXT_NAMES.sub(r"\\text", text.replace(r"\!", "")))
    text = _SPACES.sub(" ", text)
    if has_commands:
        text = _commands(text)
    if "\\in" in text or "for" in text or "where" in text:
        text = _REAL.sub("", _DOMAIN.sub("", _FOR_ALL.sub("", text)), count=1)
    text = text.strip()
    text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    text = text.strip().strip("*").rstrip(".。,;:?").strip()
    text = unwrap(unwrap(text).rstrip(".,;: "))
    if "," in text and not _BRACKET.search(_TEXT.sub("", text)):
        text = _THOUSANDS.sub(_digits, text)  # in brackets, a comma separates
    if "$" in text:
        text = _DOLLARS.sub(" ", text).strip()
    if match := _DECIMAL_COMMA.fullmatch(text):
        text = f"{match[1]}0.{match[2]}"
    if has_commands:
        if match := _MEASURE.fullmatch(text):
            text = f"{match[1]}\\text{{ {match[2]}}}" if match[2] else match[1]
        if match := _SET_BUILDER.fullmatch(text):
            text = match[2].strip()
        text = _HALF_BRACED.sub(r"\\frac\1{\2}", text)
    return signs(text) if _SIGN_RUN.search(text) else text
