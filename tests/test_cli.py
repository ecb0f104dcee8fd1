"""The command line as such: what it imports, its streams and its exit codes."""

import os
import re
import subprocess
import sys

import pytest

HEAVY = [
    "torch",
    "transformers",
    "vllm",
    "datasets",
    "accelerate",
    "math_verify",
    "peft",
    "matplotlib",
    "sympy",
    "click",
    "pyarrow",
    "numpy",
]
COMMANDS = ["rollout", "verify", "grpo", "fkl-warmup", "opd", "eval", "prepare", "report", "compare", "lineage"]

PROBE = """
import sys
from s2dcli.cli import main
sys.argv = ["s2d", *{arguments!r}]
try:
    main()
finally:
    print("HEAVY", *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def probe(*arguments: str) -> subprocess.CompletedProcess:
    code = PROBE.format(arguments=list(arguments), heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *[[command, "--help"] for command in COMMANDS]])
def test_help_imports_nothing_heavy(arguments):
    result = probe(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert result.stderr.splitlines()[-1] == "HEAVY"


def test_file_commands_never_import_torch(tmp_path, toy, s2d):
    problems = toy / "problems" / "validation.jsonl"
    assert probe("report", str(tmp_path / "nothing")).stderr.splitlines()[-1] == "HEAVY"
    rolled = s2d("rollout", "-m", toy / "student", problems, "-n", 1, "--max-tokens", 16)
    (tmp_path / "rollouts.jsonl").write_bytes(rolled.out)
    verified = probe("verify", str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "graded.jsonl"))
    assert verified.returncode == 0, verified.stderr
    evaluated = probe("eval", "--rollouts", str(tmp_path / "graded.jsonl"))
    assert evaluated.returncode == 0, evaluated.stderr
    traced = probe("lineage", str(toy / "student"))
    compared = probe("compare", str(tmp_path / "graded.jsonl"), str(tmp_path / "graded.jsonl"))
    unlike = probe("compare", "--settings", str(tmp_path / "graded.jsonl"), str(tmp_path / "graded.jsonl"))
    assert (traced.returncode, compared.returncode, unlike.returncode) == (0, 0, 0)
    for result in (verified, evaluated, traced, compared, unlike):
        assert result.stderr.splitlines()[-1] == "HEAVY"


def test_help_shows_the_stages_first_in_two_panels():
    text = subprocess.run([sys.executable, "-m", "s2dcli", "--help"], capture_output=True, text=True, check=True).stdout
    assert 0 < text.index("Stages") < text.index("rollout") < text.index("Helpers") < text.index("prepare")


def test_a_misspelt_option_is_a_usage_error_that_names_the_right_one():
    result = subprocess.run([sys.executable, "-m", "s2dcli", "rollout", "--modle", "x"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--model" in result.stderr
    assert result.stdout == ""


def test_chatter_never_reaches_standard_output(tmp_path):
    code = (
        "import os, subprocess, sys\n"
        "from s2dcli import console\n"
        "from s2dcli.files import jsonl\n"
        "console.claim_stdout()\n"
        "print('from python'); sys.stdout.flush()\n"
        "os.write(1, b'from C\\n')\n"
        "subprocess.run(['echo', 'from a child'])\n"
        "jsonl.print_result({'a': 1})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == '{"a": 1}\n'
    assert set(result.stderr.split("\n")) >= {"from python", "from C", "from a child"}


def test_no_traceback_unless_debugging(s2d, toy, few, monkeypatch):
    s2d("--version")  # what runs below is a copy of this process, which by then has loaded a model
    monkeypatch.setattr("s2dcli.models.checkpoints.resolve", lambda name: 1 / 0)  # what no error class foresees
    arguments = ["rollout", "-m", toy / "student", few]
    plain = s2d(*arguments)
    assert plain.code == 1
    assert "Traceback" not in plain.err
    assert "S2D_DEBUG=1" in plain.err
    monkeypatch.setenv("S2D_DEBUG", "1")
    assert "Traceback" in s2d(*arguments).err


def test_control_characters_never_reach_the_terminal(s2d, toy):
    result = s2d("rollout", "-m", "a\x1b]0;b\x07c", toy / "problems" / "validation.jsonl")
    assert result.code == 2
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", result.err)
    assert "\\x1b" in result.err


def test_quiet_says_nothing_but_the_result(s2d, toy, few):
    result = s2d("eval", "-m", toy / "student", few, "-k", 2, "--max-tokens", 16, "-q")
    assert result.code == 0
    assert result.err == ""
    assert result.result["problems"] == 8


def test_standard_input_from_a_terminal_is_a_usage_error(toy):
    import pty

    controller, terminal = pty.openpty()
    result = subprocess.run(
        [sys.executable, "-m", "s2dcli", "rollout", "-m", str(toy / "student")], stdin=terminal, capture_output=True, text=True, check=False
    )
    os.close(controller)
    os.close(terminal)
    assert result.returncode == 2
    assert "pipe problems into this command or name a file" in result.stderr
