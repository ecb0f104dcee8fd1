"""What the runs of all.sh and controls.sh say of the paper's claims: a Markdown table on standard output.

    python claims.py OUT [WAY]        WAY is a way of evaluation of SETTINGS: sampled (the default), greedy

Each claim is a difference between two routes on the same problems, by `s2d compare`. With several seeds in OUT, seeds and problems
are both random; with one, problems only, and the interval holds for these trained models alone. A claim holds if the interval
of its difference lies above 0, does not hold if below, and is not resolved otherwise: then `detectable` says how large a difference
would have been found in 80 of 100 such comparisons. Claims whose routes were not run are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# What is claimed, the weaker route, the stronger one, and the difference in the paper's table: MATH-500, Qwen3-1.7B from 8B, points.
# Those with a star the paper has for all labels, here it is 1H.
CLAIMS = [
    ("raw-teacher transfer < direct GRPO", "raw", "r1", "+4.4"),
    ("direct GRPO < RL-teacher transfer", "r1", "r3", "+3.4"),
    ("same-size RL teacher < larger RL teacher", "same-size", "r3", "+2.8"),
    ("direct GRPO < same-size RL teacher", "r1", "same-size", "+0.6"),
    ("SFT teacher < RL teacher, before the student's RL", "bridge-sft", "bridge-1H", "+2.4 *"),
    ("SFT teacher < RL teacher, after it", "r6", "r5"),
    ("OPD only < bridge, before the student's RL", "opd-1H", "bridge-1H", "+1.7 *"),
    ("OPD only < bridge, after it", "r8", "r5"),
    ("sample SFT < bridge, before the student's RL", "sft-1H", "bridge-1H", "+3.3 *"),
    ("sample SFT < bridge, after it", "r2", "r5"),
    ("sample SFT < OPD only, before the student's RL", "sft-1H", "opd-1H", "+1.6 *"),
    ("sample SFT < OPD only, after it", "r2", "r8"),
    ("bridge, then nothing < GRPO on fresh labels", "bridge-1H", "r5", "+3.1"),
    ("GRPO on replayed labels < on fresh ones", "r7", "r5", "+2.8"),
    # controls.sh
    ("warm-up on wrong rollouts < on as many of any", "wrong", "any"),
    ("warm-up alone < bridge", "warmup-1H", "bridge-1H"),
    ("one negative advantage < the teacher's, after the warm-up", "negative", "bridge-1H"),
    ("warm-up alone < one negative advantage after it", "warmup-1H", "negative"),
    ("self-distillation < sample SFT, before the student's RL", "self-1H", "sft-1H"),
    ("self-distillation < bridge, before the student's RL", "self-1H", "bridge-1H"),
    ("self-distillation < bridge, after it", "self", "r5"),
]


def difference(out: Path, weaker: str, stronger: str, way: str) -> dict | None:
    """Compare two routes over the seeds that have both; None if no seed has."""
    folders = [f"{name}-{way}" for name in (weaker, stronger)]
    seeds = [seed for seed in sorted(out.glob("seed-*")) if all((seed / "eval" / name / "results.json").exists() for name in folders)]
    if not seeds:
        return None
    a, b = ([str(seed / "eval" / name) for seed in seeds] for name in folders)
    arguments = [*a, "--", *b] if len(seeds) > 1 else [*a, *b]
    done = subprocess.run(["s2d", "compare", "--json", "-q", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return {**json.loads(done.stdout), "count": len(seeds)}


def main(folder: str, way: str = "sampled") -> None:
    print("| claim | seeds | problems | difference, points | 95 % interval | p | says the evidence | detectable | paper |")
    print("|---|---:|---:|---:|---|---:|---|---:|---:|")
    for claim, weaker, stronger, *paper in CLAIMS:
        found = difference(Path(folder), weaker, stronger, way)
        if found is None:  # not run
            continue
        low, high = found["ci95"] or (0.0, 0.0)  # none where no problem differs
        verdict = "holds" if low > 0 else "does not hold" if high < 0 else "not resolved"
        cells = [
            claim,
            found["count"],
            found["problems"],
            f"{100 * found['difference']:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{found['p']:.2g}",
            verdict,
            "-" if found["detectable"] is None else f"{100 * found['detectable']:.1f}",
            *(paper or ["-"]),
        ]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
