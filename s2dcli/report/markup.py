"""HTML and SVG, built from elements: whatever is not markup already is escaped, so that no text can become markup."""

from __future__ import annotations

from html import escape
from typing import Any

from s2dcli.console import printable

_VOID = {"meta", "input", "br"}  # elements without content
_RAW = {"script", "style"}  # elements whose content is no text to a browser: nothing in it is unescaped


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Return an element. Children are Markup, lists of children, None, or anything else as text, which is escaped.

    Of attributes None and False are left out, True has no value; `class_` is class, `aria_label` is aria-label.
    Control characters and marks that change the direction of text are made visible.
    """
    given = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Return children one after another, as `tag` takes them."""
    return Markup("".join(map(_child, children)))


def raw(name: str, content: str, /, **attributes: Any) -> Markup:
    """Return a script or style of our own. Raises ValueError if its content would end the element."""
    if name not in _RAW or f"</{name}" in content.lower() or "<!--" in content:
        raise ValueError(f"cannot stand in <{name}>")
    return tag(name, Markup(content), **attributes)


def _child(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, list | tuple):
        return join(*child)
    return escape(printable(str(child)), quote=False)


def _attribute(key: str) -> str:
    return key.removesuffix("_").replace("_", "-")
