"""Time and memory of `s2d eval --rollouts` and `s2d compare` on a million graded rows.

    python tests/bench/bench_eval.py                         # 62,500 problems, 16 samples of 64 tokens each: 2.4 GB in /tmp
    python tests/bench/bench_eval.py --problems 1000 --file rows.jsonl

The rows have the shape of `s2d rollout | s2d verify`: text, token ids, log-probs, sampler, verdict. How often a problem is solved
differs from problem to problem.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKENS = 64
TEXTS = 256  # different completions, drawn from
WORDS = ("let", "so", "thus", "hence", "then", "sum", "root", "line", "angle", "prime")
BOUND_SECONDS, BOUND_BYTES = 60, 500e6


def write_rows(path: Path, problems: int, k: int) -> None:
    draw = random.Random(0)
    sampler = {"model": "models/student", "revision": "", "step": 100, "checkpoint": "c" * 64, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    sampler |= {"max_tokens": TOKENS, "logprobs_mode": "processed_logprobs", "engine": "transformers", "template": "chat template"}
    ends = []
    for number in range(TEXTS):
        ids = [draw.randrange(150_000) for _ in range(TOKENS)]
        logprobs = [round(-draw.expovariate(2), 6) for _ in ids]
        text = " ".join(draw.choice(WORDS) for _ in range(40)) + f" \\boxed{{{number % 20}}}"
        fields = {
            "completion": [{"role": "assistant", "content": text}],
            "answer": "7",
            "completion_ids": ids,
            "completion_logprobs": logprobs,
            "finish_reason": "length" if number % 16 == 0 else "stop",
            "sampler": sampler,
            "template_sha256": "t" * 64,
            "reasoning_open": False,
            "extracted": str(number % 20),
            "verifier": "s2d.math/1",
            "verify_error": "",
        }
        ends.append(json.dumps(fields)[1:])
    with open(path, "w") as file:
        for problem in range(problems):
            chance = draw.betavariate(0.5, 0.5)
            name, prompt = f"problem-{problem}", json.dumps([{"role": "user", "content": f"What is {problem} + {problem} modulo 20? " * 3}])
            ids = json.dumps([draw.randrange(150_000) for _ in range(24)])
            for sample in range(k):
                right = draw.random() < chance
                verdict = f'"reward": {float(right)}, "rewards": {{"math": {float(right)}}}, "label": {json.dumps(right)}'
                file.write(
                    f'{{"schema": "s2d.rollout/1", "problem_id": "{name}", "problem_sha256": "{problem:064x}", "group_id": "{name}", '
                    f'"sample_index": {sample}, "seed": {draw.getrandbits(53)}, "prompt": {prompt}, "prompt_ids": {ids}, '
                    f'"source": {{"dataset": "bench", "split": "test", "index": {problem}}}, {verdict}, {draw.choice(ends)}\n'
                )


def measure(*arguments: str) -> tuple[float, float, float, str]:
    """Return seconds on the clock and of CPU time, peak resident bytes and the standard output of a command."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "s2dcli", *arguments], stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments[0]} failed")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=62_500)
    parser.add_argument("-k", type=int, default=16)
    parser.add_argument("--file", type=Path, help="where the rows are written to, or lie already")
    parser.add_argument("--compare", action="store_true", help="compare the file with itself too")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.file or Path(folder) / "graded.jsonl"
        if not path.exists():
            write_rows(path, arguments.problems, arguments.k)
        print(f"{arguments.problems * arguments.k:,} rows, {path.stat().st_size / 1e9:.2f} GB")
        commands = [("eval", "--rollouts", str(path)), *([("compare", "--json", str(path), str(path))] if arguments.compare else [])]
        for command in commands:
            seconds, cpu, peak, out = measure(*command)
            took = f"{seconds:.1f} s (bound {BOUND_SECONDS}), {cpu:.1f} s of CPU time"
            print(f"s2d {command[0]}: {took}, peak {peak / 1e6:.0f} MB (bound {BOUND_BYTES / 1e6:.0f})")
            print(out[:400])


if __name__ == "__main__":
    main()
