"""The supervised pool: what it survives, in which order it answers, and what is left of it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s2dcli.errors import UsageError
from s2dcli.grade import answer
from s2dcli.grade.pool import Grader, check_reward, parse_memory

ROOT = Path(__file__).parents[2]
KEYS = ["reward", "rewards", "label", "extracted", "verifier", "verify_error"]

FUNCTIONS = """
import os, signal, time

def judge(completion, answer, record):
    what = record.get("what")
    if what == "sleep":
        time.sleep(60)
    if what == "swallow":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if what == "hang":
        sum(range(10**13))  # one step of C code: no signal handler runs
    if what == "memory":
        bytearray(1 << 40)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "crash once":
        try:
            os.close(os.open(record["mark"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return 1.0
        os._exit(3)
    if what == "raise":
        raise KeyError("colour")
    if what == "none":
        return None
    if what == "nan":
        return float("nan")
    if what == "child":
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        open(record["mark"], "w").write("x")
        sum(range(10**13))
    return completion == answer

def half(completion, answer, record):
    return 0.5

def no_verdict(completion, answer, record):
    return None
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


def row(gold, found, **fields):
    return {"answer": gold, "completion": f"so \\boxed{{{found}}}", **fields}


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_verdicts_come_in_order_with_exactly_the_promised_keys(grader):
    rows = [row(str(n), str(n) if n % 3 else str(n + 1)) for n in range(500)]
    verdicts = list(grader.grade(rows))
    assert [verdict["reward"] for verdict in verdicts] == [float(bool(n % 3)) for n in range(500)]
    assert all(list(verdict) == KEYS for verdict in verdicts)
    assert verdicts[1] == {
        "reward": 1.0,
        "rewards": {"math": 1.0},
        "label": True,
        "extracted": "1",
        "verifier": grader.verifier,
        "verify_error": "",
    }
    assert verdicts[0]["label"] is False


def test_one_grader_serves_many_calls_also_after_one_was_left_early(grader):
    for _ in range(3):
        assert next(iter(grader.grade([row("1", "1")] * 300)))["reward"] == 1.0
        assert [verdict["reward"] for verdict in grader.grade([row("1", "2"), row("2", "2")])] == [0.0, 1.0]
    assert list(grader.grade([])) == []


def test_odd_rows_get_a_verdict_each(grader):
    rows = [
        {},
        {"answer": None, "completion": None},
        {"answer": "1"},
        {"completion": r"\boxed{1}"},
        {"answer": 7, "completion": [{"role": "assistant", "content": r"\boxed{7}"}]},
        {"answer": "a\ud800", "completion": "\\boxed{a\ud800}"},
        {"answer": "1", "completion": "\x00\u2028\\boxed{1}"},
        {"answer": "1", "completion": "x" * 10_000_000 + r"\boxed{1}"},
        {"answer": "1", "completion": r"\boxed{1}", "prompt": [{"role": "assistant", "content": "<think>"}]},
    ]
    verdicts = list(grader.grade(rows))
    assert [verdict["reward"] for verdict in verdicts] == [None, None, 0.0, None, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert verdicts[0]["verify_error"] == answer.GOLD_MISSING
    assert verdicts[2]["verify_error"].startswith(answer.NO_ANSWER)


def test_records_are_taken_only_as_there_is_room_for_them(grader):
    taken = 0

    def records():
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            yield row("1", "1")

    verdicts = grader.grade(records())
    next(verdicts)
    time.sleep(0.3)
    assert taken < 5000
    verdicts.close()


def test_a_verdict_is_out_while_the_next_record_is_awaited(grader):
    reading, writing = os.pipe()

    class Source:
        """One record at once, another when the pipe is written to."""

        def __init__(self):
            self.given = 0

        def fileno(self):
            return reading

        def ready(self):
            return self.given == 0 or bool(select.select([reading], [], [], 0)[0])

        def __iter__(self):
            return self

        def __next__(self):
            if self.given == 2:
                raise StopIteration
            if self.given == 1:
                os.read(reading, 1)
                os.write(writing, b"x")
            self.given += 1
            return row("1", "1")

    source = Source()
    verdicts = grader.grade(source)
    assert next(verdicts)["reward"] == 1.0
    assert source.given == 1
    os.write(writing, b"x")
    assert next(verdicts)["reward"] == 1.0
    assert list(verdicts) == []
    os.close(reading)
    os.close(writing)


def test_what_breaks_a_reward_costs_its_row_and_no_other(functions):
    kinds = ["sleep", "swallow", "hang", "memory", "crash", "raise", "none", "nan"]
    rows = [{"answer": "a", "completion": "a", "what": kind} for kind in ["", *kinds, ""] * 2]
    with Grader(["python:my_rewards:judge"], workers=2, timeout=0.3, memory_limit="1GiB") as grader:
        verdicts = list(grader.grade(rows))
    errors = [verdict["verify_error"].partition(":")[0] for verdict in verdicts]
    expected = ["", "timeout", "killed", "killed", "memory", "crashed", "failed", "not judged", "failed", ""] * 2
    expected[2] = errors[2] if errors[2] in ("timeout", "killed") else "killed"
    expected[12] = errors[12] if errors[12] in ("timeout", "killed") else "killed"
    assert errors == expected
    assert [verdict["reward"] for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, 0.0, 1.0] * 2


def test_a_row_is_tried_again_after_its_worker_died(functions):
    rows = [{"answer": "a", "completion": "a", "what": "crash once", "mark": str(functions / "mark")}]
    with Grader(["python:my_rewards:judge"], workers=1) as grader:
        assert [verdict["reward"] for verdict in grader.grade(rows)] == [1.0]


def test_what_a_function_has_started_dies_with_its_worker(functions):
    mark = functions / "started"
    rows = [{"answer": "a", "completion": "a", "what": "child", "mark": str(mark)}]
    with Grader(["python:my_rewards:judge"], workers=1, timeout=0.5) as grader:
        verdicts = grader.grade(rows)
        assert next(verdicts)["verify_error"] == answer.KILLED
        assert mark.exists()
        left = [int(pid.name) for pid in Path("/proc").iterdir() if pid.name.isdigit() and _group_of(pid) == grader.supervisor_pid]
    assert gone([*left, grader.supervisor_pid])


def _group_of(pid):
    try:
        return int((pid / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_rewards_add_up_and_one_null_makes_the_total_null(functions):
    with Grader(["math", "python:my_rewards:half=2", "exact=0"], workers=2) as grader:
        (verdict,) = grader.grade([row("0.5", r"\frac12")])
        assert verdict["rewards"] == {"math": 1.0, "python:my_rewards:half": 0.5, "exact": 0.0}
        assert verdict["reward"] == 2.0
        assert verdict["label"] is True
    with Grader(["math", "python:my_rewards:no_verdict"], workers=2) as grader:
        (verdict,) = grader.grade([row("2", "2")])
        assert verdict["reward"] is None
        assert verdict["rewards"] == {"math": 1.0, "python:my_rewards:no_verdict": None}
        assert verdict["verify_error"] == f"python:my_rewards:no_verdict: {answer.NOT_JUDGED}"


def test_settings_that_make_no_sense_are_usage_errors(functions):
    for settings in (
        {"rewards": ["maths"]},
        {"rewards": ["math", "math=2"]},
        {"rewards": []},
        {"rewards": ["math=much"]},
        {"rewards": ["python:my_rewards"]},
        {"timeout": 0},
        {"memory_limit": "lots"},
        {"memory_limit": "1MiB"},
        {"memory_limit": "99999999TiB"},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"timeout": 1e9},
        {"extract": "loose"},
    ):
        with pytest.raises(UsageError):
            Grader(**settings)
    for name in ("python:no_such_module:f", "python:my_rewards:no_such_function"):
        with Grader([name], workers=1) as grader, pytest.raises(UsageError, match="no_such"):
            list(grader.grade([row("1", "1")]))
    assert parse_memory("2GiB") == 2 << 30
    assert parse_memory("800MB") == 800_000_000


def test_failures_of_rewards_are_counted_by_kind_with_the_first_in_words(functions):
    rows = [{"answer": "a", "completion": "a", "what": what} for what in ("", "raise", "crash", "raise", "none")]
    with Grader(["math", "python:my_rewards:judge"], workers=1) as grader:
        list(grader.grade(rows))
        counts, first, _ = grader.take_errors()
        assert counts == {"failed": 2, "crashed": 1}
        assert first == "python:my_rewards:judge raised KeyError: 'colour'"
        assert grader.take_errors() == ({}, "", 0)
        list(grader.grade([{"answer": "1", "completion": "none"}, {"answer": "", "completion": ""}]))
        assert grader.take_errors() == ({}, "", 0)
    (functions / "odd_rewards.py").write_text("def few(completion): return 1.0")
    with Grader(["python:odd_rewards:few"], workers=1) as grader:
        list(grader.grade(rows))
        counts, first, _ = grader.take_errors()
        assert counts == {"failed": 5}
        assert first.startswith("python:odd_rewards:few raised TypeError: few() takes 1 positional argument")


def test_a_reward_is_checked_on_a_made_up_rollout(functions):
    (functions / "checked_rewards.py").write_text(
        "def good(completion, answer, record): return float(record['finish_reason'] == 'stop' and record['prompt'][0]['role'] == 'user')\n"
        "def few(completion): return 1.0\n"
        "def slow(completion, answer, record):\n    import time\n    time.sleep(60)\n"
    )
    for reward in ("math", "math:strict", "exact=2", "python:checked_rewards:good"):
        check_reward(reward)
    for reward, problem in (
        ("python:checked_rewards:few", "few raised TypeError"),
        ("python:checked_rewards:slow", "slow: timeout"),
        ("python:checked_rewards:missing", "no function 'missing'"),
        ("python:no_such_module:f", "no_such_module"),
    ):
        with pytest.raises(UsageError, match=problem):
            check_reward(reward, timeout=0.3)


FOREIGN = ["sitecustomize", "usercustomize", "gmpy2", "flint", "sympy", "math_verify", "mpmath", "antlr4", "json"]


def test_no_module_of_the_current_folder_runs(tmp_path, monkeypatch):
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise ImportError")
    (tmp_path / "s2dcli").mkdir()
    (tmp_path / "s2dcli" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('s2dcli')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    with Grader(workers=1) as grader:
        assert [verdict["reward"] for verdict in grader.grade([row(r"\sqrt{8}", r"2\sqrt{2}"), row("1", "2")])] == [1.0, 0.0]
    assert not (tmp_path / "ran").exists()
    (tmp_path / "mine.py").write_text("def all_right(completion, answer, record): return 1.0")
    with Grader(["math", "python:mine:all_right"], workers=1) as grader:
        assert [verdict["reward"] for verdict in grader.grade([row("1", "2")])] == [1.0]
    assert not (tmp_path / "ran").exists()


NAPS = """
import time

def nap(completion, answer, record):
    open(record["mark"], "a").write("x")
    time.sleep(record["seconds"])
    return 1.0
"""


@pytest.mark.parametrize("alone", [False, True])
def test_time_in_which_grading_was_stopped_counts_against_no_row(tmp_path, monkeypatch, alone):
    (tmp_path / "naps.py").write_text(NAPS)
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"
    rows = [{"answer": "a", "completion": "a", "mark": str(mark), "seconds": 0.5}]
    with Grader(["python:naps:nap"], workers=1, timeout=1.0) as grader:
        verdicts = grader.grade([*rows, row("1", "1")][:1])
        stopper = os.fork()
        if stopper == 0:
            while not mark.exists():
                time.sleep(0.02)
            worker = children(grader.supervisor_pid)
            pids = worker if alone else [grader.supervisor_pid, *worker]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(3.0)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            os._exit(0)
        assert next(verdicts)["reward"] == 1.0
        os.waitpid(stopper, 0)
        assert grader.take_errors().counts == {}
        assert next(grader.grade([{**rows[0], "seconds": 60}]))["verify_error"] == answer.TIMEOUT


def test_reasoning_that_the_prompt_opened_must_end_before_an_answer_counts(grader):
    rows = [row("1", "1", reasoning_open=open_) for open_ in (True, False)]
    rows += [{"answer": "1", "completion": r"so 1 </think> \boxed{1}", "reasoning_open": True}, row("1", "1")]
    verdicts = list(grader.grade(rows))
    assert [verdict["reward"] for verdict in verdicts] == [0.0, 1.0, 1.0, 1.0]
    assert verdicts[0]["verify_error"] == f"{answer.NO_ANSWER}: <think> was never closed"


def test_a_problem_says_whether_order_counts(grader):
    def prompted(text, found):
        return row("5,12,3", found, prompt=[{"role": "user", "content": text}])

    rows = [
        prompted("Find all roots.", "12,5,3"), prompted("Give the lengths of AB, BC and CA in this order.", "12,5,3"),
        prompted("What are a, b and c?", "12,5,3"), prompted("What are a, b and c, respectively?", "5,12,3"),
        prompted("In order to win, which numbers solve the game?", "3,5,12"),
    ]  # fmt: skip
    assert [verdict["reward"] for verdict in grader.grade(rows)] == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_killed_workers_are_replaced(grader):
    rows = [row(str(n), str(n)) for n in range(3000)]
    verdicts = []
    for verdict in grader.grade(rows):
        verdicts.append(verdict["reward"])
        if len(verdicts) in (5, 1000):
            os.kill(children(grader.supervisor_pid)[0], signal.SIGKILL)
    assert verdicts == [1.0] * 3000


def test_a_killed_supervisor_is_replaced_and_its_workers_vanish():
    rows = [row(str(n), str(n)) for n in range(3000)]
    with Grader(workers=2) as grader:
        verdicts = []
        for verdict in grader.grade(rows):
            verdicts.append(verdict["reward"])
            if len(verdicts) == 100:
                pids = [grader.supervisor_pid, *children(grader.supervisor_pid)]
                os.kill(grader.supervisor_pid, signal.SIGKILL)
        assert verdicts == [1.0] * 3000
        assert grader.supervisor_pid not in pids
        assert gone(pids[1:])


CALLER = """
import itertools, sys
from s2dcli.grade.pool import Grader
with Grader(workers=2) as grader:
    for number, verdict in enumerate(grader.grade(itertools.repeat({"answer": "1", "completion": "\\\\boxed{1}"}))):
        if number == 50:
            print(grader.supervisor_pid, flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_caller_that_is_ended(end):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CALLER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as caller:
        supervisor = int(caller.stdout.readline())
        pids = [supervisor, *children(supervisor)]
        assert len(pids) >= 2
        os.killpg(caller.pid, end)
        caller.wait(20)
        err = caller.stderr.read().decode()
    assert gone(pids)
    assert err.count("Traceback") == (1 if end == signal.SIGINT else 0)  # the caller's own, nobody else's


def test_the_supervisor_imports_nothing_heavy():
    script = "import sys; from s2dcli.grade import supervisor, answer; answer.warm_up(); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "sympy" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "accelerate", "vllm", "pandas"}


def test_a_grader_can_be_made_without_waiting_and_closed_at_once():
    grader = Grader(workers=2)
    pid = grader.supervisor_pid
    grader.close()
    assert gone([pid])
