"""A step of `s2d opd` by where its teacher is: in memory, on a real vLLM server of the same machine, in a cache.

    python examples/smollm2_convert.py --out models
    OMP_NUM_THREADS=1 python tests/bench/bench_served_teacher.py --teacher models/teacher --student models/student

Every way learns from the same stored rollouts of the student by KL over the teacher's 20 most likely ids. "step" is the median
of the steps but the first; "waiting" the share of the step's time in which the trainer waits for targets, the `wait_share` of
metrics.jsonl: on a server what its scoring takes beyond the updates that it overlaps with; from a cache the reading. "computing" is
the share that the trainer's own work on targets takes: in memory the teacher's forward pass, from hidden states the head and the top k.
"rest" is what is left of a step, and "CPU" the processor time of the trainer's thread in it, which tells the same on a machine that has
other work; the last column compares it with the teacher in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from s2dcli.assembly.served import ServedTeacher
from s2dcli.cli import app
from s2dcli.train.loop import Step
from s2dcli.train.teachers import CachedTeacher, LiveTeacher

EXAMPLES = Path(__file__).parents[2] / "examples"
START_SECONDS = 600.0
TOP_K = 20  # what a server gives unless it is started otherwise


class Clock:
    """Wall and thread time of the updates, and of the targets within them."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float, float]] = []  # of each update: wall, waited, computed, CPU of the rest
        self._waited = self._targets = self._targets_cpu = 0.0

    def around(self, targets: Callable) -> Callable:
        def timed(teacher, batch):
            wall, cpu, waited = time.perf_counter(), time.thread_time(), teacher.waited or 0.0
            try:
                return targets(teacher, batch)
            finally:
                self._targets += time.perf_counter() - wall
                self._targets_cpu += time.thread_time() - cpu
                self._waited += (teacher.waited or 0.0) - waited

        return timed

    def phase(self, phase: Callable) -> Callable:
        @contextlib.contextmanager
        def timed(step: Step, name: str) -> Iterator[None]:
            wall, cpu = time.perf_counter(), time.thread_time()
            self._waited = self._targets = self._targets_cpu = 0.0
            with phase(step, name):
                yield
            if name == "update":
                spent = time.thread_time() - cpu - self._targets_cpu
                self.steps.append((time.perf_counter() - wall, self._waited, self._targets - self._waited, spent))

        return timed


@contextlib.contextmanager
def server(model: Path, max_length: int) -> Iterator[str]:
    """Serve a model; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    program += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(max_length), "--max-logprobs", str(TOP_K)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url + "/health", timeout=5)
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(Path(log.name).read_text()[-3000:])
                time.sleep(0.5)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(*arguments: object) -> None:
    app([*map(str, arguments), "-q"], standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--problems", type=Path, default=EXAMPLES / "gsm8k_sample.jsonl", help="in GSM8K's layout")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clock, plain_phase = Clock(), Step.phase
    Step.phase = clock.phase(plain_phase)
    for kind in (LiveTeacher, ServedTeacher, CachedTeacher):
        kind.targets = clock.around(kind.targets)
    with tempfile.TemporaryDirectory() as name, server(given.teacher, 1024) as url:
        folder = Path(name)
        problems, rollouts = folder / "problems.jsonl", folder / "rollouts.jsonl"
        run("prepare", given.problems, "-o", problems)
        run("rollout", "-m", given.student, problems, "-n", given.samples, "--max-tokens", given.max_tokens, "-o", rollouts)
        ways = {"memory": ["--teacher", given.teacher], "server": ["--teacher", url]}
        for keep, more in (("top-k", ["--top-k", TOP_K]), ("hidden", [])):
            run("score", "-m", given.teacher, rollouts, "-o", folder / keep, "--keep", keep, *more)
            ways[f"cache, {keep}"] = ["--cache", folder / keep]
        count = len(problems.read_text().splitlines())
        updates = ["--problems-per-step", count, "--mini-batch-size", max(1, count * given.samples // 4), "--steps", given.steps]
        form = ["--estimator", "top-k", "--top-k", TOP_K, "--tokens-per-batch", 1024]
        print(f"{'teacher':16} {'step':>9} {'waiting':>8} {'computing':>10} {'rest':>9} {'CPU':>9}", file=sys.stderr)
        base = 0.0
        for number, (way, teacher) in enumerate(ways.items()):
            clock.steps.clear()
            out = folder / f"run{number}"
            run("opd", *teacher, "--student", given.student, "--rollouts", rollouts, *form, *updates, "-o", out)
            per_step = len(clock.steps) // given.steps
            steps = [
                [sum(part) for part in zip(*clock.steps[start : start + per_step], strict=True)]
                for start in range(per_step, len(clock.steps), per_step)
            ]
            wall, waited, computed, cpu = (statistics.median(values) for values in zip(*steps, strict=True))
            base = base or cpu
            kl = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["kl"]
            print(
                f"{way:16} {wall:7.2f} s {waited / wall:8.1%} {computed / wall:10.1%} {wall - waited - computed:7.2f} s {cpu:7.2f} s "
                f"{cpu / base - 1:+7.1%}   KL {kl:.4f}",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
