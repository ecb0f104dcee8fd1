"""Memory of stored rollouts, in bytes a completion token: as training rows, and as the dictionaries that JSON gives.

python tests/bench/bench_rows.py [ROLLOUTS] [TOKENS]
"""

import gc
import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from s2dcli.assembly.rollouts import store
from s2dcli.files.records import Rollout

GROUP = 8


def rollouts(count: int, tokens: int):
    """Rollouts as they are read from a file, one after the other; ids and log-probs are objects of their own, as JSON makes them."""
    for index in range(count):
        yield Rollout(
            problem_id=f"p{index // GROUP}",
            problem_sha256=f"{index // GROUP:064x}",
            group_id=f"p{index // GROUP}",
            sample_index=index % GROUP,
            prompt=[{"role": "user", "content": "?" * 400}],
            completion=[{"role": "assistant", "content": "x" * (4 * tokens)}],
            answer="1",
            prompt_ids=[1000 + index // GROUP, *range(1000, 1100)],
            completion_ids=[int(str(1000 + t)) for t in range(tokens)],
            completion_logprobs=[-t / 7 for t in range(tokens)],
            finish_reason="stop",
            seed=index,
            source={},
            sampler={"max_tokens": tokens},
            template_sha256="0" * 64,
        )


def measured(make, tokens: int) -> float:
    gc.collect()
    tracemalloc.start()
    held = make()
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del held
    return size / tokens


def main() -> None:
    count, tokens = (int(argument) for argument in (sys.argv[1:] + ["512", "4000"][len(sys.argv) - 1 :]))
    rows = measured(lambda: store("rollouts.jsonl", rollouts(count, tokens)), count * tokens)
    records = measured(lambda: [rollout.to_record() for rollout in rollouts(min(count, 64), tokens)], min(count, 64) * tokens)
    print(f"{count} rollouts of {tokens} tokens: training rows {rows:.1f} bytes a token, dictionaries {records:.1f}")


if __name__ == "__main__":
    main()
