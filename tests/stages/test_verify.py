"""`s2d verify` through its command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDED = ["reward", "rewards", "label", "extracted", "verifier", "verify_error"]


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def row(gold, found, **fields):
    return {"answer": gold, "completion": f"\\boxed{{{found}}}", **fields}


def start(*args, **streams):
    """Start the command as a process of its own, with nothing imported before."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "s2dcli", "verify", *args], env=environment, **streams)


def test_rows_pass_through_with_their_verdict(s2d):
    given = [row("1/2", "0.5", note="ünï", nested={"a": [1, None]}, seed=2**53 - 1), row("3", "4", group_id="g")]
    done = s2d("verify", stdin=lines(*given))
    assert done.code == 0
    for before, after in zip(given, done.rows, strict=True):
        assert {name: value for name, value in after.items() if name not in ADDED} == before
        assert list(after)[-6:] == ADDED
    assert [after["reward"] for after in done.rows] == [1.0, 0.0]
    assert [after["label"] for after in done.rows] == [True, False]
    assert done.out.isascii()
    assert "2 rows graded: 1 right, 1 wrong, 0 without a verdict" in done.err


def test_what_a_line_holds_stays_as_it_was_written(s2d):
    given = b'{"answer": "1",  "completion": "\\\\boxed{1} \xe2\x80\xa8 \xf0\x9f\x98\x80 \\ud800 \\u0000", "x": 1.50, "y": 1e999}'
    done = s2d("verify", stdin=given)
    assert done.code == 0
    kept = b'{"answer": "1",  "completion": "\\\\boxed{1} \\u2028 \\ud83d\\ude00 \\ud800 \\u0000", "x": 1.50, "y": 1e999, '
    assert done.out.startswith(kept + b'"reward": 1.0, ')
    assert done.out.count(b"\n") == 1
    assert done.out.endswith(b"}\n")


def test_an_earlier_verdict_is_replaced(s2d):
    done = s2d("verify", stdin=lines(row("1", "1", reward=0.0, label=None, verify_error="old", z=5)))
    assert done.out.count(b'"reward"') == 1
    assert done.rows[0]["reward"] == 1.0
    assert done.rows[0]["z"] == 5


BAD = [b'{"answer": "1", "compl', b"[1, 2]", b"5" * 5000, b"[" * 100_000, b'{"answer": NaN}', b"\xff\xfe\xff", b"null"]


def test_bad_lines_are_reported_and_all_others_graded(s2d, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"".join(lines(row(str(n), str(n))) + bad + b"\n\n" for n, bad in enumerate(BAD)) + lines(row("9", "9"))[:-1])
    done = s2d("verify", path)
    assert done.code == 1
    assert [after["answer"] for after in done.rows] == [*map(str, range(len(BAD))), "9"]
    for n in range(len(BAD)):
        assert f"{path}:{3 * n + 2}: " in done.err
    assert f"{len(BAD)} lines are no JSON objects" in done.err
    skipped = s2d("verify", path, "--skip-invalid")
    assert skipped.code == 0
    assert skipped.out == done.out


def test_a_huge_field_and_an_empty_object_are_rows_too(s2d):
    done = s2d("verify", stdin=lines({}, row("1", "1", big="x" * 10_000_000), {"answer": "1", "completions": "1"}))
    assert done.code == 0
    assert [after["reward"] for after in done.rows] == [None, 1.0, 0.0]
    assert "(did you mean 'completions'?)" in done.err
    assert "without a verdict" in done.err


def test_an_existing_output_is_refused_and_replaced_on_request(s2d, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines(row("1", "1")))
    out.write_text("precious")
    refused = s2d("verify", source, "-o", out)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert out.read_text() == "precious"
    assert s2d("verify", source, "-o", out, "--overwrite").code == 0
    assert json.loads(out.read_text())["reward"] == 1.0
    assert s2d("verify", out, "-o", out, "--overwrite").code == 2
    assert json.loads(out.read_text())["reward"] == 1.0
    assert s2d("verify", tmp_path / "missing.jsonl").code == 1


def test_diff_says_which_verdicts_changed(s2d, tmp_path):
    old = tmp_path / "old.jsonl"
    graded = [
        row("1", "1", reward=0.0, label=False, group_id="a", sample_index=0),
        row("2", "2", reward=1.0, label=True, group_id="a", sample_index=1),
        row("", "2", reward=0.0, label=False, group_id="a", sample_index=2),
    ]
    old.write_bytes(lines(*graded))
    done = s2d("verify", "--diff", old)
    assert done.code == 0
    assert [after["reward"] for after in done.rows] == [1.0, 1.0, None]
    assert f"{old}:1: wrong -> right" in done.err
    assert f"{old}:3: wrong -> not graded" in done.err
    assert "2 of 3 verdicts changed" in done.err
    new = tmp_path / "new.jsonl"
    new.write_bytes(lines(*({name: r[name] for name in ("answer", "completion", "group_id", "sample_index")} for r in reversed(graded))))
    done = s2d("verify", new, "--diff", old)
    assert f"{new}:3: wrong -> right" in done.err
    assert "2 of 3 verdicts changed" in done.err
    ungraded = s2d("verify", "--diff", new)
    assert ungraded.code == 0
    assert "3 rows have no earlier verdict" in ungraded.err


def test_rewards_and_lenient_extraction(s2d, tmp_path):
    (tmp_path / "shape.py").write_text("def short(completion, answer, record):\n    return len(completion) < record['most']\n")
    given = lines({"answer": "4", "completion": "The answer is 4.", "most": 99})
    done = s2d("verify", "--reward", "math", "--reward", "python:shape:short=0.5", "--extract", "lenient", stdin=given, cwd=tmp_path)
    assert done.code == 0
    assert done.rows[0]["rewards"] == {"math": 1.0, "python:shape:short": 1.0}
    assert done.rows[0]["reward"] == 1.5
    assert "extract=lenient" in done.rows[0]["verifier"]
    assert s2d("verify", stdin=given).rows[0]["reward"] == 0.0
    for wrong in (["--reward", "maths"], ["--reward", "python:no_such_module:f"], ["--memory-limit", "much"], ["--extract", "some"]):
        assert s2d("verify", *wrong, stdin=given).code == 2


def test_why_rewards_failed_is_said(s2d, tmp_path):
    (tmp_path / "odd.py").write_text("def odd(completion, answer, record):\n    return {'a': 1.0}[completion]\n")
    given = lines(*({"answer": "1", "completion": text} for text in "axxa"))
    done = s2d("verify", "--reward", "python:odd:odd", stdin=given, cwd=tmp_path)
    assert done.code == 0
    assert "2 failed: python:odd:odd raised KeyError: 'x'" in done.err
    done = s2d("verify", "--reward", "math", "--reward", "python:odd:odd", stdin=given, cwd=tmp_path)
    assert "2 failed: python:odd:odd raised KeyError: 'x'" in done.err


def test_a_file_of_problems_is_refused(s2d, few, tmp_path):
    out = tmp_path / "graded.jsonl"
    done = s2d("verify", few, "-o", out)
    assert done.code == 1
    assert f"{few}: these are problems: no row has a field 'completion' to grade; sample completions first: s2d rollout" in done.err
    assert not out.exists()
    mixed = few.read_bytes() + lines(row("1", "1"))
    done = s2d("verify", stdin=mixed)
    assert done.code == 0
    assert [after["reward"] for after in done.rows] == [0.0] * 8 + [1.0]


@pytest.mark.parametrize("limit", [["--memory-limit", "99999999TiB"], ["--timeout", "inf"], ["--timeout", "nan"], ["--timeout", "1e300"]])
def test_limits_out_of_range_are_usage_errors(s2d, limit):
    done = s2d("verify", *limit, stdin=lines(row("1", "1")))
    assert done.code == 2
    assert limit[0] in done.err
    assert done.out == b""


def test_no_module_of_the_current_folder_runs(tmp_path):
    for name in ("sitecustomize", "usercustomize", "gmpy2", "flint", "sympy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "s2dcli", "verify"]
    given = lines(row(r"\sqrt{8}", r"2\sqrt{2}"))
    done = subprocess.run(command, input=given, env=environment, cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(done.stdout)["reward"] == 1.0
    assert not (tmp_path / "ran").exists()


def test_rows_come_out_while_more_are_awaited():
    with start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as command:
        for number in range(3):
            command.stdin.write(lines(row(str(number), str(number))))
            command.stdin.flush()
            assert json.loads(command.stdout.readline())["reward"] == 1.0
        command.stdin.write(lines(row("7", "7"))[:20])
        command.stdin.flush()
        command.stdin.close()
        assert command.wait(20) == 1


def test_an_endless_input_and_a_reader_that_leaves(tmp_path):
    text = lines(row("1", "1")).decode().strip()
    with (
        subprocess.Popen(["yes", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as endless,
        start(stdin=endless.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command,
    ):
        endless.stdout.close()
        assert json.loads(command.stdout.readline())["reward"] == 1.0
        command.stdout.close()
        assert command.wait(20) == 0
        assert command.stderr.read() == b""


@pytest.mark.parametrize(("end", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_left_when_the_command_is_ended(end, code):
    with start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as command:
        command.stdin.write(lines(row("1", "1")))
        command.stdin.flush()
        command.stdout.readline()
        family = _descendants(command.pid)
        assert len(family) >= 2
        os.killpg(command.pid, end)
        assert command.wait(20) == code
        assert b"Traceback" not in command.stderr.read()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in family)


def _descendants(pid):
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in _descendants(child)]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_torch_is_never_imported():
    script = (
        "import sys; from s2dcli.cli import app\n"
        "try: app(['verify', '-q'])\n"
        "except SystemExit: pass\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'sympy', 'datasets'}, file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], input=lines(row("1", "1")), env=environment, capture_output=True, check=True)
    assert done.stderr.decode().strip() == "set()"


@pytest.fixture
def graded(s2d, tmp_path):
    """A file to grade, with a line that is none, and what grading it gives."""
    given, out = tmp_path / "given.jsonl", tmp_path / "graded.jsonl"
    given.write_bytes(lines(row("1", "1"), row("2", "3")) + b"no JSON\n" + lines(row("1/2", "0.5", note="\u00e9\x7f"), row("4", "4")))
    assert s2d("verify", given, "-o", out, "--skip-invalid").code == 0
    return given, out


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
def test_a_resumed_file_has_the_bytes_of_an_undisturbed_one(s2d, graded, tmp_path, kept):
    given, whole = graded
    out = tmp_path / "cut.jsonl"
    rows = whole.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:kept]) + b'{"torn')
    manifest = json.loads((tmp_path / "graded.jsonl.s2d.json").read_text())
    (tmp_path / "cut.jsonl.s2d.json").write_text(json.dumps({**manifest, "complete": False}))
    result = s2d("verify", given, "-o", out, "--skip-invalid", "--workers", 1, "--resume")
    assert result.code == 0, result.err
    assert out.read_bytes() == whole.read_bytes()
    assert "4 rows graded: 3 right, 1 wrong" in result.err
    again = json.loads((tmp_path / "cut.jsonl.s2d.json").read_text())
    assert {**again["counts"], "seconds": 0} == {**manifest["counts"], "seconds": 0}
    assert (again["complete"], again["counts"]["invalid"]) == (True, 1)


def test_kept_rows_must_be_those_of_the_input(s2d, graded, tmp_path):
    given, out = graded
    (tmp_path / "graded.jsonl.s2d.json").write_text(
        (tmp_path / "graded.jsonl.s2d.json").read_text().replace('"complete": true', '"complete": false')
    )
    piped = ["verify", "-", "-o", tmp_path / "piped.jsonl", "--skip-invalid"]
    assert s2d(*piped, stdin=given.read_bytes()).code == 0
    unfinished = tmp_path / "piped.jsonl.s2d.json"
    unfinished.write_text(unfinished.read_text().replace('"complete": true', '"complete": false'))
    other = s2d(*piped, "--resume", stdin=given.read_bytes().replace(b"boxed{3}", b"boxed{5}"))
    assert other.code == 1
    assert "piped.jsonl:2: cannot be resumed: this row was not made from -" in other.err
    assert s2d(*piped, "--resume", stdin=given.read_bytes()).code == 0
    assert (tmp_path / "piped.jsonl").read_bytes() == out.read_bytes()
    after = s2d(*piped, "--resume", stdin=given.read_bytes().replace(b"boxed{3}", b"boxed{5}"))
    assert after.code == 1  # a pipe is not known before it is read
    refused = s2d("verify", given, "-o", out, "--resume", "--timeout", 1, "--extract", "lenient")
    assert refused.code == 2
    assert '2 things differ: --extract was "strict", is "lenient"; --timeout was 5.0, is 1.0' in refused.err


def test_a_finished_file_says_again_that_lines_were_bad(s2d, graded, tmp_path):
    given, out = graded
    before = out.read_bytes()
    again = s2d("verify", given, "-o", out, "--resume")
    assert again.code == 1
    assert "1 lines are no JSON objects" in again.err
    assert out.read_bytes() == before
    assert s2d("verify", given, "-o", out, "--resume", "--skip-invalid").code == 0
