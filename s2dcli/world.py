"""The processes that work on one command together. There is one: this is the form of a world of size one.

Whatever differs between processes asks here, and nowhere else: who writes, and what is added up over all of them.
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0."""
    return 0


def size() -> int:
    """How many processes there are."""
    return 1


def is_main() -> bool:
    """Whether this process writes what all of them have made: files, results, messages."""
    return rank() == 0


def broadcast(value: T) -> T:
    """Return the main process's value."""
    return value


def gather(value: T) -> list[T]:
    """Return the value of every process, in the order of their ranks."""
    return [value]


def total(value: T) -> T:
    """Return the sum of a number or tensor over all processes."""
    return value
