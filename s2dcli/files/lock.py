"""Locks that keep two processes from writing to one place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from s2dcli import console
from s2dcli.errors import UsageError
from s2dcli.files.atomic import disk_errors

LOCK = ".lock"
LARGEST = 4096  # bytes of a lock file
OTHER = " by another process"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # answers of file systems that keep none


def lock_of(output: Path) -> Path:
    """Return the name of an output's lock: in a folder, or beside a file."""
    return output / LOCK if output.is_dir() else output.with_name(f".{output.name}{LOCK}")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes from writing to an output, a folder or file, while the block runs.

    The kernel keeps the lock and gives it up with the process, however that ends, so a lock file that
    was left behind means nothing and a pid that was given out again does not matter; what the file says
    of its owner is for people. Children do not inherit it. A link or a file with other contents under the
    lock's name is never written to. Raises UsageError that names the owner or what is in the way, and
    DataError if the file cannot be made.
    """
    path = lock_of(output)
    with disk_errors("lock the output", output):
        descriptor = _take(path, output)
        owner = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, output: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise _in_the_way(path, output) from None
        if not _is_ours(descriptor):
            os.close(descriptor)
            raise _in_the_way(path, output)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                console.warn(f"{output}: this file system keeps no locks, so nothing keeps a second process from writing there")
                return descriptor
            holder = os.pread(descriptor, LARGEST, 0)
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UsageError(f"is in use{_said_by(holder)}", where=str(output), hint="wait for it to end, or choose another -o") from None
        if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
        os.close(descriptor)  # its owner has just removed it: there is a newer one, or none


class Owner(NamedTuple):
    """What a lock file says of the process that made it; `runs` is None where that cannot be known from here."""

    pid: int
    host: str
    runs: bool | None


def owner_of(output: Path) -> Owner | None:
    """Return who writes to an output, or did when it was killed, without taking the lock; None if there is no lock file."""
    try:
        descriptor = os.open(lock_of(output), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        said = json.loads(os.pread(descriptor, LARGEST, 0))
        pid, host = int(said["pid"]), str(said["host"])
    except (ValueError, KeyError, TypeError, OSError):  # it is just being written
        pid, host = 0, ""
    try:
        held = _is_held(descriptor)
    finally:
        os.close(descriptor)
    here = host == platform.node()
    return Owner(pid, host, True if held else False if held is not None and here else None)


def _is_held(descriptor: int) -> bool | None:
    """Whether another process holds a lock; None where the system does not tell. On another host's disk a False may be wrong."""
    if sys.platform != "linux":
        return None
    flock = "hhqqi4x"  # struct flock of fcntl.h: type, whence, start, length, pid
    try:
        found = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    return struct.unpack(flock, found)[0] != fcntl.F_UNLCK


def _is_ours(descriptor: int) -> bool:
    """Whether a lock file is new, or one that a process of s2d has left."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > LARGEST:
        return False
    content = os.pread(descriptor, LARGEST, 0)
    return not content or _said_by(content) != OTHER


def _in_the_way(path: Path, output: Path) -> UsageError:
    return UsageError(f"{path.name}, the name of its lock, is taken by what s2d did not write", where=str(output), hint=f"move {path} away")


def _said_by(holder: bytes) -> str:
    try:
        owner = json.loads(holder)
        return f" by process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return OTHER
