"""Benchmarks by name: which data set they are, and local copies in the columns of the hub's.

There is no hub here. What is tested is what is asked of it, and that rows of each data set's form become its problems.
"""

import json

import pytest
from conftest import write_jsonl

from s2dcli.datasets import benchmarks, sources
from s2dcli.datasets.benchmarks import BENCHMARKS, read_benchmark
from s2dcli.errors import DataError

# A row of each data set, in its columns
ROWS = {
    "gsm8k": ({"question": "How many?", "answer": "Two <<1+1=2>> eggs.\n#### 1,200"}, "1,200"),
    "math500": (
        {"problem": "Sum?", "solution": "so \\boxed{\\frac{1}{2}}", "answer": "\\frac{1}{2}", "unique_id": "test/a/1.json"},
        "\\frac{1}{2}",
    ),
    "aime24": ({"id": 60, "problem": "Walk?", "solution": "...", "answer": "025", "url": "u", "year": "2024"}, "025"),
    "aime25": ({"problem": "Bases?", "answer": "70", "id": "0"}, "70"),
    "amc23": ({"id": 0, "answer": "27.0", "url": "u", "question": "Cities?"}, "27.0"),
    "minerva": ({"question": "Period?", "answer": "5.6"}, "5.6"),
    "olympiadbench": ({"id": 1606, "question": "Find T.", "solution": ["s"], "final_answer": ["2", "3"], "unit": None}, "2, 3"),
}


def test_every_benchmark_has_a_row_here():
    assert ROWS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_copy_is_read_under_the_hub_id(name, tmp_path, capsys):
    row, answer = ROWS[name]
    field = "problem" if "problem" in row else "question"
    path = write_jsonl(tmp_path / "copy.jsonl", [row, {**row, field: "Another?", "id": "other", "unique_id": "other"}])
    first, second = read_benchmark(name, str(path))
    known = BENCHMARKS[name]
    assert (first.answer, first.source) == (answer, {"dataset": known.hub_id, "split": known.split, "index": 0})
    assert first.prompt[0]["content"].startswith(row[field])
    assert first.prompt[0]["content"].endswith("\\boxed{}.")
    assert second.source["index"] == 1
    assert f"{name}: 2 problems, {known.problems} were expected" in capsys.readouterr().err


def test_of_a_folder_the_benchmarks_split_is_read(tmp_path, capsys):
    row, _ = ROWS["gsm8k"]
    for split in ("train", "test"):
        (tmp_path / "main").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "main" / f"{split}.jsonl", [{**row, "question": f"Of {split}?"}])
        (tmp_path / "socratic").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "socratic" / f"{split}.jsonl", [{**row, "question": "Socratic?"}])
    (problem,) = read_benchmark("gsm8k", str(tmp_path))
    assert problem.prompt[0]["content"].startswith("Of test?")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_is_asked_for_this_subset_and_split(name, monkeypatch):
    asked = []

    def read(source, *, subset, split):
        asked.append((source, subset, split))
        yield benchmarks.Row("row 1", ROWS[name][0], source, split, 0)

    monkeypatch.setattr(sources, "read", read)
    (problem,) = read_benchmark(name)
    known = BENCHMARKS[name]
    assert asked == [(known.hub_id, known.subset, known.split)]
    assert problem.source["dataset"] == known.hub_id


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_benchmark("gsm8k", str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="holds no problems"):
        read_benchmark("gsm8k", str(write_jsonl(tmp_path / "empty.jsonl", [])))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "No answer?"}))
    with pytest.raises(DataError, match="no answer"):
        read_benchmark("gsm8k", str(tmp_path / "bad.jsonl"))
