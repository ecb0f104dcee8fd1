"""What saving costs: the share of a training run's time at the default of 50 steps between checkpoints.

    python tests/bench/bench_save.py

Each trainer makes 51 steps on the toy family with the quick start's batch sizes; the last row of metrics.jsonl
then tells how long the save after step 50 took. Times include the optimizer's state and every fsync.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOY = Path(__file__).parents[2] / "examples" / "toy"
EVERY = 50  # steps, the default of --save-every


def commands(folder: Path) -> dict[str, list[object]]:
    sampling = [TOY / "problems" / "1H.jsonl", "--problems-per-step", 32, "-n", 8, "--max-tokens", 16]
    pair = ["--teacher", TOY / "teacher", "--student", TOY / "student"]
    return {
        "grpo": ["grpo", "--model", TOY / "teacher", *sampling],
        "opd": ["opd", *pair, *sampling],
        "fkl-warmup": ["fkl-warmup", *pair, "--rollouts", folder / "rollouts.jsonl", "--mini-batch-size", 128],
    }


def s2d(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "s2dcli", *map(str, args), "-q"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        s2d("rollout", "-m", TOY / "teacher", TOY / "problems" / "1H.jsonl", "-n", 2, "--max-tokens", 16, "-o", folder / "rollouts.jsonl")
        print(f"{'trainer':<12} {'step ms':>8} {'save ms':>8} {'share':>7}")
        for trainer, command in commands(folder).items():
            s2d(*command, "--steps", EVERY + 1, "--lr", "1e-4", "-o", folder / trainer)
            rows = [json.loads(line) for line in (folder / trainer / "metrics.jsonl").read_text().splitlines()]
            steps, saving = sum(row["seconds"] for row in rows[:EVERY]), rows[EVERY]["save_seconds"]
            print(f"{trainer:<12} {1000 * steps / EVERY:>8.1f} {1000 * saving:>8.1f} {saving / steps:>7.2%}")


if __name__ == "__main__":
    main()
