"""Teacher caches: a teacher's distributions at every completion token of a file of rollouts.

    CACHE/ shard-00000.safetensors ...  rows in the order of the rollouts, ragged:
             rows        uint8[...]       JSON: [[group_id, sample_index], ...] of its R rows
             sha256      uint8[R, 32]     of each row's prompt_ids and completion_ids
             offsets     int64[R + 1]     a row's S tokens are offsets[r] to offsets[r + 1]
             of --keep top-k    ids int32[S, K], logprobs float[S, K] in descending order, tails float32[S] (log of the
                                mass of all other ids), sampled float32[S] (log-prob of the completion's own token)
             of --keep sampled  sampled float[S]
             of --keep hidden   hidden float[S, E]: final hidden states
           head.safetensors               of --keep hidden: weight [V, E], bias [V] where there is one
           tokens.json                    the teacher's tokens in the order of their ids, null where an id has none
           meta.json                      written last: what is in here, and the hash of each file
           s2d.json                       the manifest

Log-probs are nats, normalised over the whole vocabulary. A row is found by its group and sample index, and is the
right one only if its ids have the same hash: rollouts may be graded, filtered and reordered, others are refused.
Rows are read from disk as they are asked for; no shard is ever held.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from s2dcli.errors import DataError
from s2dcli.files.atomic import disk_errors, sync, temporary
from s2dcli.files.manifest import HASHES, MANIFEST, file_sha256, read_json, require_complete, write_json
from s2dcli.files.output_folder import OutputFolder
from s2dcli.options import Keep, ValueType

META, HEAD, TOKENS = HASHES, "head.safetensors", "tokens.json"
SCHEMA = "s2d.teacher-cache/1"
SHARD_BYTES = 2 * 10**9  # of one shard at most, unless a single row is larger
FIGURES = "s2d"  # key of a shard's own figures in its safetensors metadata; one key only, as their order is not kept
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}

Columns = dict[str, np.ndarray]  # name of a tensor -> a row's or a shard's numbers, first by token


class CacheRow(Protocol):
    """What a row is known by."""

    group_id: str
    sample_index: int
    prompt_ids: np.ndarray
    completion_ids: np.ndarray


@dataclass(frozen=True)
class Meta:
    """`meta.json`: whose distributions these are and what is kept of them."""

    teacher: dict[str, Any]  # name, revision, step, weights_sha256, engine
    tokenizer_sha256: str
    vocabulary: int
    eos_ids: list[int]
    keep: Keep
    k: int  # ids of each token; 0 unless of top-k
    width: int  # of the hidden states; 0 unless of hidden
    dtype: ValueType
    compute_dtype: str  # in which the teacher computed
    temperature: float
    rows: int
    tokens: int
    mass: float  # mean probability of the ids that are kept; 1 of hidden states
    rounding: dict[str, float]  # mean and max change of a log-prob, in nats, by what the numbers are rounded to
    head: dict[str, Any]  # of hidden: scale, soft_cap, unused ids
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # bytes and sha256
    schema: str = SCHEMA


def layout(keep: Keep, k: int, width: int, dtype: ValueType) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return the type and the shape behind the tokens of each column."""
    value = np.dtype(dtype.value)
    if keep is Keep.sampled:
        return {"sampled": (value, ())}
    if keep is Keep.hidden:
        return {"hidden": (value, (width,))}
    beside = np.dtype(np.float32)
    return {"ids": (np.dtype(np.int32), (k,)), "logprobs": (value, (k,)), "tails": (beside, ()), "sampled": (beside, ())}


def bytes_per_token(keep: Keep, k: int, width: int, dtype: ValueType) -> int:
    return sum(kind.itemsize * int(np.prod(shape)) for kind, shape in layout(keep, k, width, dtype).values())


def portions(lengths: Sequence[int], most: int) -> list[slice]:
    """Cut rows of so many completion tokens, in order, into runs of `most` tokens; a longer row is a run of its own."""
    cuts, filled = [0], 0
    for index, length in enumerate(lengths):
        if filled and filled + length > most:
            cuts.append(index)
            filled = 0
        filled += length
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def ids_sha256(row: CacheRow) -> bytes:
    """Hash of a row's prompt and completion, told apart."""
    parts = (np.asarray(ids, dtype="<i4") for ids in (row.prompt_ids, row.completion_ids))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    return digest.digest()


class Shard(NamedTuple):
    """Where the tensors of a safetensors file are: (type, shape, first byte), and its figures."""

    path: Path
    tensors: dict[str, tuple[Any, tuple[int, ...], int]]
    figures: dict[str, float]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header. Raises DataError."""
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            figures = json.loads(header.pop("__metadata__", {}).get(FIGURES, "{}"))
            tensors = {
                name: (np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
                for name, entry in header.items()
            }
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
            raise DataError("is damaged: it has no safetensors header", where=str(path)) from None
        return cls(path, tensors, figures)

    def read(self, name: str, start: int = 0, end: int | None = None) -> np.ndarray:
        """Read a tensor, or the slice of it along its first dimension. Raises DataError."""
        kind, shape, offset = self.tensors[name]
        width = int(np.prod(shape[1:]))
        end = shape[0] if end is None else end
        with disk_errors("read", self.path):
            values = np.fromfile(self.path, kind, (end - start) * width, offset=offset + start * width * kind.itemsize)
        if len(values) != (end - start) * width:
            raise DataError("is cut short", where=str(self.path), hint="s2d score --overwrite makes the cache again")
        return values.reshape(end - start, *shape[1:])


class CacheFolder(OutputFolder):
    """A cache while it is written: shard by shard, of rows in a fixed plan, so that what is there after a kill is kept."""

    FILES: ClassVar[tuple[str, ...]] = (META, TOKENS, HEAD, "shard-*.safetensors")

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def write_shard(self, number: int, rows: Sequence[CacheRow], columns: Columns, figures: Mapping[str, float]) -> None:
        """Write the rows of one portion; `columns` hold their tokens one row after the other. Raises DataError."""
        lengths = [len(row.completion_ids) for row in rows]
        names = json.dumps([[row.group_id, row.sample_index] for row in rows]).encode()
        tensors = {
            "rows": np.frombuffer(names, np.uint8),
            "sha256": np.frombuffer(b"".join(map(ids_sha256, rows)), np.uint8).reshape(-1, 32),
            "offsets": np.cumsum([0, *lengths], dtype=np.int64),
            **columns,
        }
        self.write_tensors(self.shard(number), tensors, {FIGURES: json.dumps(dict(figures))})
        self.keep = True

    def write_tensors(self, path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, of arrays or of torch tensors, that appears when it is whole. Raises DataError."""
        if any(not isinstance(value, np.ndarray) for value in tensors.values()):
            from safetensors.torch import save_file
        else:
            from safetensors.numpy import save_file
        draft = temporary(path)
        with disk_errors("write", path):
            try:
                save_file(dict(tensors), draft, metadata=metadata)
                mask = os.umask(0)
                os.umask(mask)
                draft.chmod(0o666 & ~mask)  # safetensors makes them readable by their owner only
                sync(draft)
                os.replace(draft, path)
                sync(path.parent)
            finally:
                draft.unlink(missing_ok=True)

    def write_tokens(self, tokens: Sequence[str | None]) -> None:
        with disk_errors("write", self.folder / TOKENS):
            write_json(self.folder / TOKENS, {"tokens": list(tokens)})

    def shards(self) -> Iterator[Shard]:
        """Open the shards that are there, in order, up to the first that is missing."""
        for number in count():
            if not self.shard(number).is_file():
                return
            yield Shard.open(self.shard(number))

    def finish(self, meta: Meta, counts: Mapping[str, float]) -> None:
        """Write meta.json with the files' sizes and hashes, and put the cache in its place. Raises DataError."""
        paths = sorted({path for pattern in self.FILES for path in self.folder.glob(pattern)} - {self.folder / META})
        with disk_errors("write", self.folder):
            files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
            write_json(self.folder / META, asdict(replace(meta, files=files)))
            self.write_manifest(complete=True, counts=dict(counts))
            self.replace()

    def result(self) -> dict[str, Any]:
        """What the command prints at its end."""
        meta = read_json(self.folder / META)
        size = sum(file["bytes"] for file in meta["files"].values())
        told = ("keep", "k", "rows", "tokens", "mass", "rounding")
        return {
            "cache": str(self.out),
            **{name: meta[name] for name in told},
            "bytes": size,
            "bytes_per_token": size / max(1, meta["tokens"]),
        }


@dataclass
class TeacherCache:
    """A finished cache: every file is there and unchanged, and any row can be read."""

    folder: Path
    meta: Meta = field(init=False)

    def __post_init__(self) -> None:
        """Raises DataError for what is no cache, not finished, or damaged."""
        if not self.folder.is_dir():
            raise DataError("no such teacher cache", where=str(self.folder), hint="s2d score --model TEACHER ROLLOUTS -o CACHE makes one")
        require_complete(str(self.folder), self.folder / MANIFEST)
        if not (self.folder / META).is_file():
            raise DataError(f"is no teacher cache (no {META})", where=str(self.folder), hint="s2d score --model TEACHER ROLLOUTS -o CACHE")
        content = read_json(self.folder / META)
        try:
            self.meta = Meta(**{**content, "keep": Keep(content["keep"]), "dtype": ValueType(content["dtype"])})
            if self.meta.schema != SCHEMA:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(f"is not a teacher cache of this version of s2d ({SCHEMA})", where=str(self.folder / META)) from None
        self._require_whole()
        shards = (name for name in sorted(self.meta.files) if name.startswith("shard-"))
        self.shards = [Shard.open(self.folder / name) for name in shards]

    def _require_whole(self) -> None:
        hint = "copy it again, or s2d score --overwrite makes it again"
        for name, known in self.meta.files.items():
            path = self.folder / name
            if not path.is_file():
                raise DataError(f"lacks {name}", where=str(self.folder), hint=hint)
            if path.stat().st_size != known["bytes"]:
                raise DataError(f"is damaged: {path.stat().st_size} bytes, {known['bytes']} were written", where=str(path), hint=hint)
        for name, known in self.meta.files.items():
            if file_sha256(self.folder / name) != known["sha256"]:
                raise DataError("is damaged (another sha256 than when it was written)", where=str(self.folder / name), hint=hint)

    @property
    def tokens(self) -> dict[str, int]:
        """The teacher's tokens and their ids."""
        return {token: index for index, token in enumerate(read_json(self.folder / TOKENS)["tokens"]) if token is not None}

    def find(self, rows: Iterable[CacheRow]) -> dict[CacheRow, tuple[Shard, int]]:
        """Return the shard and the first token of each row. Raises DataError for rows that were not scored, or with other ids."""
        wanted = {(row.group_id, row.sample_index): row for row in rows}
        found: dict[CacheRow, tuple[Shard, int]] = {}
        for shard in self.shards:
            names, offsets = json.loads(shard.read("rows").tobytes()), shard.read("offsets")
            for (group_id, sample_index), digest, start in zip(names, shard.read("sha256"), offsets[:-1].tolist(), strict=True):
                row = wanted.get((group_id, sample_index))
                if row is None:
                    continue
                if digest.tobytes() != ids_sha256(row):
                    raise DataError(
                        f"the ids of sample {sample_index} of group {group_id!r} are others than those that were scored",
                        where=str(self.folder),
                        hint="s2d score makes a cache of these rollouts",
                    )
                found[row] = shard, start
        missing = [row for row in wanted.values() if row not in found]
        if missing:
            raise DataError(
                f"holds no scores of {len(missing)} of {len(wanted)} rollouts, the first is sample {missing[0].sample_index} of "
                f"group {missing[0].group_id!r}",
                where=str(self.folder),
                hint="it is a cache of other rollouts; s2d score makes one of these",
            )
        return found

    def read_ahead(self, place: tuple[Shard, int], length: int) -> None:
        """Ask the system for a row's numbers before they are read; where it cannot, reading waits for the disk."""
        shard, start = place
        with suppress(OSError, AttributeError), open(shard.path, "rb") as file:
            for name in layout(self.meta.keep, self.meta.k, self.meta.width, self.meta.dtype):
                kind, shape, offset = shard.tensors[name]
                size = int(np.prod(shape[1:])) * kind.itemsize
                os.posix_fadvise(file.fileno(), offset + start * size, length * size, os.POSIX_FADV_WILLNEED)

    def read(self, place: tuple[Shard, int], length: int, names: Iterable[str]) -> Columns:
        """Read columns of the `length` tokens of a row. Raises DataError."""
        shard, start = place
        return {name: shard.read(name, start, start + length) for name in names}
