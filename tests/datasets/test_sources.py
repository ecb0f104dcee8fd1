"""Raw rows of every layout, and what is found in them."""

import ast
import gzip
import json
from pathlib import Path

import pytest

from s2dcli.datasets import columns, sources
from s2dcli.datasets.columns import Gold
from s2dcli.errors import DataError

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: {form} "
    'where $Answer is the answer to the problem.\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1}, no: $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\begin{pmatrix} 1 \\{2} \end{pmatrix}}", r"\begin{pmatrix} 1 \\{2} \end{pmatrix}"),
        (r"is $\boxed 0.5$.", "0.5"),
        (r"is \fbox{3}", "3"),
        (r"is \boxed {4}", "4"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"\boxedtext{7}", None),
        ("no box at all {8}", None),
    ],
)
def test_last_boxed_is_balanced(text, boxed):
    assert columns.last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("record", "gold"),
    [
        # GSM8K: what follows ####, thousands separators as they are, calculator annotations removed
        ({"answer": "He has 500*2=$<<500*2=1000>>1000.\n#### 1,000"}, Gold("1,000", "He has 500*2=$1000.")),
        # MATH-500: its answer, and its solution as it is
        ({"answer": r"\frac12", "solution": r"Thus $\boxed{\frac12}.$"}, Gold(r"\frac12", r"Thus $\boxed{\frac12}.$")),
        # MATH: the last box
        ({"solution": r"First $\boxed{1}$, then $\boxed{x^{2}}$."}, Gold("x^{2}", r"First $\boxed{1}$, then $\boxed{x^{2}}$.")),
        # a solution that is the bare answer
        ({"solution": "34"}, Gold("34", "")),
        ({"reward_model": {"ground_truth": "34", "style": "rule"}, "solution": "34"}, Gold("34", "")),
        # AIME: leading zeros stay, whole numbers become text
        ({"answer": "025"}, Gold("025", "")),
        ({"Answer": 25, "Solution": "x\n\\boxed{025}"}, Gold("25", "x\n\\boxed{025}")),
        ({"answer": 25.0}, Gold("25", "")),
        ({"answer": 0.1}, Gold("0.1", "")),
        # verl, with and without a competing column
        ({"reward_model": {"ground_truth": "-7", "style": "rule"}}, Gold("-7", "")),
        ({"answer": "8", "reward_model": {"ground_truth": "-7"}}, Gold("8", "")),
        ({"answer": None, "reward_model": {"ground_truth": 7}}, Gold("7", "")),
        # others
        ({"ground_truth": " 3 "}, Gold("3", "")),
        ({"final_answer": ["$2$"]}, Gold("$2$", "")),
        ({"expected_answer": "4", "answer": ""}, Gold("4", "")),
        ({"answer": r"$\boxed{5}$"}, Gold("5", "")),
        ({"answer": "Step.\nSo \\boxed{5}"}, Gold("5", "Step.\nSo \\boxed{5}")),
        # a markdown heading is no gold
        ({"answer": "6", "solution": "#### Step 1\nso \\boxed{6}\nas was asked"}, Gold("6", "#### Step 1\nso \\boxed{6}\nas was asked")),
    ],
)
def test_gold_of_each_layout(record, gold):
    assert columns.gold(record, "row") == gold


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "q"}, "no answer: no field 'answer'"),
        ({"question": "q", "anwser": "1"}, r"no field 'answer' \(did you mean 'anwser'\?\)"),
        ({"answer": None}, "field 'answer' is empty"),
        ({"answer": float("nan")}, "field 'answer' is empty"),
        ({"answer": True}, "field 'answer' is true or false"),
        ({"answer": ["1", "2"]}, "field 'answer' is a list"),
        ({"solution": "We add.\nWe subtract."}, r"no answer: field 'solution' has neither \\boxed"),
    ],
)
def test_rows_without_gold_are_refused(record, says):
    with pytest.raises(DataError, match=f"^file:3: {says}"):
        columns.gold(record, "file:3")


def test_gold_is_not_required_of_unlabelled_rows():
    assert columns.gold({"question": "q"}, "row", required=False) == Gold("", "")
    with pytest.raises(DataError):
        columns.gold({"answer": {}}, "row", required=False)


@pytest.mark.parametrize("form", ["$Answer (without quotes)", r"\boxed{$Answer} (without quotes)", r"\boxed{$Answer}"])
def test_dapo_wrapper_is_removed_by_exact_match(form):
    wrapped = WRAPPED.replace("{form}", form).replace("{problem}", "What is {1} + 1?")
    assert columns.question({"prompt": [{"role": "user", "content": wrapped}]}, "row") == ("What is {1} + 1?", [], True)
    for other in (wrapped + " ", " " + wrapped, wrapped.replace("Remember", "remember")):
        text, _, unwrapped = columns.question({"problem": other}, "row")
        assert (text, unwrapped) == (other.strip(), False)


def test_system_messages_go_before_the_bare_problem():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?", "name": None}]
    assert columns.question({"prompt": chat}, "row") == ("1+1?", [{"role": "system", "content": "Be brief."}], False)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "one user message"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "one user message"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "one user message"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "one user message with text"),
        ({"prompt": [{"role": "user", "content": " "}]}, "empty user message"),
        ({"prompt": 5}, "field 'prompt' is an integer"),
        ({"problem": ""}, "field 'problem' is empty"),
        ({"qestion": "q", "answer": "1"}, r"no field 'question' \(did you mean 'qestion'\?\)"),
        ({"text": "q", "label": "1"}, "no problem text: no field 'prompt', 'problem' or 'question'"),
    ],
)
def test_rows_without_a_problem_are_refused(record, says):
    with pytest.raises(DataError, match=f"^file:3: .*{says}"):
        columns.question(record, "file:3")


def rows_of(source, **options):
    return [(row.where, row.record["question"], row.dataset, row.split, row.index) for row in sources.read(str(source), **options)]


def test_files_of_each_kind_give_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    records = [{"question": 'a, "b"\nc', "answer": "025"}, {"question": "d", "answer": "1"}]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "tags": ["x"], "data": records}))
    (tmp_path / "f.csv").write_bytes(b'\xef\xbb\xbfquestion,answer\r\n"a, ""b""\nc",025\r\nd,1\r\n')
    (tmp_path / "f.tsv").write_bytes(b'question\tanswer\r\n"a, ""b""\nc"\t025\r\nd\t1\r\n')
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "f.parquet")
    for name in ("f.jsonl", "list.json", "f.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    with pyarrow.output_stream(str(tmp_path / "f.jsonl.zst"), compression="zstd") as stream:
        stream.write((tmp_path / "f.jsonl").read_bytes())
    plain = ("f.jsonl", "lines.json", "list.json", "object.json", "f.csv", "f.tsv", "f.parquet")
    for name in (*plain, "f.jsonl.gz", "f.jsonl.zst", "list.json.gz", "f.csv.gz"):
        rows = list(sources.read(str(tmp_path / name)))
        assert [row.record for row in rows] == records, name
        assert rows[1].where == str(tmp_path / name) + (":2" if name.startswith(("f.jsonl", "lines.json")) else " row 2")
        assert [(row.dataset, row.split, row.index) for row in rows] == [(name.split(".")[0], "", 0), (name.split(".")[0], "", 1)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"question": 1}', "not JSON"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 2}]}', "several lists of objects: train, test"),
        ("a.json", b'"text"', "a list of objects was expected"),
        ("a.json", b"[1]", "a.json row 1: a JSON object was expected"),
        ("a.csv", b"question,answer\nonly one\n", "a.csv row 1: has not the 2 fields"),
        ("a.csv", b"question,answer\n\xff,1\n", "not CSV in UTF-8"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        ("a.jsonl", b'{"question": 1}\n{"quest', r"a\.jsonl:2: not a line of JSON"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(sources.read(str(tmp_path / name)))


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files with one row each, named after the file, and returns their folder."""

    def write(*names, card=""):
        root = tmp_path / "set"
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"question": name}) + "\n")
        (root / "README.md").write_text(card)
        (root / ".git").mkdir()
        (root / ".git" / "x.jsonl").write_text("no data")
        (root / "dataset_infos.json").write_text("{}")
        return root

    return write


def test_folder_with_one_split_is_read_whole(folder):
    root = folder("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl")
    assert [row[1:] for row in rows_of(root)] == [
        ("data/train-00000-of-00002.jsonl", "set", "train", 0),
        ("data/train-00001-of-00002.jsonl", "set", "train", 0),
    ]


def test_compressed_files_of_a_folder_are_named_after_their_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"question": split}).encode()))
    assert [row[1:4] for row in rows_of(tmp_path, split="test")] == [("test", tmp_path.name, "test")]
    assert [row[1:4] for row in rows_of(tmp_path / "test.jsonl.gz")] == [("test", tmp_path.name, "test")]


def test_folder_with_one_file_of_any_name_is_its_train_split(folder):
    assert [row[3] for row in rows_of(folder("data/dapo-math-17k.jsonl"), split="train")] == ["train"]


def test_several_splits_must_be_chosen_from(folder):
    root = folder("train.jsonl", "test.jsonl", "val.jsonl")
    with pytest.raises(DataError, match=r"holds several splits: test, train, validation; choose one with --source-split"):
        rows_of(root)
    assert [row[1] for row in rows_of(root, split="validation")] == ["val.jsonl"]
    with pytest.raises(DataError, match=r"no split 'tset' \(did you mean 'test'\?\); there are: test, train, validation"):
        rows_of(root, split="tset")
    assert sorted(row[1] for row in rows_of(root, every_split=True)) == ["test.jsonl", "train.jsonl", "val.jsonl"]


def test_several_subsets_must_be_chosen_from(folder):
    root = folder("main/train-00000-of-00001.jsonl", "main/test-00000-of-00001.jsonl", "socratic/test-00000-of-00001.jsonl")
    with pytest.raises(DataError, match="holds several subsets: main, socratic; choose one with --subset main"):
        rows_of(root, split="test")
    assert [row[1] for row in rows_of(root, subset="main", split="test")] == ["main/test-00000-of-00001.jsonl"]


def test_the_card_of_a_data_set_declares_its_files(folder):
    card = """---
configs:
- config_name: I
  data_files:
  - split: test
    path: aime-I.jsonl
- config_name: II
  data_files: "aime-II.*"
---
# A data set
"""
    root = folder("aime-I.jsonl", "aime-II.jsonl", "notes.jsonl", card=card)
    assert [row[1:4] for row in rows_of(root, subset="I")] == [("aime-I.jsonl", "set", "test")]
    assert [row[1:4] for row in rows_of(root, subset="II")] == [("aime-II.jsonl", "set", "train")]
    assert len(rows_of(root, every_split=True)) == 2


def test_empty_folders_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match="no JSONL, JSON, parquet or CSV file"):
        list(sources.read(str(tmp_path)))
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean 'gsm8k'\?\)"):
        list(sources.read("gsm9k"))
    with pytest.raises(DataError, match="cannot read problems: No such file"):
        list(sources.read(str(tmp_path / "none.jsonl")))


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the hub: note what is asked for, and serve two splits of two rows."""
    import datasets

    asked = []

    def load_dataset(name, subset=None):
        asked.append((name, subset))
        rows = [{"question": f"{subset} {i}", "answer": "1", "other": "x"} for i in range(2)]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "asked", "split"),
    [
        ("gsm8k", [("openai/gsm8k", "main")], "train"),
        ("HuggingFaceH4/MATH-500", [("HuggingFaceH4/MATH-500", None)], "test"),
        ("aime-2024", [("HuggingFaceH4/aime_2024", None)], "train"),
        ("opencompass/AIME2025", [("opencompass/AIME2025", "AIME2025-I"), ("opencompass/AIME2025", "AIME2025-II")], "test"),
        ("BytedTsinghua-SIA/DAPO-Math-17k", [("BytedTsinghua-SIA/DAPO-Math-17k", None)], "train"),
    ],
)
def test_known_hub_data_sets_carry_their_subset_and_split(hub, tmp_path, monkeypatch, source, asked, split):
    monkeypatch.chdir(tmp_path)
    rows = list(sources.read(source))
    assert hub == asked
    assert {row.split for row in rows} == {split}
    assert rows[1].where == f"{asked[0][0]} {split} row 2"
    assert rows[1].record == {"question": f"{asked[0][1]} 1", "answer": "1"}  # other columns are not decoded


def test_unknown_hub_data_sets_need_a_split_where_there_are_several(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="someone/math: holds several splits: train, test; choose one with --source-split"):
        list(sources.read("someone/math"))
    assert len(list(sources.read("someone/math", subset="hard", split="test"))) == 2
    assert hub[-1] == ("someone/math", "hard")
    assert len(list(sources.read("gsm8k", every_split=True))) == 4


def test_columns_are_found_without_knowing_sources():
    tree = ast.parse(Path(columns.__file__).read_text())
    imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "s2dcli.datasets.sources" not in imports
