"""The hub's evaluation results: `.eval_results/TASK.yaml`, to be copied into a model's repository.

The format is that of huggingface.co/docs/hub/eval-results, whose reader and writer are huggingface_hub's `EvalResultEntry`. The value
is avg@k in per cent; how it was sampled and its standard error are in `notes`. A result belongs to a data set of the hub, and shows on its
leaderboard where the data set is registered as a benchmark with a task of that id.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from s2dcli.errors import DataError
from s2dcli.exports.evaluated import Evaluated, portable

DECIMALS = 2  # of per cent


def write(evaluated: Evaluated, folder: Path) -> list[Path]:
    """Write the file below a folder; returns it. Raises DataError if the data set is none of the hub's."""
    import yaml

    if not evaluated.on_hub:
        problem = f"no hub id is known of the data set {evaluated.dataset!r}, and the hub's results belong to one"
        raise DataError(problem, hint="evaluate a benchmark by name, or problems that s2d prepare made from a hub id")
    found, main = evaluated.results, evaluated.metrics[0]
    sampling = "greedy" if found["temperature"] == 0 else f"T={found['temperature']:g}, top-p {found['top_p']:g}, top-k {found['top_k']}"
    entry = {
        "dataset": {"id": evaluated.dataset, "task_id": evaluated.task},
        "value": round(100 * main.value, DECIMALS),
        "date": datetime.fromtimestamp(evaluated.when, UTC).date().isoformat(),
        "notes": f"avg@{found['k']} in per cent, standard error over {found['problems']} problems {100 * main.error:.{DECIMALS}f}; "
        f"{sampling}, at most {found['max_tokens']} tokens; zero-shot, answer in a box",
    }
    path = folder / ".eval_results" / f"{portable(evaluated.task)}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True))
    return [path]
