"""Scripts of the method's routes: every command of theirs on tiny models, and what contrasts differ in."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ZYGOTE, read_jsonl
from warm import warm_commands

EXAMPLES = Path(__file__).parents[2] / "examples"
ROUTES = ["r1", "r2", "r3", "r5", "r6", "r7", "r8", "raw", "same-size"]
CONTROLS = ["wrong", "any", "warmup-1H", "negative", "self-1H", "self"]


def run_smoke(architecture: str, folder: Path, *routes: str) -> Path:
    """Run routes of an architecture, all and the controls if none is named, in their shortest form; returns the folder of seed 0."""
    script, settings = EXAMPLES / "routes" / "smoke.sh", EXAMPLES / architecture / "settings.sh"
    with warm_commands(folder / "bin", ZYGOTE) as environment:
        command = ["bash", script, architecture, settings, folder / "out", *routes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out" / "routes" / "seed-0"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return run_smoke("qwen3", tmp_path_factory.mktemp("qwen3"))


def results(folder: Path, route: str) -> tuple[int, int]:
    found = json.loads((folder / "eval" / f"{route}-sampled" / "results.json").read_text())
    return found["problems"], found["k"]


def model_type(run: Path) -> str:
    return json.loads((run / (run / "latest").read_text().strip() / "config.json").read_text())["model_type"]


def test_every_route_runs(qwen3):
    assert {results(qwen3, route) for route in ROUTES + CONTROLS} == {(4, 2)}
    assert model_type(qwen3 / "r5") == "qwen3"


def test_controls_learn_from_what_they_are_named_after(qwen3):
    graded, wrong, spread = (read_jsonl(qwen3 / f"{name}.jsonl") for name in ("many-graded", "wrong", "any"))
    assert wrong == [row for row in graded if row["label"] is False]
    assert len(spread) == len(wrong) > 0
    assert all(row in graded for row in spread)
    [step] = read_jsonl(qwen3 / "negative" / "metrics.jsonl")
    assert (step["reward"], step["mixed_groups"], step["updates"]) == (-1.0, 0.0, 2)  # 8 rollouts in mini-batches of 4


def test_the_settings_of_llama_run_and_the_label_curve_is_drawn(tmp_path, s2d):
    folder = run_smoke("llama", tmp_path, "label-curve")
    assert results(folder, "bridge-4") == (4, 2)
    assert model_type(folder / "bridge-4") == "llama"
    found = s2d("report", *sorted((folder / "eval").iterdir()), "--label-curve", tmp_path / "curve.svg", "--json").result
    assert {(point["name"], point["labels"]) for point in found["points"]} == {
        (name, labels) for name in ("GRPO of the student", "RL teacher and bridge") for labels in (2, 4)
    }


@pytest.mark.parametrize(
    ("a", "b", "differ"),
    [
        ("r5", "r7", {"labels", "input"}),  # fresh against replayed labels
        ("bridge-1H", "opd-1H", {"student"}),  # with and without the warm-up
        ("r5", "r8", {"model"}),
        ("wrong-warmup", "any-warmup", {"input"}),
    ],
)
def test_contrasts_differ_in_what_they_are_named_after(qwen3, s2d, a, b, differ):
    found = s2d("compare", "--settings", qwen3 / a, qwen3 / b, "--json").result
    assert {name.split(" ")[0] for name in found} == differ


def side_by_side(commands: str, folder: Path) -> int:
    script, environment = EXAMPLES / "routes" / "side_by_side.sh", {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", script], input=commands, env=environment, cwd=folder, text=True, check=False, timeout=60).returncode


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_seeds_run_side_by_side_with_one_thread_each(tmp_path):
    meet = "touch {}; for _ in $(seq 200); do [ -e {} ] && exit; sleep 0.1; done; exit 1\n"  # each waits for the other
    assert side_by_side(meet.format("a", "b") + meet.format("b", "a"), tmp_path) == 0


def test_a_seed_that_fails_is_told(tmp_path):
    assert side_by_side("false\ntouch 'after it'\n", tmp_path) != 0
    assert (tmp_path / "after it").exists()
