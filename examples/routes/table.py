"""The routes' results, as the paper's table has them: Markdown on standard output.

    python table.py OUT [WAY...]        WAYs of evaluation of SETTINGS: sampled and greedy by default

A figure is the mean over the seeds in OUT of avg@k in per cent, ± its standard error over these seeds, or over problems where there is
one seed. Labels, tokens (sampled or learnt from) and minutes are those of all stages behind a result, each counted once, mean over seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from s2dcli import console
from s2dcli.files.ledger import behind
from s2dcli.report.collect import Result, read_results
from s2dcli.stats import mean, standard_error


class Row(NamedTuple):
    """A route: where labels went, how the student got what was learnt, its RL; and the paper's avg@16 on MATH-500 (Qwen3-1.7B from 8B)."""

    folder: str  # of its evaluations, before the way
    teacher: str
    transfer: str
    student_rl: str
    paper: str = "-"


ROWS = [
    Row("student", "none", "none", "none"),
    Row("teacher", "(the teacher at the start)", "", ""),
    Row("teacher-full", "(the RL teacher itself, 1H and 2H)", "", ""),
    Row("r1", "none", "none", "1H and 2H (R1)", "75.9"),
    Row("raw", "as it is", "bridge", "none", "71.5"),
    Row("same-size", "RL, as small, 1H and 2H", "bridge", "none", "76.5"),
    Row("r3", "RL, 1H and 2H", "bridge (R3-full)", "none", "79.3"),
    Row("bridge-sft", "SFT, 1H", "bridge", "none", "76.9 *"),
    Row("sft-1H", "RL, 1H", "sample SFT", "none", "76.0 *"),
    Row("opd-1H", "RL, 1H", "OPD only", "none", "77.6 *"),
    Row("bridge-1H", "RL, 1H", "bridge", "none", "75.4"),
    Row("r6", "SFT, 1H", "bridge", "2H (R6)"),
    Row("r2", "RL, 1H", "sample SFT", "2H (R2)"),
    Row("r8", "RL, 1H", "OPD only", "2H (R8)"),
    Row("r7", "RL, 1H", "bridge", "1H again (R7)", "75.7"),
    Row("r5", "RL, 1H", "bridge", "2H (R5-half)", "78.5"),
]


def results(out: Path, folder: str) -> list[Result]:
    """Return the result of every seed that has it."""
    runs = sorted(out.glob(f"seed-*/eval/{folder}"))
    return [result for run in runs if (run / "results.json").exists() for result in read_results(str(run))]


def rate(found: list[Result]) -> str:
    rates = [result.avg_at_k for result in found if result.avg_at_k is not None]
    if not rates:
        return "-"
    error = standard_error(rates) if len(rates) > 1 else found[0].se
    return f"{100 * mean(rates):.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def costs(result: Result) -> tuple[int, float, float]:
    """Return the labels, tokens and seconds behind a result."""
    records = behind(result.manifest, result.manifest["ancestors"]).values() if result.manifest else []
    return result.labels or 0, *(sum(record["counts"].get(count, 0) for record in records) for count in ("tokens", "seconds"))


def main(folder: str, *ways: str) -> None:
    console.configure(quiet=True, verbose=False, main=False)  # each reading would warn of the replay in R7
    out, ways = Path(folder), ways or ("sampled", "greedy")
    print(f"| teacher | transfer | RL of the student | {' | '.join(ways)} | paper, MATH-500 | labels | tokens | minutes | seeds |")
    print(f"|---|---|---|{'---:|' * len(ways)}---:|---:|---:|---:|---:|")
    for row in ROWS:
        found = {way: results(out, f"{row.folder}-{way}") for way in ways}
        first = next(iter(found.values()))
        if not first:
            continue
        labels, tokens, seconds = (mean(values) for values in zip(*map(costs, first), strict=True))
        rates = " | ".join(rate(found[way]) for way in ways)
        spent = f"{labels:,.0f} | {tokens / 1e6:.2f} M | {seconds / 60:.1f} | {len(first)}"
        print(f"| {row.teacher} | {row.transfer} | {row.student_rl} | {rates} | {row.paper} | {spent} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
