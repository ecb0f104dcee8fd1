"""Lines in and out."""

import gzip
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

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


def write_zstd(path, content):
    import pyarrow

    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(content)


@pytest.mark.parametrize("write", [lambda path, content: path.write_bytes(gzip.compress(content)), write_zstd], ids=["gzip", "zstd"])
def test_compressed_files_are_read_whatever_their_name(tmp_path, write):
    rows = [{"a": "x" * 100_000}, {"a": 2}]
    path = tmp_path / "rows.jsonl.z"
    write(path, b"".join(map(jsonl.dumps, rows)))
    assert [line.record for line in jsonl.read(path, "rows")] == rows
    with jsonl.open_input(path, "rows") as stream:
        lines = jsonl.RawLines(stream, "rows")
        assert lines.ready()
        assert [json.loads(raw) for _, raw in lines] == rows
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"rows\.jsonl\.z: the compressed file is damaged or cut short"):
        list(jsonl.read(path, "rows"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": "é"}\n{}\n'.encode("utf-16"), "is UTF-16 text, JSON lines were expected; iconv -f UTF-16 -t UTF-8 "),
        ('{"a": "é"}\n{}\n'.encode("utf-16-le"), "is UTF-16 text, JSON lines were expected; iconv -f UTF-16 -t UTF-8 "),
        (b'[\n{"a": 1},\n{"a": 2}\n]\n', r"is a JSON array, JSON lines were expected; jq -c '\.\[\]' "),
        (b'[{"a": 1}, {"a": 2}]', r"is a JSON array, JSON lines were expected; jq -c '\.\[\]' "),
        (b"completion,answer\na,1\n", "is CSV, JSON lines were expected; python -c 'import csv"),
        (b"Question\tAnswer\na\t1\n", "is TSV, JSON lines were expected; python -c 'import csv"),
        (b"PAR1\x15\x04", "is a parquet file, JSON lines were expected; python -c 'import datasets"),
    ],
    ids=["UTF-16 with BOM", "UTF-16 without BOM", "array over lines", "array on one line", "CSV", "TSV", "parquet"],
)
def test_other_formats_are_named_with_the_command_that_converts_them(tmp_path, content, says):
    path = tmp_path / "rows.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: {says}"):
        list(jsonl.read(path, "rows"))
    with path.open("rb") as stream, pytest.raises(DataError, match=f"^x: {says}"):
        list(jsonl.RawLines(stream, "x"))


def test_tables_convert_by_the_command_of_their_error(tmp_path):
    for name, text in (("a.csv", 'x,y\n1,"a,b"\n'), ("a.tsv", "x\ty\n1\ta,b\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as caught:
            list(jsonl.read(tmp_path / name, "rows"))
        subprocess.run(caught.value.hint.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
        assert [line.record for line in jsonl.read(tmp_path / "rows.jsonl", "rows")] == [{"x": "1", "y": "a,b"}]


def test_lines_that_are_not_json_at_the_start_are_no_table(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'INFO, loading the model\n{"a": 1}\n')
    with path.open("rb") as stream:
        assert [raw for _, raw in jsonl.RawLines(stream, "x")] == [b"INFO, loading the model", b'{"a": 1}']


def test_streams_and_a_file_named_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [jsonl.is_stream(path) for path in ("-", "/dev/stdin", "/dev/stdout", "./-", Path("-"), "x")] == [True] * 3 + [False] * 3
    with jsonl.open_output("./-") as writer:
        writer.write({"a": 1})
    assert (tmp_path / "-").read_text() == '{"a": 1}\n'


def test_devices_and_fifos_are_written_to(tmp_path):
    with jsonl.open_output(os.devnull) as writer:
        writer.write({"a": 1})
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    found = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()))
    reader.start()
    with jsonl.open_output(fifo) as writer:
        writer.write({"a": 1})
    reader.join(10)
    assert found == [b'{"a": 1}\n']


def test_closed_standard_input_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed: pipe rows into this command or name a file"):
        list(jsonl.read("-", "rows"))
