"""Where a step of each trainer spends its time: by phase, and by torch operator.

    python tests/bench/profile_step.py --shape toy
    python tests/bench/profile_step.py --shape wide --threads 2
    python tests/bench/profile_step.py --shape qwen3-1.7b --dtype bfloat16      on a GPU

Shapes and random checkpoints are those of bench_train.py. Phases are the medians of metrics.jsonl without the
first step; operators are torch.profiler's own times over all steps of the command, in a second run of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # the grader's processes import the reward

from bench_train import GROUP, SHAPES, make  # noqa: E402 - after the path

OPERATORS = 6  # that are named


def commands(folder: Path, shape: dict, dtype: str, steps: int) -> dict[str, list]:
    rollouts, problems = folder / "rollouts.jsonl", folder / "problems.jsonl"
    per_step = ["--problems-per-step", shape["rollouts"] // GROUP, "-n", GROUP, "--max-tokens", shape["tokens"]]
    common = ["--steps", steps, "--lr", "1e-5", "--dtype", dtype, "--tokens-per-batch", shape["positions"], "--save-every", 10**6, "-q"]
    guided = ["--teacher", folder / "teacher", "--student", folder / "policy"]
    return {
        "rollout": ["--model", folder / "teacher", folder / "few.jsonl", *per_step[2:], "-o", rollouts, "-q"],
        "grpo": ["--model", folder / "policy", problems, *per_step, *common, "--reward", "python:bench_train:parity"],
        "opd": [*guided, problems, *per_step, *common],
        "fkl-warmup": [*guided, "--rollouts", rollouts, "--mini-batch-size", shape["rollouts"], *common],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="at least 2")
    options = parser.parse_args()

    import torch
    from torch.profiler import ProfilerActivity, profile

    from s2dcli.cli import app

    torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    shape = SHAPES[options.shape]
    report = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, shape)
        lines = (folder / "problems.jsonl").read_text().splitlines(keepends=True)
        (folder / "few.jsonl").write_text("".join(lines[: shape["rollouts"] // GROUP]))
        for command, arguments in commands(folder, shape, options.dtype, options.steps).items():
            run = lambda out, command=command, arguments=arguments: app([command, *map(str, [*arguments, *out])], standalone_mode=False)  # noqa: E731
            if command == "rollout":
                run([])
                continue
            run(["-o", folder / command])
            rows = [json.loads(line) for line in (folder / command / "metrics.jsonl").read_text().splitlines()][1:]
            step = statistics.median(row["seconds"] for row in rows)
            phases = {key: statistics.median(row[key] for row in rows) / step for key in rows[0] if key.endswith("_seconds")}
            with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
                run(["-o", folder / f"{command}-again"])
            key = "self_device_time_total" if cuda else "self_cpu_time_total"
            events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
            total = sum(getattr(event, key) for event in events)
            operators = [f"{event.key.removeprefix('aten::')} {getattr(event, key) / total:.0%}" for event in events[:OPERATORS]]
            parts = [f"{phase.removesuffix('_seconds')} {share:.0%}" for phase, share in phases.items()]
            report.append((command, step, ", ".join(parts), ", ".join(operators)))
    sys.stdout = sys.stderr  # standard output belongs to the stages
    print(f"{options.shape}, {options.dtype}, {options.threads} threads\n\n| trainer | s/step | phases | operators |\n|---|---|---|---|")
    for command, step, phases, operators in report:
        print(f"| {command} | {step:.3f} | {phases} | {operators} |")


if __name__ == "__main__":
    main()
