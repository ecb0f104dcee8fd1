"""Files and folders that are whole or not there.

What is written gets a temporary name first, `.s2d-PID-NAME.tmp`, is synced, and then gets its own; what is
removed loses its name first. So whatever ends the process, a name never stands for half of something.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from s2dcli.errors import DataError

_TEMPORARY = re.compile(r"\.s2d-\d+-(.+)\.tmp")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors words what the operating system said


def temporary(path: Path) -> Path:
    """Return the name that `path` has while it is written or removed."""
    return path.with_name(f".s2d-{os.getpid()}-{path.name}.tmp")


def is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


@contextmanager
def disk_errors(action: str, where: str | Path) -> Iterator[None]:
    """Turn what the file system refuses into a DataError of one line, e.g. `PLACE: cannot ACTION: No space left on device`."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        code = _RUST_ERROR.search(str(error))
        reason = os.strerror(int(code[1])) if code else str(error)
    else:
        return
    raise DataError(f"cannot {action}: {reason}", where=str(where))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears, in place of an old one, when the block has come to its end. Raises OSError."""
    draft = temporary(path)
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a new folder that appears, in place of an old one, when the block has come to its end. Raises OSError."""
    draft = temporary(path)
    try:
        draft.mkdir()
        yield draft
        for inner in draft.rglob("*"):
            sync(inner)
        sync(draft)
        if path.exists():
            remove(path)
        os.rename(draft, path)
        sync(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or folder, which is gone under its name at once. Raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = temporary(path)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what killed processes have left in a folder, if there is one, under the temporary names of `names`; all if none is given.

    Raises OSError.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and (not names or match[1] in names):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
