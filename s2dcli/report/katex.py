"""KaTeX, from its npm package: a script, a style sheet and fonts that are put into the page as they are.

The package is a folder (`npm install katex`: node_modules/katex) or the archive that npm loads (`npm pack katex`: katex-0.19.1.tgz).
"""

from __future__ import annotations

import base64
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from s2dcli.errors import DataError

_SOURCES = re.compile(r"src:(url\(([^)]*\.woff2)\) format\(.woff2.\))[^;}]*")  # of a font: woff2 first, then older formats
HINT = "npm pack katex makes a katex-VERSION.tgz, and --katex takes it"


class Katex(NamedTuple):
    """What of KaTeX stands in a page."""

    version: str
    script: str
    style: str


def read_katex(path: str) -> Katex:
    """Read KaTeX from its package, the fonts as data: URLs in the style sheet. Raises DataError."""
    try:
        if Path(path).is_dir():
            return _read(path, lambda name: (Path(path) / name).read_bytes())
        with tarfile.open(path) as archive:
            return _read(path, lambda name: archive.extractfile(f"package/{name}").read())
    except KeyError as error:
        raise DataError(f"is no package of KaTeX: {error.args[0]}", where=path, hint=HINT) from None
    except (OSError, tarfile.TarError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise DataError(f"is no package of KaTeX that can be read: {reason}", where=path, hint=HINT) from None


def _read(path: str, read: Callable[[str], bytes]) -> Katex:
    package = json.loads(read("package.json"))
    if package["name"] != "katex":
        raise DataError(f"is the package {package['name']!r}, not katex", where=path, hint=HINT)

    def embedded(match: re.Match[str]) -> str:
        font = base64.b64encode(read(f"dist/{match[2]}")).decode()
        return f"src:url(data:font/woff2;base64,{font}) format('woff2')"

    style, fonts = _SOURCES.subn(embedded, read("dist/katex.min.css").decode())
    if not fonts or "url(fonts/" in style:
        raise DataError("has a style sheet whose fonts are not found", where=path, hint=HINT)
    scripts = [read(f"dist/{name}").decode() for name in ("katex.min.js", "contrib/auto-render.min.js")]
    return Katex(str(package["version"]), "\n".join(scripts), style)
