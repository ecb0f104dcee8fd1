"""`s2d prepare` through its command line: problems, splits, exclusions, solutions, and what is refused."""

import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

TOY_TEACHER = Path(__file__).parents[2] / "examples" / "toy" / "teacher"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without quotes) "
    'where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after "Answer:".'
)
COLUMNS = ["id", "prompt", "answer", "problem_sha256", "source"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def prepare(s2d, tmp_path):
    """Run `s2d prepare` in the test's folder."""

    def run(*arguments, stdin=""):
        done = s2d("prepare", *arguments, stdin=stdin.encode(), cwd=tmp_path)
        return Done(done.code, done.out.decode(), done.err)

    return run


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def texts(path):
    return [row["prompt"][-1]["content"] for row in read(path)]


def toy_rows(count):
    return [{"problem": f"{i} + 1", "answer": str(i + 1)} for i in range(count)]


def test_gsm8k_rows_become_problems(prepare, tmp_path):
    write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "Six  ducks?", "answer": "Six <<6*2=12>>12.\n#### 1,012"}])
    done = prepare("gsm8k/test.jsonl", "-o", "out/problems.jsonl")
    assert (done.code, done.out) == (0, "")
    assert done.err == "1 rows, 0 duplicates removed\n1 problems to out/problems.jsonl\n"
    [row] = read(tmp_path / "out" / "problems.jsonl")
    content = row["prompt"][0]["content"]
    assert list(row) == COLUMNS
    assert content.startswith("Six  ducks?\n\n")
    assert "step by step" in content
    assert "\\boxed{}" in content
    assert row == {
        "id": sha256(content)[:16],
        "prompt": [{"role": "user", "content": content}],
        "answer": "1,012",
        "problem_sha256": sha256("Six ducks?"),
        "source": {"dataset": "gsm8k", "split": "test", "index": 0},
    }


def test_verl_and_dapo_rows_become_problems(prepare, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO.format(text), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "025", "style": "rule"},
            "extra_info": {"index": f"uuid-{i}"},
        }
        for i, text in enumerate(["What is $\\{5\\}^2$?", "Another?", "What is $\\{5\\}^2$?"])
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    done = prepare("dapo.parquet", "--template", "Q: {problem} {x}")
    first, second = map(json.loads, done.out.splitlines())
    assert first == {
        "id": "uuid-0",
        "prompt": [{"role": "user", "content": "Q: What is $\\{5\\}^2$? {x}"}],
        "answer": "025",
        "problem_sha256": sha256("What is $\\{5\\}^2$?"),
        "source": {"dataset": "math_dapo", "split": "", "index": 0},
    }
    assert second["id"] == "uuid-1"
    assert "3 rows, 1 duplicates removed" in done.err
    assert "2 problems taken out of DAPO's wrapper" in done.err


def test_system_messages_stay_before_the_templated_problem(prepare):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    row = {"prompt": chat, "reward_model": {"ground_truth": "2"}, "extra_info": {"split": "test", "index": 7}}
    done = prepare("-", "--template", "none", stdin=json.dumps(row))
    problem = json.loads(done.out)
    assert problem["prompt"] == chat
    assert problem["problem_sha256"] == sha256("1+1?")
    assert problem["source"] == {"dataset": "stdin", "split": "test", "index": 7}


def test_duplicates_are_found_by_normalised_text_and_the_first_answer_wins(prepare, tmp_path):
    rows = [
        {"problem": "Find \u00e9 of x\u00b2.", "answer": "1"},
        {"problem": " Find  e\u0301 of\nx\u00b2. ", "answer": "2"},
        {"problem": "Find \u00e9 of x\u00b2.", "answer": "1"},
        {"problem": "find \u00e9 of x\u00b2.", "answer": "3"},
    ]
    done = prepare(write(tmp_path / "a.jsonl", rows), "-q")
    assert [json.loads(line)["answer"] for line in done.out.splitlines()] == ["1", "3"]
    assert done.err == "warning: 1 problems come with different answers; the first one is kept\n"


def test_different_mathematics_is_no_duplicate(prepare, tmp_path):
    problems = ["2\u00b2 + 1", "22 + 1", "x\u2081 = 5", "x1 = 5", "\u00bd of 6", "1\u20442 of 6"]
    write(tmp_path / "a.jsonl", [{"problem": text, "answer": "1"} for text in problems])
    write(tmp_path / "eval.jsonl", [{"problem": text} for text in problems[::2]])
    done = prepare("a.jsonl", "--exclude", "eval.jsonl", "--template", "none", "-o", "b.jsonl")
    assert texts(tmp_path / "b.jsonl") == problems[1::2]
    assert "6 rows, 0 duplicates removed" in done.err


REWORDED = "Suppose that Ann had 17 apples and gave 5 of them to Bob, who had 3 apples before. How many apples has Bob now?"


@pytest.fixture
def reworded(prepare, tmp_path):
    """Three problems in a.jsonl; the second one reworded in eval.jsonl, and prepared with a prompt in prepared.jsonl."""
    rows = toy_rows(2)
    rows.insert(1, {"id": "apples", "problem": REWORDED, "answer": "8"})
    write(tmp_path / "a.jsonl", rows)
    other = "ANN had 17 apples and gave 5 of them to Bob, who had $3$ apples before. Find out how many apples Bob has now."
    write(tmp_path / "eval.jsonl", [{"id": "e1", "question": "2 + 2", "answer": "4"}, {"id": "e2", "question": other, "answer": "8"}])
    assert prepare("eval.jsonl", "-o", "prepared.jsonl").code == 0
    return rows


@pytest.mark.parametrize("exclude", ["eval.jsonl", "prepared.jsonl"])
def test_near_duplicates_of_excluded_problems_are_listed(prepare, tmp_path, reworded, exclude):
    done = prepare("a.jsonl", "--exclude", exclude, "-o", "b.jsonl", "--template", "none")
    assert texts(tmp_path / "b.jsonl") == [row["problem"] for row in reworded]
    assert "warning: 1 problems are near-duplicates of excluded ones; --exclude-near drops them\n" in done.err
    assert f"\n  'apples' (a.jsonl:2) resembles 'e2' ({exclude}:2): " in done.err
    assert "0 problems excluded" in done.err


def test_near_duplicates_are_dropped_on_request_also_of_prepared_problems(prepare, tmp_path, reworded):
    done = prepare("a.jsonl", "--exclude", "eval.jsonl", "--exclude-near", "-o", "b.jsonl", "--limit", 2)
    assert [row["answer"] for row in read(tmp_path / "b.jsonl")] == ["1", "2"]
    assert "1 near-duplicates of excluded problems dropped\n  'apples' (a.jsonl:2) resembles" in done.err
    assert prepare("a.jsonl", "-o", "c.jsonl").code == 0
    done = prepare("c.jsonl", "--exclude", "prepared.jsonl", "--exclude-near", "-o", "d.jsonl")
    assert [row["answer"] for row in read(tmp_path / "d.jsonl")] == ["1", "2"]  # the template that all share is no likeness


def test_given_ids_are_kept_where_they_are_unique(prepare, tmp_path):
    rows = [
        {"id": 60, "problem": "a", "answer": 204},
        {"unique_id": "test/algebra/1.json", "problem": "b", "answer": "1"},
        {"id": "x", "problem": "c", "answer": "1"},
        {"id": "x", "problem": "d", "answer": "1"},
        {"id": None, "problem": "e", "answer": "1"},
    ]
    write(tmp_path / "a.jsonl", rows)
    done = prepare("a.jsonl", "--template", "none")
    ids = [json.loads(line)["id"] for line in done.out.splitlines()]
    assert ids == ["60", "test/algebra/1.json", *(sha256(text)[:16] for text in "cde")]
    assert "2 problems share their id" in done.err


def test_prepared_problems_pass_through_unchanged(prepare, tmp_path):
    write(tmp_path / "a.jsonl", toy_rows(3))
    assert prepare("a.jsonl", "-o", "b.jsonl").code == 0
    done = prepare("b.jsonl", "-o", "c.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert "3 problems were prepared before" in done.err
    mixed = prepare("b.jsonl", "a.jsonl")  # the raw rows are duplicates of the prepared ones
    assert mixed.out == (tmp_path / "b.jsonl").read_text()


@pytest.mark.parametrize("exclude", ["raw.csv", "prepared.jsonl", "folder"])
def test_exclusion_is_by_the_bare_problem(prepare, tmp_path, exclude):
    write(tmp_path / "a.jsonl", [*toy_rows(6), toy_rows(6)[2]])
    (tmp_path / "raw.csv").write_text("question\n2  + 1\n4 + 1\n99 + 1\n")
    write(tmp_path / "two.jsonl", [toy_rows(6)[2], toy_rows(6)[4]])
    assert prepare("two.jsonl", "-o", "prepared.jsonl", "--template", "Another: {problem}").code == 0
    write(tmp_path / "folder" / "test.jsonl", [{"problem": "2 + 1"}])
    write(tmp_path / "folder" / "train.jsonl", [{"problem": "4 + 1"}])
    done = prepare("a.jsonl", "--exclude", exclude, "--template", "none", "-o", "out.jsonl")
    assert texts(tmp_path / "out.jsonl") == ["0 + 1", "1 + 1", "3 + 1", "5 + 1"]
    assert "7 rows, 1 duplicates removed" in done.err
    assert "2 problems excluded" in done.err


def test_split_by_shares_is_disjoint_complete_and_repeatable(prepare, tmp_path):
    rows = toy_rows(101)
    write(tmp_path / "a.jsonl", [*rows, *rows])  # split before de-duplication, a problem would fall into both halves
    write(tmp_path / "reversed.jsonl", rows[::-1])
    options = ("--template", "none", "--split", "1H=0.5,2H=0.5")
    for name, source, *more in (("x", "a.jsonl"), ("y", "reversed.jsonl"), ("z", "a.jsonl", "--seed", 1)):
        assert prepare(source, "-o", name, *options, *more).code == 0
    parts = {name: [texts(tmp_path / name / f"{part}.jsonl") for part in ("1H", "2H")] for name in "xyz"}
    first, second = parts["x"]
    assert (len(first), len(second)) == (50, 51)
    assert sorted(first + second) == sorted(row["problem"] for row in rows)
    assert [set(part) for part in parts["y"]] == [set(first), set(second)]
    assert set(parts["z"][0]) != set(first)
    assert first == sorted(first, key=lambda text: int(text.split()[0]))  # the order of the source


def test_split_by_counts_says_what_is_left_over(prepare, tmp_path):
    write(tmp_path / "a.jsonl", toy_rows(20))
    done = prepare("a.jsonl", "-o", "out", "--split", "1H=8,2H=8,validation=3")
    assert done.code == 0
    assert "1 problems are in no part of the split" in done.err
    parts = [texts(tmp_path / "out" / f"{name}.jsonl") for name in ("1H", "2H", "validation")]
    assert [len(part) for part in parts] == [8, 8, 3]
    assert len({text for part in parts for text in part}) == 19


def test_limit_counts_distinct_problems(prepare, tmp_path):
    write(tmp_path / "a.jsonl", [*toy_rows(2), *toy_rows(5)])
    done = prepare("a.jsonl", "--limit", 3, "--template", "none", "-o", "b.jsonl")
    assert texts(tmp_path / "b.jsonl") == ["0 + 1", "1 + 1", "2 + 1"]
    assert "5 rows, 2 duplicates removed" in done.err


def test_unlabelled_problems_have_an_empty_answer(prepare, tmp_path):
    write(tmp_path / "a.jsonl", [{"problem": "a", "answer": None}, {"problem": "b"}, {"problem": "c", "answer": "3"}])
    done = prepare("a.jsonl")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: a.jsonl:1: field 'answer' is empty")
    assert "--unlabelled" in done.err
    done = prepare("a.jsonl", "--unlabelled")
    assert [json.loads(line)["answer"] for line in done.out.splitlines()] == ["", "", "3"]
    assert "2 problems have no answer" in done.err


def test_worked_solutions_become_rollouts(prepare, tmp_path):
    rows = [
        {"problem": "7-1-5-6+4-5=", "answer": "4", "solution": "=6=1=5=9=4\n\\boxed{4}"},
        {"problem": "8-1-5-6+4-5=", "answer": "=<<8-1=7>>7=2=4=8=3\n#### 3"},
        {"problem": "9-1-5-6+4-5=", "answer": "2"},
    ]
    write(tmp_path / "a.jsonl", rows)
    outputs = ("-o", "problems", "--solutions", "gold", "--split", "1H=1.0")  # two folders with a 1H.jsonl each
    done = prepare("a.jsonl", "--template", "none", "--tokenizer", TOY_TEACHER, *outputs)
    assert done.code == 0, done.err
    assert "warning: 1 problems have no worked solution" in done.err
    problems, (first, second) = read(tmp_path / "problems" / "1H.jsonl"), read(tmp_path / "gold" / "1H.jsonl")
    assert first["completion"] == [{"role": "assistant", "content": "=6=1=5=9=4\n\\boxed{4}"}]
    assert second["completion"] == [{"role": "assistant", "content": "=7=2=4=8=3\n\\boxed{3}"}]
    # From the task's list of tokens: <|user|> 7 - 1 - 5 - 6 + 4 - 5 = <|assistant|>, and the end token 3.
    assert first["prompt_ids"] == [1, 20, 10, 14, 10, 18, 10, 19, 9, 17, 10, 18, 12, 2]
    assert first["completion_ids"] == [12, 19, 12, 14, 12, 18, 12, 22, 12, 17, 4, 6, 7, 17, 8, 3]
    for rollout, problem in zip((first, second), problems, strict=False):
        assert rollout["schema"] == "s2d.rollout/1"
        assert (rollout["problem_id"], rollout["group_id"], rollout["sample_index"]) == (problem["id"], problem["id"], 0)
        assert {key: rollout[key] for key in ("prompt", "answer", "problem_sha256", "source")} == {
            key: problem[key] for key in ("prompt", "answer", "problem_sha256", "source")
        }
        assert rollout["completion_logprobs"] == [0.0] * len(rollout["completion_ids"])
        assert (rollout["sampler"]["engine"], rollout["sampler"]["logprobs_mode"]) == ("gold", "none")
    assert list(first) == list(second)


def test_worked_solutions_end_where_the_model_stops(prepare, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TOY_TEACHER, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|user|>{% endfor %}<|im_end|>")
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    write(tmp_path / "a.jsonl", [{"problem": "7-1=", "answer": "6", "solution": "=6\n\\boxed{6}"}])
    done = prepare("a.jsonl", "-o", "p.jsonl", "--template", "none", "--solutions", "gold.jsonl", "--tokenizer", "model")
    assert done.code == 0, done.err
    assert read(tmp_path / "gold.jsonl")[0]["completion_ids"][-1] == 1  # <|user|>; the tokenizer's EOS is 3


def test_datasets_gives_the_strings_back(prepare, tmp_path):
    from datasets import load_dataset

    numbers = [{"id": 1, "problem": "a", "answer": 5}, {"id": "007", "problem": "b", "answer": "025"}]
    write(tmp_path / "a.jsonl", [*numbers, {"problem": "c", "answer": "2024-01-01"}, *toy_rows(300)])
    assert prepare("a.jsonl", "-o", "p.jsonl", "--template", "none").code == 0
    loaded = load_dataset("json", data_files=str(tmp_path / "p.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == read(tmp_path / "p.jsonl")
    assert loaded[1]["answer"] == "025"


def test_existing_outputs_are_refused_before_anything_is_read(prepare, tmp_path):
    write(tmp_path / "a.jsonl", toy_rows(4))
    (tmp_path / "b.jsonl").write_text("precious")
    done = prepare("a.jsonl", "-o", "b.jsonl")
    assert (done.code, (tmp_path / "b.jsonl").read_text()) == (2, "precious")
    assert "--overwrite" in done.err
    assert prepare("a.jsonl", "-o", "b.jsonl", "--overwrite").code == 0
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "2H.jsonl").write_text("precious")
    done = prepare("a.jsonl", "-o", "parts", "--split", "1H=0.5,2H=0.5")
    assert done.code == 2
    assert "parts/2H.jsonl: output exists" in done.err
    assert os.listdir(tmp_path / "parts") == ["2H.jsonl"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--split", "1H=0.5,2H=0.5"], "--split writes one file for each part"),
        (["--split", "1H=0.5,2H=0.6", "-o", "d"], "add up to 1.1"),
        (["--split", "1H=0.5,2H=6", "-o", "d"], "mixes shares and counts"),
        (["--split", "1H=0.5,1h=0.5", "-o", "d"], "names a part twice"),
        (["--split", "../x=0.5", "-o", "d"], "is not NAME=SHARE"),
        (["--split", "1H=half", "-o", "d"], "neither a share nor a count"),
        (["--split", "1H=5", "-o", "d"], "asks for 5 problems, there are 4"),
        (["--split", "1H=0.9,2H=0.1", "-o", "d"], "leaves nothing for 2H"),
        (["--split", "1H=1,2H=1", "-o", "a.jsonl", "--overwrite"], "is a file, but --split needs a folder"),
        (["--template", "no place"], "--template has no {problem}"),
        (["--solutions", "s.jsonl"], "--solutions needs --tokenizer"),
        (["--solutions", "-", "--tokenizer", "x"], "same place"),
        (["--solutions", "-", "-o", "/dev/stdout", "--tokenizer", "x"], "same place"),
        (["--source-split", "test"], "--source-split chooses within a folder"),
        (["--exclude-near"], "--exclude-near needs --exclude"),
    ],
)
def test_impossible_options_are_usage_errors(prepare, tmp_path, options, says):
    write(tmp_path / "a.jsonl", toy_rows(4))
    done = prepare("a.jsonl", *options)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert len(done.err.splitlines()) <= 2  # the counts, and one line of error
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"qestion": "a", "answer": "1"}, "a.jsonl:2: no field 'question' (did you mean 'qestion'?)"),
        ({"question": "a", "anser": "1"}, "a.jsonl:2: no field 'answer' (did you mean 'anser'?)"),
        ({"problem": "a", "prompt": None, "answer": ["1", "2"]}, "a.jsonl:2: field 'answer' is a list"),
        ({"prompt": "a", "answer": "1", "completion_ids": [1]}, "a.jsonl:2: this is a rollout"),
        ({"prompt": "a", "answer": "1", "problem_sha256": "0", "source": {}}, "a.jsonl:2: no field 'id'"),
        ({"problem": 5, "answer": "1"}, "a.jsonl:2: field 'problem' is an integer, text"),
        ({"problem": "a", "answer": float("inf")}, "a.jsonl:2: field 'answer' is not a finite number"),
        ({"problem": "a", "reward_model": {"ground_truth": [1, 2]}}, "a.jsonl:2: field 'reward_model.ground_truth' is a list"),
    ],
)
def test_bad_rows_are_named(prepare, tmp_path, row, says):
    write(tmp_path / "a.jsonl", [*toy_rows(1), row])
    done = prepare("a.jsonl", "-o", "b.jsonl")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {says}")
    assert not (tmp_path / "b.jsonl").exists()


def test_nothing_left_is_an_error(prepare, tmp_path):
    write(tmp_path / "a.jsonl", toy_rows(2))
    done = prepare("a.jsonl", "--exclude", "a.jsonl", "-o", "b.jsonl")
    assert done.code == 1
    assert "no problems are left" in done.err
    (tmp_path / "empty.jsonl").write_text("")
    assert prepare("empty.jsonl").code == 1


def ask_hub(tmp_path, endpoint, source, offline="0"):
    """Run `s2d prepare SOURCE` with a hub at `endpoint` and an empty cache."""
    command = [sys.executable, "-m", "s2dcli", "prepare", source]
    env = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_out_of_reach_is_asked_once(tmp_path, offline):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = ask_hub(tmp_path, endpoint, "gsm8k", offline)
    assert (done.returncode, done.stdout) == (1, "")
    asking, error = done.stderr.splitlines()  # no line of the hub's library, which tries six times in 23 seconds
    assert asking == "asking the hub for openai/gsm8k (there is no such file or folder here)"
    assert error.startswith("error: openai/gsm8k: no such file or folder here, and ")
    assert "the hub cannot be reached (" in error


def test_what_the_hub_does_not_have_is_one_line(tmp_path):
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        done = ask_hub(tmp_path, f"http://127.0.0.1:{hub.server_port}", "someone/tpyo")
        hub.shutdown()
    assert done.returncode == 1
    assert [path for path in asked if "someone" in path] == ["/api/datasets/someone/tpyo"]
    assert done.stderr.splitlines()[1:] == [
        "error: someone/tpyo: no such file or folder here, and no such data set on the hub; HF_TOKEN gives access to private ones"
    ]


@pytest.mark.parametrize("name", ["typo", "./someone/typo", "a/b/c", "none/"])
def test_what_is_no_hub_id_is_not_asked_for(prepare, tmp_path, name):
    write(tmp_path / "a.jsonl", toy_rows(1))
    for arguments in ([name], ["a.jsonl", "--exclude", name]):
        done = prepare(*arguments)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(f"error: {name}: no such file or folder")
        assert len(done.err.splitlines()) == 1


def test_closed_standard_input_is_a_usage_error(tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m s2dcli prepare <&-"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: standard input is closed: pipe problems into this command or name a file\n"


def test_outputs_that_are_streams_and_one_that_is_not(prepare, tmp_path):
    write(tmp_path / "a.jsonl", toy_rows(1))
    expected = prepare("a.jsonl").out
    assert prepare("a.jsonl", "-o", "/dev/stdout").out == expected
    assert prepare("a.jsonl", "-o", "/dev/null")[:2] == (0, "")
    assert prepare("a.jsonl", "-o", "./-")[:2] == (0, "")
    assert (tmp_path / "-").read_text() == expected
    assert prepare("a.jsonl", "-o", "./-").code == 2  # it exists


def test_a_closed_pipe_is_no_failure(tmp_path):
    write(tmp_path / "a.jsonl", toy_rows(5000))
    command = f"set -o pipefail; {sys.executable} -m s2dcli prepare a.jsonl -q | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["answer"] == "1"
