"""Data sets in the forms they are published in, read as rows: files, folders in hub layout, hub ids.

`read` yields raw rows with their place in the source; `columns.py` finds what they hold.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from s2dcli import console
from s2dcli.datasets.columns import Row, wanted
from s2dcli.errors import DataError, nearest
from s2dcli.files import jsonl

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_A_TIME = 2048  # of a parquet file or a hub data set: a few MB of Python objects
HUB_SECONDS = 10.0  # that the hub is given to say whether it has a data set, before only the local cache is tried

_SHARD = re.compile(r"^(?P<split>.+)-\d{5}-of-\d{5}$")
_SPLIT_WORD = re.compile(r"(?<![a-z0-9])(train|training|test|testing|validation|valid|val|dev)(?![a-z0-9])", re.IGNORECASE)
_SPLIT_NAMES = {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "dev": "validation"}
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$", re.ASCII)


class Kind(Enum):
    """What a SOURCE argument can be."""

    stdin = auto()
    file = auto()
    folder = auto()
    hub = auto()


class HubDefaults(NamedTuple):
    """What of a known hub data set is read unless the command line says otherwise."""

    subsets: tuple[str | None, ...]
    split: str


KNOWN_HUB_IDS = {
    "openai/gsm8k": HubDefaults(("main",), "train"),
    "HuggingFaceH4/MATH-500": HubDefaults((None,), "test"),
    "HuggingFaceH4/aime_2024": HubDefaults((None,), "train"),
    "Maxwell-Jia/AIME_2024": HubDefaults((None,), "train"),
    "math-ai/aime25": HubDefaults((None,), "test"),
    "opencompass/AIME2025": HubDefaults(("AIME2025-I", "AIME2025-II"), "test"),
    "BytedTsinghua-SIA/DAPO-Math-17k": HubDefaults((None,), "train"),
}
SHORT_NAMES = {
    "gsm8k": "openai/gsm8k",
    "math-500": "HuggingFaceH4/MATH-500",
    "aime-2024": "HuggingFaceH4/aime_2024",
    "aime-2025": "math-ai/aime25",
    "dapo-math-17k": "BytedTsinghua-SIA/DAPO-Math-17k",
}


def read(source: str, *, subset: str | None = None, split: str | None = None, every_split: bool = False) -> Iterator[Row]:
    """Yield the rows of a file, a folder in hub layout, a hub data set, or standard input for `-`.

    `subset` and `split` choose within a folder or a hub data set; with `every_split` those that
    are not chosen are all read, otherwise DataError lists them. Raises DataError on what cannot be read.
    """
    path = Path(source)
    match kind_of(source):
        case Kind.stdin:
            yield from _number(jsonl.read(source, "problems"), "stdin", "")
        case Kind.folder:
            yield from _read_folder(path, subset, split, every_split)
        case Kind.hub:
            yield from _read_hub(SHORT_NAMES.get(source.lower(), source), subset, split, every_split)
        case Kind.file:
            # Where a file is named after its split, its folder names the data set.
            stem = _uncompressed(path).stem
            dataset, name = (path.resolve().parent.name, stem) if _SPLIT_WORD.fullmatch(stem) else (stem, "")
            yield from _number(_read_file(path), dataset, name)


def kind_of(source: str) -> Kind:
    """Return what a SOURCE argument names. Raises DataError if it can be nothing at all."""
    path = Path(source)
    if jsonl.is_stream(source):
        return Kind.stdin
    if path.is_dir():
        return Kind.folder
    if path.exists() or _format(path) in _READERS:
        return Kind.file
    if source.lower() in SHORT_NAMES or _HUB_ID.match(source):
        return Kind.hub
    raise DataError(f"no such file or folder{nearest(source, SHORT_NAMES)}", where=source, hint="a hub data set is named OWNER/NAME")


def _uncompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path


def _format(path: Path) -> str:
    """Return what a file's name says of its format, compressed or not: `.jsonl` of `train.jsonl.gz`."""
    return _uncompressed(path).suffix.lower()


def _number(records: Iterable[tuple[str, dict]], dataset: str, split: str) -> Iterator[Row]:
    for index, (where, record) in enumerate(records):
        yield Row(where, record, dataset, split, index)


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    if path.is_file():
        with jsonl.open_input(path, "problems") as stream:
            if stream.read(24) == b"version https://git-lfs.":
                raise DataError("this is a Git LFS pointer, not the data", where=str(path), hint="fetch it with `git lfs pull`")
    return _READERS.get(_format(path), _read_jsonl)(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    return jsonl.read(path, "problems")


def _read_json(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the objects of a list, of the one list in an object, or of JSON lines under the wrong name."""
    with jsonl.open_input(path, "problems") as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except RecursionError:
        raise DataError("JSON nested deeper than the parser allows", where=str(path)) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip()[:1] == b"{":
            yield from jsonl.read(path, "problems")
            return
        raise DataError(f"not JSON ({error})", where=str(path)) from None
    except ValueError as error:
        raise DataError(f"not JSON ({error})", where=str(path)) from None
    if isinstance(value, dict):
        lists = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)}
        if len(lists) > 1:
            raise DataError(f"holds several lists of objects: {', '.join(lists)}", where=str(path), hint="keep one of them in the file")
        value = next(iter(lists.values()), None)
    if not isinstance(value, list):
        raise DataError("a list of objects was expected", where=str(path))
    for number, record in enumerate(value, 1):
        where = f"{path} row {number}"
        if not isinstance(record, dict):
            raise DataError(f"a JSON object was expected, this is a {type(record).__name__}", where=where)
        yield where, record


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)  # worked solutions outgrow the default of 128 KiB
    try:
        with jsonl.open_input(path, "problems") as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            for number, record in enumerate(reader, 1):
                where = f"{path} row {number}"
                if None in record or None in record.values():
                    raise DataError(f"has not the {len(reader.fieldnames or ())} fields of the header", where=where)
                yield where, record
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"not CSV in UTF-8 ({error})", where=str(path)) from None


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Without a read buffer, a column chunk (a million rows in one piece) is loaded as a whole.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            batches = file.iter_batches(ROWS_AT_A_TIME, columns=wanted(file.schema_arrow.names), use_threads=False)
            yield from _arrow_rows(batches, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file ({_first_line(error)})", where=str(path)) from None


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}


def _arrow_rows(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], name: str) -> Iterator[tuple[str, dict]]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{name} row {number}", record


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# Folders and hub data sets


def _read_folder(folder: Path, subset: str | None, split: str | None, every_split: bool) -> Iterator[Row]:
    """Read a folder in hub layout, such as a clone of a data set's repository."""
    layout = layout_of(folder)
    for subset_name in _choose("subset", "--subset", list(layout), subset, every_split, str(folder)):
        splits = layout[subset_name]
        for split_name in _choose("split", "--source-split", list(splits), split, every_split, str(folder)):
            for path in splits[split_name]:
                yield from _number(_read_file(path), folder.resolve().name, split_name)


def layout_of(folder: str | Path) -> dict[str, dict[str, list[Path]]]:
    """Return subset -> split -> files of a folder in hub layout. Raises DataError if it holds no file of data."""
    layout = _declared_layout(Path(folder)) or _found_layout(Path(folder))
    if not layout:
        raise DataError("no JSONL, JSON, parquet or CSV file in this folder", where=str(folder))
    return layout


def _choose(what: str, option: str, names: list[str], wanted: str | None, every: bool, where: str) -> list[str]:
    """Return the subset or split to read, or all of them with `every`. Raises DataError with the names to choose from."""
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"no {what} {wanted!r}{nearest(wanted, names)}", where=where, hint=f"there are: {', '.join(names)}")
        return [wanted]
    if len(names) > 1 and not every:
        raise DataError(f"holds several {what}s: {', '.join(names)}", where=where, hint=f"choose one with {option} {names[0]}")
    return names


def _declared_layout(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return subset -> split -> files as the data set card's front matter declares them; {} if it does not."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    import yaml

    parts = re.split(r"^---\s*$", card.read_text(encoding="utf-8", errors="replace"), maxsplit=2, flags=re.MULTILINE)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError as error:
        raise DataError(f"the front matter is not YAML ({_first_line(error)})", where=str(card)) from None
    layout: dict[str, dict[str, list[Path]]] = {}
    for config in (front.get("configs") or []) if isinstance(front, dict) else []:
        declared = config.get("data_files") or []
        splits: dict[str, list[Path]] = {}
        if isinstance(declared, dict):
            declared = [{"split": name, "path": patterns} for name, patterns in declared.items()]
        for entry in [declared] if isinstance(declared, str) else declared:
            name, patterns = (entry.get("split", "train"), entry.get("path", [])) if isinstance(entry, dict) else ("train", entry)
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                if not pattern.startswith("/") and "://" not in pattern:
                    splits.setdefault(name, []).extend(sorted(path for path in folder.glob(pattern) if _format(path) in _READERS))
        if files := {name: paths for name, paths in splits.items() if paths}:
            layout[config.get("config_name", "default")] = files
    return layout


def _found_layout(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return subset -> split -> files by the hub's naming rules: SUBSET/SPLIT-00000-of-00001.parquet, test.jsonl, ..."""
    layout: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_metadata = path.suffix == ".json" and path.stem in ("dataset_info", "dataset_infos", "dataset_dict", "state")
        if _format(path) not in _READERS or is_metadata or any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        *folders, split = [*parts[:-1], _uncompressed(path).stem]
        if shard := _SHARD.match(split):
            split = shard["split"]
        words = [match[1].lower() for name in (split, *reversed(folders)) if (match := _SPLIT_WORD.search(name))]
        if words:
            split = _SPLIT_NAMES.get(words[0], words[0])
        subset = "/".join(name for name in folders if name != "data" and not _SPLIT_WORD.fullmatch(name))
        layout.setdefault(subset or "default", {}).setdefault(split, []).append(path)
    for splits in layout.values():
        if len(splits) == 1 and not _SPLIT_WORD.fullmatch(next(iter(splits))):
            splits["train"] = splits.pop(next(iter(splits)))  # one file of any name is the data set, and the hub calls it train
    return layout


def _read_hub(name: str, subset: str | None, split: str | None, every_split: bool) -> Iterator[Row]:
    """Read a data set from the hub or its local cache. Code that a data set brings is never run."""
    console.info(f"asking the hub for {name} (there is no such file or folder here)")
    import datasets

    if not console.live_display():
        datasets.disable_progress_bars()
    defaults = KNOWN_HUB_IDS.get(name)
    subsets = (subset,) if subset is not None or defaults is None else defaults.subsets
    if split is None and defaults is not None and not every_split:
        split = defaults.split
    unreachable = _find_on_hub(name)
    for subset_name in subsets:
        try:
            splits = datasets.load_dataset(name, subset_name)
        except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
            reason = f"the hub cannot be reached ({unreachable}) and its cache does not hold it" if unreachable else _first_line(error)
            raise DataError(
                f"no such file or folder here, and as a hub data set it cannot be loaded: {reason}",
                where=name,
                hint="a folder or a file of the data set works without the network",
            ) from None
        for split_name in _choose("split", "--source-split", list(splits), split, every_split, name):
            data = splits[split_name]
            data = data.select_columns(wanted(data.column_names)).with_format("arrow")
            yield from _number(_arrow_rows(data.iter(ROWS_AT_A_TIME), f"{name} {split_name}"), name, split_name)


def _find_on_hub(name: str) -> str:
    """Ask once whether the hub has a data set: its library would try six times to reach it. Raises DataError if it has not.

    Returns "", or why the hub cannot be reached; then data sets are looked for in the local cache only.
    """
    import datasets
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise DataError(
            "no such file or folder here, and no such data set on the hub",
            where=name,
            hint="HF_TOKEN gives access to private ones",
        ) from None
    except Exception as error:  # the hub's client raises its own, requests' and httpx' errors alike
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return _first_line(error)
    return ""
