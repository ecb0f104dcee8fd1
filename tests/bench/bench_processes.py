"""Every trainer as one process and as 2 and 4 on the CPU: a table of what each holds, and of how equal their results are.

    python tests/bench/bench_processes.py [WORDS OF COMMANDS AND VARIANTS ...]

`weights`, `gradients` and `moments` are the bytes of the process that holds most, for a model of 14 million parameters.

`gradient` is the relative difference (the norm of it by the norm) of the first update's gradient, `metrics` the largest of any
figure of metrics.jsonl and evals.jsonl but times and the sampler's rounding, `weights` that of the checkpoint after two steps.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import processes  # noqa: E402 - after the path
from conftest import Launched  # noqa: E402

NUMBERS = (2, 4)


def memory() -> None:
    """Print what the process with most holds, by the number of processes, and its share of what one alone holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        processes.make_wide(folder)
        print(f"{'processes':<13} {'weights':>8} {'gradients':>10} {'moments':>8} {'MB in all':>10} {'share':>7}")
        for narrow in (False, True):
            kind = "bfloat16" if narrow else "float32"
            alone = 0
            for count in (1, *NUMBERS):
                most = max(processes.in_each(count, processes.held, folder, narrow, sharded=True), key=lambda held: held.total)
                alone = alone or most.total
                parts = [value / 1e6 for value in (most.weights, most.gradients, most.moments, most.total)]
                print(f"{count} {kind:<11} {parts[0]:8.1f} {parts[1]:10.1f} {parts[2]:8.1f} {parts[3]:10.1f} {most.total / alone:7.1%}")
        print(flush=True)


def equality(words: list[str]) -> None:
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes.make_inputs(folder, lambda *args, stdin=b"": Launched(1, list(args), stdin=stdin).wait()[0])
        print(f"{'command':<18} {'variant':<15} {'processes':<13} {'gradient':>9} {'metrics':>9} {'weights':>9}")
        for variant in processes.VARIANTS:
            for number, (command, arguments) in enumerate(processes.commands(folder, variant).items()):
                if words and not any(word in f"{command} {variant}" for word in words):
                    continue
                one = folder / f"{variant}-{number}"
                alone = processes.start(1, arguments, one).wait()[0]
                if alone.code:
                    print(f"{command:<18} {variant:<15} {alone.err.strip()}")
                    continue
                for count, sharded in itertools.product(NUMBERS, (False, True)):
                    several = folder / f"{variant}-{number}-{count}-{sharded}"
                    results = processes.start(count, arguments, several, sharded=sharded).wait()
                    how = f"{count} {'FSDP2' if sharded else 'DDP'}"
                    if any(result.code for result in results):
                        print(f"{command:<18} {variant:<15} {how:<13} {' | '.join(result.err.strip() for result in results)}", flush=True)
                        continue
                    found = processes.compare(one, several)
                    worst = max(worst, found.gradient, found.metrics, found.weights)
                    figures = f"{found.gradient:9.1e} {found.metrics:9.1e} {found.weights:9.1e}"
                    print(f"{command:<18} {variant:<15} {how:<13} {figures}", flush=True)
    print(f"largest: {worst:.1e}")


if __name__ == "__main__":
    memory()
    equality(sys.argv[1:])
