"""Seconds of a training step with sampling before it (--async-depth 0) and during the one before (1), by a `vllm serve` on this machine.

    python tests/bench/bench_async.py [--teacher CKPT --student CKPT] [--steps 8] [--pairs 3] [-- OPTIONS OF s2d opd]

The student is a random one of 14 million parameters unless given. Server and trainer have a thread each. Runs alternate; a run's
figure is the median over its steps but the first two, which start up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import read_jsonl  # noqa: E402 - after the path
from engines.test_server import VllmServer  # noqa: E402
from processes import make_wide  # noqa: E402


def run(depth: int, server: VllmServer, given: argparse.Namespace, out: Path) -> tuple[float, float]:
    """Train; returns the medians of the seconds of a step, and of those in which it waited for samples."""
    problems = TESTS.parent / "examples" / "toy" / "problems" / "1H.jsonl"
    how = ["--engine", server.url, "--async-depth", depth, "--steps", given.steps, "--save-every", 1000, "-q"]
    pair = ["--teacher", given.teacher, "--student", given.student]
    command = [sys.executable, "-m", "s2dcli", "opd", *pair, problems, "-o", out, *how, *given.options]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, cwd=TESTS.parent)
    rows = read_jsonl(out / "metrics.jsonl")[2:]
    return tuple(statistics.median(row[name] for row in rows) for name in ("seconds", "sample_seconds"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default=str(TESTS.parent / "examples" / "toy" / "teacher"))
    parser.add_argument("--student")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("options", nargs="*", default=["--max-tokens", "32", "-n", "8", "--problems-per-step", "8", "--lr", "1e-5"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.student is None:
            given.student = str(folder / "student")
            make_wide(folder / "student")
        server = VllmServer(folder, "--worker-extension-cls", "s2dcli.engines.vllm_worker.WorkerExtension", "--model", given.student)
        server.start()
        try:
            server.wait()
            ratios = []
            for pair in range(given.pairs):
                (before, waited), (during, still) = (run(depth, server, given, folder / f"{pair}-{depth}") for depth in (0, 1))
                ratios.append(before / during)
                print(f"a step at depth 0: {before:.2f} s, sampling {waited:.2f}; at 1: {during:.2f} s, waiting {still:.2f}", flush=True)
            print(f"median of the ratios: {statistics.median(ratios):.2f}")
        finally:
            server.kill()


if __name__ == "__main__":
    main()
