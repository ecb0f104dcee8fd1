"""Lines in and out."""

import json
import math

import pytest

from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl


def test_lines_are_split_at_newlines_only_and_numbered(tmp_path):
    path = tmp_path / "odd.jsonl"
    rows = [{"text": "a\u2028b\u0085c\rd"}, {"text": "\x00"}, {"text": "x" * 1_000_000}]
    path.write_bytes("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    found = list(jsonl.read(path, "rows"))
    assert [line.record for line in found] == rows
    assert [line.where for line in found] == [f"{path}:1", f"{path}:3", f"{path}:5"]


@pytest.mark.parametrize("text", ['{"a": 1', "[1]", "3", '{"a": ' + "9" * 5000 + "}", "[" * 100_000, "\xff"])
def test_what_is_no_object_is_an_error_with_its_line(tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n' + text.encode("latin-1"))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        list(jsonl.read(path, "rows"))


def test_output_is_ascii_and_never_nan():
    assert jsonl.dumps({"text": "\u2028\ud800é"}) == b'{"text": "\\u2028\\ud800\\u00e9"}\n'
    with pytest.raises(ValueError, match="JSON"):
        jsonl.dumps({"value": math.nan})


def test_existing_output_is_refused_and_folders_are_no_files(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(UsageError, match="output exists"), jsonl.open_output(path):
        pass
    assert path.read_text() == "precious"
    with jsonl.open_output(path, overwrite=True) as writer:
        writer.write({"a": 1})
    assert path.read_text() == '{"a": 1}\n'
    with pytest.raises(DataError, match="is a folder"):
        list(jsonl.read(tmp_path, "rows"))
