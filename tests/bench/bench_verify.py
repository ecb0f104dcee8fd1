r"""How fast and how safe grading is, beside plain math-verify in one process on the same rows.

    python tests/bench/bench_verify.py                 all tables
    python tests/bench/bench_verify.py throughput --groups 200
    python tests/bench/bench_verify.py throughput --answers problems.jsonl    with the answers of a real data set
    python tests/bench/bench_verify.py poison
    python tests/bench/bench_verify.py memory --rows 1000000

throughput: rollouts in groups of eight, half of them right and spelt in various ways. Plain
math-verify parses gold and completion and compares them, one row after the other, as its own
examples do. poison: two calls that no signal can interrupt among 1,600 rows; the bound is two
hard deadlines more than without them. memory: the supervisor's peak over many rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from s2dcli.grade.pool import Grader
from s2dcli.grade.supervisor import HARD_GRACE

GROUP = 8
FILLER = (
    "Let us set up the equation first. We have \\(a_1 = 3\\) and \\(a_{n+1} = 2a_n - 1\\), so that \\[a_n = 2^n + 1.\\] ",
    "Substituting back, we find $x^2 - 5x + 6 = (x-2)(x-3)$, which vanishes at $x = 2$ and at $x = 3$. ",
    "Wait, let me check that again: 12 + 30 = 42, and 42 / 6 = 7, so the intermediate result is 7. ",
    "By symmetry the two triangles are congruent, and the ratio of their areas is $\\frac{4}{9}$. ",
    "There are $\\binom{6}{2} = 15$ ways to choose the pair, of which 5 do not meet the condition. ",
)
# Gold answers with right and wrong spellings; the shares follow what competition sets hold.
INTEGERS = [
    (str(n), [str(n), str(n), f"x = {n}", f"{n}\\text{{ units}}"], [str(n + 1), str(n - 7), str(2 * n + 1)]) for n in range(3, 900, 7)
]
OTHERS = [
    (r"\frac{3}{7}", [r"\frac{3}{7}", r"\dfrac{3}{7}", "3/7", r"\frac{6}{14}"], [r"\frac{7}{3}", "0.43", r"\frac{3}{8}"]),
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}", r"2 \sqrt 3"], [r"3\sqrt{2}", "3.46", r"\sqrt{3}"]),
    (r"\frac{\pi}{6}", [r"\frac{\pi}{6}", r"\dfrac{1}{6}\pi", r"\pi/6"], [r"\frac{\pi}{3}", r"\frac{6}{\pi}", "30"]),
    (r"x^2+2x+1", [r"x^2+2x+1", r"(x+1)^2", r"1 + 2x + x^2"], [r"x^2+1", r"x^2-2x+1", r"(x+2)^2"]),
    ("(2,-3)", ["(2,-3)", r"\left(2, -3\right)", "(2.0, -3)"], ["(-3,2)", "(2,3)", "2,-3,1"]),
    (r"[0,\infty)", [r"[0,\infty)", r"\left[0, \infty\right)", r"[0, +\infty)"], [r"(0,\infty)", r"[0,1)", r"(-\infty,0]"]),
    ("1,3,5", ["1,3,5", "5, 3, 1", r"\{1,3,5\}"], ["1,3", "1,3,7", "1,5"]),
    (r"12\%", [r"12\%", "12", r"12\text{ percent}"], [r"1.2\%", "13", r"21\%"]),
    ("0.125", ["0.125", r"\frac18", "1/8"], ["0.12", "0.0125", r"\frac{1}{9}"]),
    (r"\text{even}", [r"\text{even}", "even", r"\textbf{even}"], [r"\text{odd}", "odd", r"\text{neither}"]),
    ("B", ["B", r"\text{B}", "(B)"], ["C", "A", r"\text{(D)}"]),
    (r"\frac{1+\sqrt{5}}{2}", [r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt{5}+1}{2}"], [r"\frac{1-\sqrt{5}}{2}", "1.6", r"\sqrt{5}"]),
]


def groups(number: int, answers: list[str], draw: random.Random) -> Iterator[dict]:
    """Yield rows of groups of eight completions of 1 to 2 kB each."""
    others = cycle(OTHERS)
    for group in range(number):
        if answers:
            gold = answers[group % len(answers)]
            right, wrong = [gold], [answers[(group + step) % len(answers)] for step in (1, 2, 3)]
        else:
            gold, right, wrong = draw.choice(INTEGERS) if draw.random() < 0.6 else next(others)
        for sample in range(GROUP):
            found = draw.choice(right if draw.random() < 0.5 else wrong)
            thoughts = "".join(draw.choices(FILLER, k=draw.randint(8, 16)))
            completion = f"{thoughts}The answer is \\(\\boxed{{{found}}}\\)."
            yield {"group_id": str(group), "sample_index": sample, "completion": completion, "answer": gold}


def plain(rows: list[dict]) -> list[bool]:
    """Grade as math-verify's own examples do."""
    from math_verify import parse, verify

    return [bool(verify(parse(f"\\boxed{{{row['answer']}}}"), parse(row["completion"]))) for row in rows]


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def throughput(options: argparse.Namespace) -> None:
    answers = [json.loads(line)["answer"] for line in Path(options.answers).read_text().splitlines()] if options.answers else []
    rows = list(groups(options.groups, answers, random.Random(0)))
    import math_verify  # noqa: F401  so that its import is in neither figure

    some = rows[: options.plain_rows]
    started = time.perf_counter()
    expected = plain(some)
    plain_rate = len(some) / (time.perf_counter() - started)
    with Grader(workers=options.workers) as grader:
        list(grader.grade(rows[:1]))
        started = time.perf_counter()
        verdicts = list(grader.grade(rows))
        rate = len(rows) / (time.perf_counter() - started)
        small = rows[:256]
        tiny = [{"answer": row["answer"], "completion": row["completion"][-60:]} for row in small]
        list(grader.grade(tiny))
        started = time.perf_counter()
        for _ in range(5):
            list(grader.grade(tiny))
        call = (time.perf_counter() - started) / 5
    differing = [(row, verdict, want) for row, verdict, want in zip(some, verdicts, expected, strict=False) if verdict["label"] is not want]
    table(
        f"throughput, {len(rows)} rows in groups of {GROUP}, {options.workers} workers",
        [
            ("", "rows/s", "factor"),
            ("math-verify, one process", f"{plain_rate:.0f}", "1.0"),
            ("s2d", f"{rate:.0f}", f"{rate / plain_rate:.1f}"),
            ("a call with 256 known rows", f"{call * 1000:.1f} ms", ""),
        ],
    )
    print(f"  {len(differing)} of {len(some)} verdicts differ from math-verify's")
    for gold, found, ours in sorted({(row["answer"], verdict["extracted"], str(verdict["label"])) for row, verdict, _ in differing}):
        print(f"    gold {gold!r}, answer {found!r}: here {ours}")


POISON = """
def grade(completion, answer, record):
    if record.get("poison"):
        sum(range(10**13))  # one step of C code: no signal handler runs until it ends
    return completion == answer
"""


def poison(options: argparse.Namespace) -> None:
    clean = [{"completion": "1", "answer": "1", "poison": False} for _ in range(1600)]
    dirty = [row | {"poison": at in (400, 1200)} for at, row in enumerate(clean)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "poisoned_reward.py").write_text(POISON)
        sys.path.insert(0, folder)
        seconds = []
        with Grader(["python:poisoned_reward:grade"], options.workers, timeout=options.timeout) as grader:
            list(grader.grade(clean[:1]))
            for rows in (clean, dirty):
                started = time.perf_counter()
                verdicts = list(grader.grade(rows))
                seconds.append(time.perf_counter() - started)
        sys.path.remove(folder)
    killed = [at for at, verdict in enumerate(verdicts) if verdict["verify_error"]]
    table(
        "poison, 1,600 rows, 2 of them uninterruptible",
        [
            ("hard deadline", f"{options.timeout + HARD_GRACE:.1f} s"),
            ("without them", f"{seconds[0]:.2f} s"),
            ("with them", f"{seconds[1]:.2f} s"),
            ("cost in hard deadlines", f"{(seconds[1] - seconds[0]) / (options.timeout + HARD_GRACE):.2f}"),
            ("rows with an error", f"{killed} ({verdicts[400]['verify_error']}, reward {verdicts[400]['reward']})"),
        ],
    )


def memory(options: argparse.Namespace) -> None:
    base = list(groups(100, [], random.Random(1)))
    with Grader(workers=options.workers) as grader:
        started = time.perf_counter()
        number = sum(1 for _ in grader.grade(islice(cycle(base), options.rows)))
        seconds = time.perf_counter() - started
        pid = grader.supervisor_pid
        peak = next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    table(
        f"memory, {number} rows",
        [("supervisor's peak", f"{int(peak) / 1000:.0f} MB"), ("rows/s", f"{number / seconds:.0f}"), ("caller's pid", str(os.getpid()))],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "throughput", "poison", "memory"], default="all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--groups", type=int, default=200, help="groups of eight rollouts")
    parser.add_argument("--plain-rows", type=int, default=400, help="rows that plain math-verify grades")
    parser.add_argument("--answers", help="JSONL with a field `answer`: real gold answers")
    parser.add_argument("--timeout", type=float, default=2.0, help="soft deadline in the poisoned batch, seconds")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the memory run")
    options = parser.parse_args()
    for name, bench in (("throughput", throughput), ("poison", poison), ("memory", memory)):
        if options.what in ("all", name):
            bench(options)


if __name__ == "__main__":
    main()
