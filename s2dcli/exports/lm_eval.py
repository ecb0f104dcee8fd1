"""lm-evaluation-harness: results_DATE.json and samples_TASK_DATE.jsonl in a folder named after the model.

Made after lm_eval 0.4.13 (`result_schema.py`, `loggers/evaluation_tracker.py`): what `lm_eval --output_path DIR --log_samples` writes,
so that what reads those reads these. A document is a problem; its k samples are the `repeats`, all in `resps`, what was extracted from them
in `filtered_resps`. `exact_match` is the share of right samples by s2d's verifier, which lm-eval's own filters may judge otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from s2dcli import __version__, stats
from s2dcli.exports.evaluated import Evaluated
from s2dcli.files.jsonl import dumps
from s2dcli.files.records import sha256_text, text_of

_UNSAFE = re.compile(r'["<>:/|\\?*\[\]]+')  # what lm-eval replaces in a model's name
FILTER = "none"


def write(evaluated: Evaluated, folder: Path) -> list[Path]:
    """Write both files below a folder; returns them."""
    found, date = evaluated.results, datetime.fromtimestamp(evaluated.when).isoformat().replace(":", "-")
    model_name = found["model"]
    place = folder / _UNSAFE.sub("__", model_name)
    place.mkdir(parents=True, exist_ok=True)
    task = re.sub(r"\W", "_", evaluated.task)
    samples, hashes = place / f"samples_{task}_{date}.jsonl", []
    with open(samples, "wb") as file:
        for sample in _samples(evaluated):
            hashes.append(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
            file.write(dumps(sample))
    results = place / f"results_{date}.json"
    results.write_text(json.dumps(_results(evaluated, task, sha256_text("".join(hashes))), indent=2) + "\n")
    return [results, samples]


def _generation(found: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {"do_sample": found["temperature"] > 0, "max_gen_toks": found["max_tokens"], "until": []}
    return {**arguments, **{name: found[name] for name in ("temperature", "top_p", "top_k")}}


def _results(evaluated: Evaluated, task: str, task_hash: str) -> dict[str, Any]:
    found = evaluated.results
    metrics = {"alias": task, "name": task, "sample_len": found["problems"]}
    for metric in evaluated.metrics:
        metrics |= {f"{metric.name},{FILTER}": metric.value, f"{metric.name}_stderr,{FILTER}": metric.error}
    names = [metric.name for metric in evaluated.metrics]
    return {
        "results": {task: metrics},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "dataset_path": evaluated.dataset,
                "test_split": evaluated.split,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "repeats": found["k"],
                "generation_kwargs": _generation(found),
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
                "metadata": {"version": 1.0, "verifier": evaluated.first.get("verifier", ""), "harness": f"s2d {__version__}"},
            }
        },
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(names, True)},
        "n-samples": {task: {"original": found["problems"], "effective": found["problems"]}},
        "config": {
            "model": "s2d",
            "model_args": {
                "pretrained": found["model"],
                "revision": found["revision"],
                "engine": evaluated.first["sampler"].get("engine", ""),
            },
            "model_revision": found["revision"],
            "model_sha": found["checkpoint"],
            "gen_kwargs": _generation(found),
            "limit": None,
            "bootstrap_iters": 0,
        },
        "git_hash": "",
        "date": evaluated.when,
        "transformers_version": metadata.version("transformers"),
        "task_hashes": {task: task_hash},
        "model_source": "s2d",
        "model_name": found["model"],
        "model_name_sanitized": _UNSAFE.sub("__", found["model"]),
        "system_instruction": None,
        "chat_template": found["template"],
        "total_evaluation_time_seconds": "" if found["seconds"] is None else str(found["seconds"]),
    }


def _samples(evaluated: Evaluated) -> Iterator[dict[str, Any]]:
    """Yield one document a problem; all its samples are needed, wherever in the file they are."""
    problems: dict[str, tuple[dict[str, Any], list[tuple[str, str, bool]]]] = {}
    for row in evaluated.rows():
        if row["problem_id"] not in problems:
            document = {"id": row["problem_id"], "problem_sha256": row["problem_sha256"], "problem": text_of(row["prompt"])}
            problems[row["problem_id"]] = ({**document, "answer": row["answer"]}, [])
        right = stats.is_right(row) is True
        problems[row["problem_id"]][1].append((text_of(row["completion"]), row.get("extracted", ""), right))
    generation, names = _generation(evaluated.results), [metric.name for metric in evaluated.metrics]
    for number, (document, samples) in enumerate(problems.values()):
        right = sum(correct for _, _, correct in samples)
        yield {
            "doc_id": number,
            "doc": document,
            "target": document["answer"],
            "arguments": {"gen_args_0": {"arg_0": document["problem"], "arg_1": generation}},
            "resps": [[text for text, _, _ in samples]],
            "filtered_resps": [[answer for _, answer, _ in samples]],
            "filter": FILTER,
            "metrics": names,
            "doc_hash": sha256_text(json.dumps(document, sort_keys=True)),
            "prompt_hash": sha256_text(document["problem"]),
            "target_hash": sha256_text(document["answer"]),
            **{name: _of_problem(name, right, samples, evaluated) for name in names},
        }


def _of_problem(name: str, right: int, samples: list[tuple[str, str, bool]], evaluated: Evaluated) -> float:
    """Return what one problem contributes to a metric."""
    if name == "exact_match":
        return right / len(samples)
    if name.startswith("pass@"):
        return stats.pass_at_k(len(samples), right, int(name.removeprefix("pass@")))
    return stats.vote(right, (answer for _, answer, correct in samples if answer and not correct), evaluated.canonical)
