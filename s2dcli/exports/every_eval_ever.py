"""Every Eval Ever, schema 0.3.0: an aggregate record and one instance record for each graded sample.

    data/TASK/OWNER/MODEL/UUID.json           the evaluation, a result for each metric, with its standard error over problems
    data/TASK/OWNER/MODEL/UUID_samples.jsonl  what was asked, answered, extracted and judged, of the first metric

The paths are those of the project's data store, so the folder can be copied into a checkout of it. The schema is in the PyPI package
every-eval-ever. UUID is made from the results, so that the same evaluation is the same record. Who evaluated whom is not known
here: `source_organization_name` is "unknown" and the relationship "other" until someone says so.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2dcli import __version__, stats
from s2dcli.exports.evaluated import LOCAL, Evaluated, Metric, portable
from s2dcli.files.jsonl import dumps
from s2dcli.files.manifest import sha256_json
from s2dcli.files.records import text_of

SCHEMA_VERSION = "0.3.0"
CONFIDENCE = 1 - stats.SIGNIFICANT


def write(evaluated: Evaluated, folder: Path) -> list[Path]:
    """Write both files below a folder; returns them."""
    owner, model = evaluated.model
    task = portable(evaluated.task) or "evaluation"
    name = str(uuid.UUID(bytes=hashlib.sha256(sha256_json(dict(evaluated.results)).encode()).digest()[:16], version=4))
    place = Path("data", task, owner, model)
    (folder / place).mkdir(parents=True, exist_ok=True)
    samples, aggregate = place / f"{name}_samples.jsonl", place / f"{name}.json"
    evaluation_id = f"{task}/{owner}/{model}/{int(evaluated.when)}"
    digest, rows = hashlib.sha256(), 0
    with open(folder / samples, "wb") as file:
        for row in evaluated.rows():
            line = dumps(_instance(row, evaluation_id, f"{owner}/{model}", task))
            digest.update(line)
            rows += 1
            file.write(line)
    found = evaluated.results
    record = {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": evaluation_id,
        "evaluation_timestamp": str(int(evaluated.when)),
        "retrieved_timestamp": str(int(evaluated.when)),
        "source_metadata": {
            "source_name": "s2d eval",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {"name": "s2d", "version": __version__, "additional_details": {"verifier": evaluated.first.get("verifier", "")}},
        "model_info": {
            "name": found["name"],
            "id": f"{owner}/{model}",
            "developer": owner,
            "inference_engine": {"name": evaluated.first["sampler"].get("engine", "")},
            "additional_details": {
                "deployment_type": "self_deployed",
                "model_availability": "unknown" if owner == LOCAL else "open_weights",
                **{name: str(found[name]) for name in ("model", "revision", "checkpoint", "step")},
            },
        },
        "evaluation_results": [_result(evaluated, metric, task) for metric in evaluated.metrics],
        "detailed_evaluation_results": {
            "format": "jsonl",
            "file_path": samples.as_posix(),
            "hash_algorithm": "sha256",
            "checksum": digest.hexdigest(),
            "total_rows": rows,
        },
    }
    (folder / aggregate).write_text(json.dumps(record, indent=2) + "\n")
    return [folder / aggregate, folder / samples]


def _result(evaluated: Evaluated, metric: Metric, task: str) -> dict[str, Any]:
    found = evaluated.results
    source = {"dataset_name": task, "source_type": "other", "additional_details": {"dataset": evaluated.dataset, "split": evaluated.split}}
    if evaluated.on_hub:
        source = {"dataset_name": task, "source_type": "hf_dataset", "hf_repo": evaluated.dataset, "hf_split": evaluated.split}
        source["samples_number"] = found["problems"]
    uncertainty = {"standard_error": {"value": metric.error, "method": "analytic, over problems"}, "num_samples": found["problems"]}
    if metric.name == "exact_match" and found["ci95"]:
        low, high = found["ci95"]
        interval = {"lower": low, "upper": high, "confidence_level": CONFIDENCE, "method": "score interval with Student's t"}
        uncertainty["confidence_interval"] = interval
    return {
        "evaluation_result_id": metric.name,
        "evaluation_name": task,
        "source_data": source,
        "evaluation_timestamp": str(int(evaluated.when)),
        "metric_config": {
            "evaluation_description": metric.description,
            "metric_id": metric.name,
            "metric_name": metric.name,
            "metric_unit": "proportion",
            "metric_parameters": {"k": found["k"]},
            "lower_is_better": False,
            "score_type": "continuous",
            "min_score": 0.0,
            "max_score": 1.0,
        },
        "score_details": {"score": metric.value, "uncertainty": uncertainty},
        "generation_config": {
            "generation_args": {name: found[name] for name in ("temperature", "top_p", "top_k", "max_tokens")},
            "additional_details": {"samples_per_problem": str(found["k"]), "template": found["template"], "preset": found["preset"]},
        },
    }


def _instance(row: Mapping[str, Any], evaluation_id: str, model_id: str, task: str) -> dict[str, Any]:
    text, right = text_of(row["completion"]), stats.is_right(row) is True
    prompt_tokens, tokens = len(row["prompt_ids"]), len(row["completion_ids"])
    extracted = row.get("extracted", "")
    attribution = {"turn_idx": 0, "source": "output.raw", "extracted_value": extracted, "extraction_method": "last complete box"}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": evaluation_id,
        "model_id": model_id,
        "evaluation_name": task,
        "evaluation_result_id": "exact_match",
        "sample_id": row["problem_id"],
        "sample_hash": sha256_json({"raw": text_of(row["prompt"]), "reference": row["answer"]}),
        "interaction_type": "single_turn",
        "input": {"raw": text_of(row["prompt"]), "reference": [row["answer"]]},
        "output": {"raw": [text]},
        "messages": None,
        "answer_attribution": [{**attribution, "is_terminal": True}] if extracted else [],
        "evaluation": {"score": float(right), "is_correct": right},
        "token_usage": {"input_tokens": prompt_tokens, "output_tokens": tokens, "total_tokens": prompt_tokens + tokens},
        "error": row.get("verify_error") or None,
        "metadata": {
            "sample_index": str(row["sample_index"]),
            "finish_reason": row["finish_reason"],
            "seed": str(row["seed"]),
            "problem_sha256": row["problem_sha256"],
        },
    }
