"""What people see on standard error and on a terminal."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import start, wait
from rich.console import Console

from s2dcli import console

GRPO = {
    "step": 3, "loss": 1.86e-09, "lr": 1e-6, "grad_norm": 0.396, "updates": 1, "seconds": 12.5, "tokens": 189, "padding": 0.3,
    "reward": 0.219, "mixed_groups": 0.625, "kl": None, "entropy": 0.523, "clip_fraction": 0.0, "mean_tokens": 1812.2,
    "truncated": 0.041, "sample_tokens_per_second": 1594.0, "sample_seconds": 6.25, "update_seconds": 5.0, "save_seconds": 0.0,
}  # fmt: skip
EVALUATION = {"step": 2, "k": 4, "avg_at_k": 0.3125, "se": 0.021, "problems": 200}


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 80 columns in memory."""
    terminal = Console(force_terminal=True, width=80, height=24, record=True, file=io.StringIO())
    monkeypatch.setattr(console, "stderr", terminal)
    yield terminal
    console.configure(quiet=False, verbose=False)


def frames(terminal: Console, rows: list[dict]) -> list[list[str]]:
    """The lines of the last figures that were shown of each row."""
    shown = []
    with console.training(10) as show:
        for row in rows:
            show(row, EVALUATION)
            terminal.export_text()
            terminal.print(console_live(show))
            shown.append(terminal.export_text().splitlines())
    return shown


def console_live(show):
    """The renderable of the display behind `show`."""
    return dict(zip(show.__code__.co_freevars, (cell.cell_contents for cell in show.__closure__), strict=True))["live"].get_renderable()


def test_the_live_display_keeps_each_figure_in_its_place(screen):
    wide = {
        **GRPO,
        "step": 4,
        "kl": 1.2345e-05,
        "reward": 0.0,
        "mean_tokens": 131072.0,
        "truncated": 1.0,
        "grad_norm": 123456.7,
        "entropy": None,
    }
    first, second = frames(screen, [GRPO, wide])
    labels = ["reward", "KL", "avg@4", "entropy", "tokens/rollout", "truncated", "mixed groups", "loss", "lr", "grad norm", "seconds/step"]
    for lines in (first, second):
        text = "\n".join(lines)
        assert re.findall("|".join(map(re.escape, labels)), text) == labels
        assert max(map(len, lines)) <= 80
        assert "…" not in text
        assert re.search(r"\d/10 +0:\d\d:\d\d .*left", lines[0])
    places = [
        [(number, line.index(label)) for number, line in enumerate(lines) for label in labels if label in line] for lines in (first, second)
    ]
    assert places[0] == places[1]
    assert re.search(r"KL +-  ", first[1])
    assert re.search(r"31\.2% ± 2\.1%$", first[1].rstrip())
    assert "sample 50%, update 40%, save 0%" in "\n".join(first)
    assert "sample_tokens_per_second" not in "\n".join(first)


def test_the_live_display_shows_every_field_when_asked(screen):
    console.configure(quiet=False, verbose=True)
    (lines,) = frames(screen, [GRPO])
    text = "\n".join(lines)
    assert "…" not in text
    assert all(re.search(rf"{name} +\S", text) for name in ("padding", "sample_tokens_per_second", "clip_fraction", "update_seconds"))


def test_the_log_starts_with_the_figure_that_matters(capsys):
    with console.training(10) as show:
        show({**GRPO, "step": 1, "kl": 0.01}, EVALUATION)
        show({**GRPO, "step": 2})
    with console.training(10) as show:
        show({"step": 10, "loss": 0.5, "seconds": 1.0, "cross_entropy": 0.5, "entropy": 0.25, "update_seconds": 1.0})
    first, last = capsys.readouterr().err.splitlines()  # the second step follows too soon
    figures = "reward 0.219, KL 0.01, avg@4 31.2% ± 2.1%, entropy 0.523, tokens/rollout 1,812, truncated 4.1%"
    assert re.fullmatch(rf"step 1/10: {re.escape(figures)}, 0:01:5\d left \(sample 50%, update 40%, save 0%\)", first)
    assert last == "step 10/10: cross-entropy 0.500, entropy 0.250, 0:00:00 left (update 100%)"


def test_loading_is_said_in_one_line(capsys):
    console.loading("Qwen/Qwen3-1.7B", 1_720_574_976, "bfloat16", "cpu")
    console.loading("toy", 109_056, "float32", "cuda:1")
    console.loading("none", 0, "float32", "cpu")
    assert capsys.readouterr().err.splitlines() == [
        "loading Qwen/Qwen3-1.7B (1.72B parameters, bfloat16, cpu)",
        "loading toy (109k parameters, float32, cuda:1)",
        "loading none (0 parameters, float32, cpu)",
    ]


RESULTS = {
    "eval_table": {
        "name": "a\x1b[2Jb", "dataset": "aime/test", "k": 16, "avg_at_k": 0.3125, "se": 0.021, "pass_at_k": 0.6, "problems": 1500,
        "truncated": 0.041, "mean_tokens": 1812.2, "ungraded": 3,
    },
    "run_table": {"checkpoint": "runs/a b/step-000003", **GRPO, "labels": 200, **{f"eval_{name}": EVALUATION[name] for name in EVALUATION}},
    "plan_table": {
        "steps": 200, "rollouts_per_step": 256, "rollouts": 51200, "completion_tokens_at_most": 52428800, "parameters": 1720574976,
        "processes": 8, "sharded": True, "step_tokens_at_most": 40960, "row_tokens_at_most": 1280,
        "trained_parameters": 1720574976, "weights_bytes": 6882299904, "frozen_bytes": 0, "total_bytes": 31 * 10**9,
        "available_bytes": 80 * 10**9, "out": "runs/grpo",
    },
}  # fmt: skip
TABLES = {
    "eval_table": """\
name            a\\x1b[2Jb
data set        aime/test
problems        1,500
avg@16          31.2% ± 2.1% over problems
pass@16         60.0%
truncated       4.1%
no answer       0.0%
not graded      3
tokens/rollout  1,812
""",
    "run_table": """\
checkpoint      runs/a b/step-000003
step            3
reward          0.219
KL              -
avg@4           31.2% ± 2.1%
entropy         0.523
tokens/rollout  1,812
truncated       4.1%
mixed groups    62.5%
loss            1.86e-09
lr              1e-06
grad norm       0.396
seconds/step    12.5
labels          200
""",
    "plan_table": """\
steps       200 of 256 rollouts, 51,200 in all
tokens      at most 52.4M of completions
processes   8, each with a part of all weights (FSDP2)
  a step    at most 41k with prompts, 1,280 in a row
parameters  1.72B, of which 1.72B are trained
memory      fits: 31 of 80 GB in each process
  weights   6.88 GB
output      runs/grpo
""",
}

PRINT = "import json, sys; from s2dcli import console; from s2dcli.files import jsonl; "
PRINT += "jsonl.print_result(json.loads(sys.argv[2]), getattr(console, sys.argv[1]))"


@pytest.mark.parametrize("table", RESULTS)
def test_a_result_is_a_table_on_a_terminal_and_json_in_a_pipe(table):
    result = RESULTS[table]
    command = [sys.executable, "-c", PRINT, table, json.dumps(result)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(piped.stdout) == result
    controller, terminal = pty.openpty()
    subprocess.run(command, stdout=terminal, check=True)
    os.close(terminal)
    assert os.read(controller, 1 << 16).decode().replace("\r\n", "\n") == TABLES[table]
    os.close(controller)


def test_commands_print_their_results_as_tables_on_a_terminal(toy, few, tmp_path):
    def shown(*arguments: object) -> dict[str, str]:
        controller, terminal = pty.openpty()
        with open(os.devnull) as nothing, open(tmp_path / "log", "wb") as log:
            assert wait(start([str(argument) for argument in arguments], nothing.fileno(), terminal, log.fileno())) == 0
        os.close(terminal)
        text = os.read(controller, 1 << 16).decode()
        os.close(controller)
        return dict(line.split("  ", 1) for line in text.splitlines() if not line.startswith(" "))

    trained = (
        "grpo",
        "-m",
        toy / "teacher",
        few,
        "-o",
        tmp_path / "run",
        "--steps",
        1,
        "--problems-per-step",
        8,
        "-n",
        2,
        "--max-tokens",
        8,
    )
    plan, run = shown(*trained, "--dry-run"), shown(*trained)
    assert plan["steps"].strip() == "1 of 16 rollouts, 16 in all"
    assert re.fullmatch(r" *fits: 0\.\d+ of \d+(\.\d+)? GB", plan["memory"])
    assert run["checkpoint"].strip() == str(tmp_path / "run" / "step-000001")
    assert {"reward", "entropy", "labels"} <= run.keys()
    assert shown(*trained, "--resume") == run
    evaluated = shown("eval", "-m", toy / "student", few, "-k", 2, "--max-tokens", 8, "-o", tmp_path / "eval")
    assert re.fullmatch(r" *\d+\.\d% ± \d+\.\d% over problems, 95 % interval \d+\.\d% to \d+\.\d%", evaluated["avg@2"])


def test_a_plan_says_when_it_does_not_fit_and_needs_no_device_to_be_shown():
    plan = RESULTS["plan_table"]
    assert dict(console.plan_table({**plan, "available_bytes": 24 * 10**9}))["memory"] == "does not fit: 31 of 24 GB in each process"
    assert dict(console.plan_table({**plan, "available_bytes": None, "processes": 1}))["memory"] == "31 GB"
