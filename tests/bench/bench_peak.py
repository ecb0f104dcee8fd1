"""The share of the machine's matrix-product peak that a whole training step reaches, and each of its parts.

    python tests/bench/bench_peak.py --shape wide                                on a CPU
    python tests/bench/bench_peak.py --shape wide --rollouts 8 --steps 2         a short one
    python tests/bench/bench_peak.py --shape qwen3-1.7b --dtype bfloat16         on a GPU

Shapes and random checkpoints are those of bench_train.py. Arithmetic is counted as what the method needs, with B parameters
without embedding and head, V * D of the head, C completion tokens of a step, and P positions: the completions' and each
group's prompt once:

    sampling     2 B P + 2 V D C
    forward      2 B P, distillation twice that: the teacher's too
    loss         6 V D C: logits, their gradient's products with head and states; distillation 8 V D C: the teacher's logits too
    backward     4 B P
    optimizer    0: it is bound by memory
    rest         0: grading, batching, metrics

Attention's products, padding, and what is computed twice count as nothing. The peak is the best of several products of
square matrices in the same type, in the same process. Seconds are CPU seconds of this process on a CPU, where other work would
falsify wall time, and wall time on a GPU, which is waited for at the end of each part.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # the grader's processes import the reward

from bench_train import GROUP, SHAPES, make, run_s2d  # noqa: E402 - after the path

if TYPE_CHECKING:
    import torch

PROMPT = 14  # tokens, as `make` writes them
PEAK_SIZE, PEAK_SIZE_GPU = 2048, 8192  # of the matrices that the peak is measured with
PEAK_REPEATS = 6
PARTS = ("sampling", "forward", "loss", "backward", "optimizer", "rest")


class Clock:
    """Seconds spent in each part, those of parts called within a part not counted twice."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._within: list[float] = [0.0]  # seconds of parts inside each part that is open

    def now(self) -> float:
        import torch

        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, part: str, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            self._within.append(0.0)
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.now() - start
                self.seconds[part] += spent - self._within.pop()
                self._within[-1] += spent

        return run

    def install(self) -> None:
        """Time the functions of s2d and torch that are the parts of a step."""
        import torch

        from s2dcli.engines.transformers import TransformersEngine
        from s2dcli.models.policy import Policy
        from s2dcli.train import vocab
        from s2dcli.train.optimizer import MasterOptimizer

        for part, owner, name in (
            ("sampling", TransformersEngine, "_sample_batch"),
            ("forward", Policy, "_states"),
            ("loss", vocab, "_apply"),
            ("backward", torch.Tensor, "backward"),
            ("optimizer", MasterOptimizer, "clip"),
            ("optimizer", MasterOptimizer, "step"),
        ):
            setattr(owner, name, self.timed(part, getattr(owner, name)))


def peak(dtype: torch.dtype, device: str, clock: Clock) -> float:
    """FLOP a second of square matrix products."""
    import torch

    size = PEAK_SIZE_GPU if clock.cuda else PEAK_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(PEAK_REPEATS):
        start = clock.now()
        left @ right
        seconds.append(clock.now() - start)
    return 2 * size**3 / min(seconds)


def flops(method: str, shape: dict) -> dict[str, float]:
    """What a step needs; see above."""
    width = shape["heads"] * shape["head_dim"], shape.get("kv_heads", shape["heads"]) * shape["head_dim"]
    layer = 2 * shape["hidden"] * sum(width) + 3 * shape["hidden"] * shape["mlp"]
    body, head = shape["layers"] * layer, shape["vocabulary"] * shape["hidden"]
    completion = shape["rollouts"] * shape["tokens"]
    positions = completion + shape["rollouts"] // GROUP * PROMPT
    opd = method == "opd"
    needed = {
        "sampling": 2 * body * positions + 2 * head * completion,
        "forward": (4 if opd else 2) * body * positions,
        "loss": (8 if opd else 6) * head * completion,
        "backward": 4 * body * positions,
    }
    return {part: needed.get(part, 0) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--method", choices=["grpo", "opd"], help="default: both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="at least 2; the first is left out")
    parser.add_argument("--rollouts", type=int, help=f"of a step, a multiple of {GROUP}; default: the shape's")
    options = parser.parse_args()

    import torch

    from s2dcli.files.run_folder import RunFolder

    torch.set_num_threads(options.threads)
    clock = Clock(torch.cuda.is_available())
    shape = {**SHAPES[options.shape], "steps": options.steps}
    shape["rollouts"] = options.rollouts or shape["rollouts"]
    most = peak(getattr(torch, options.dtype), "cuda" if clock.cuda else "cpu", clock)
    clock.install()
    marks: list[tuple[float, dict[str, float]]] = []
    add_row = RunFolder.add_row

    def marked(folder, row):
        marks.append((clock.now(), dict(clock.seconds)))
        add_row(folder, row)

    RunFolder.add_row = marked
    kind = "wall" if clock.cuda else "CPU"
    told = sys.stderr  # standard output belongs to the stages
    print(
        f"{options.shape}, {shape['rollouts']} rollouts, {options.dtype}, {options.threads} threads; peak {most / 1e9:,.0f} GFLOP/s\n",
        file=told,
    )
    print(f"| method | part | {kind} s a step | share of the step | GFLOP | share of the peak |\n{'|---' * 6}|", file=told)
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), shape)
        for method in [options.method] if options.method else ["grpo", "opd"]:
            marks.clear()
            run_s2d(Path(name), method, shape, options.dtype)
            spent = {part: [] for part in (*PARTS, "step")}
            for (start, before), (end, after) in itertools.pairwise(marks):
                parts = {part: after[part] - before[part] for part in PARTS}
                parts["rest"] = end - start - sum(parts.values())
                for part, seconds in {**parts, "step": end - start}.items():
                    spent[part].append(seconds)
            needed, step = flops(method, shape), statistics.median(spent["step"])
            for part, count in {**needed, "step": sum(needed.values())}.items():
                seconds = statistics.median(spent[part])
                share = count / seconds / most if seconds else 0.0
                print(
                    f"| {method} | {part} | {seconds:.3f} | {seconds / step:.0%} | {count / 1e9:,.1f} | {share:.0%} |",
                    file=told,
                    flush=True,
                )


if __name__ == "__main__":
    main()
