"""Wall time and memory of a warm-up: hard labels, a teacher in memory, and its distributions from a cache, in one run.

    python tests/bench/bench_warmup.py                    16 rollouts of 64 tokens, 4 steps
    python tests/bench/bench_warmup.py --rollouts 64 --steps 8

Each way is a command of its own. Student: Qwen3's vocabulary (151,936), 42 million parameters; teacher: the same with
twice the width and layers. Models are random, rollouts of the teacher. "step" is the median of the steps but the first;
"peak" is the largest resident memory of the process, "beside SFT" what that is more than with hard labels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench_train import ROOT, SHAPES, make

TEACHER = {**SHAPES["wide"], "hidden": 512, "layers": 8, "heads": 8, "mlp": 1536}
COMMAND = [sys.executable, "-m", "s2dcli"]


def run(*arguments: object, quiet: bool = True) -> int:
    """Run `s2d ARGUMENTS`; returns its peak memory in bytes."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        if quiet:
            os.dup2(null, 2)
        os.execve(sys.executable, [*COMMAND, *map(str, arguments)], {**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"s2d {' '.join(map(str, arguments))} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, shape in (("small", SHAPES["wide"]), ("large", TEACHER)):
            (folder / part).mkdir()
            make(folder / part, shape)
        student, teacher = folder / "small" / "policy", folder / "large" / "policy"
        problems = folder / "problems.jsonl"
        problems.write_text("".join((folder / "small" / "problems.jsonl").read_text().splitlines(keepends=True)[: given.rollouts]))
        rollouts = folder / "rollouts.jsonl"
        run("rollout", "-m", teacher, problems, "-n", 1, "--max-tokens", given.tokens, "-o", rollouts)
        ways = {"hard labels": ["--hard-labels"], "teacher in memory": ["--teacher", teacher]}
        for keep, more in (("hidden", ["--cache-dtype", "float32"]), ("top-k", [])):
            run("score", "-m", teacher, rollouts, "-o", folder / keep, "--keep", keep, *more)
            size = json.loads((folder / keep / "meta.json").read_text())
            columns = sum(file["bytes"] for name, file in size["files"].items() if name.startswith("shard"))
            ways[f"cache, {keep} ({columns / size['tokens']:,.0f} bytes a token)"] = ["--cache", folder / keep]
        print(f"{'':40} {'step':>8} {'peak':>9} {'beside SFT':>11}")
        base = 0
        for number, (way, target) in enumerate(ways.items()):
            out = folder / f"run{number}"
            peak = run(
                *("fkl-warmup", "--student", student, "--rollouts", rollouts, *target, "-o", out, "--steps", given.steps),
                *("--mini-batch-size", given.rollouts, "--keep-states", 1),
            )
            base = base or peak
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            seconds = statistics.median(row["seconds"] for row in rows[1:])
            print(f"{way:40} {seconds:6.2f} s {peak / 1e6:6,.0f} MB {(peak - base) / 1e6:8,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
