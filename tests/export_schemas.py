"""The published formats in short, as JSON schemas, and a check of the keywords that they use.

EVAL and INSTANCE say what Every Eval Ever 0.3.0 requires and forbids of the records that are written here (of its
eval.schema.json and instance_level_eval.schema.json); RESULTS and SAMPLE say what lm_eval 0.4.13 writes (result_schema.py).
"""

import re
from typing import Any

TEXT, NUMBER, WHOLE, FLAG = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def exactly(required: dict, optional: dict | None = None) -> dict:
    """An object with these fields and no other ones."""
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}, "additionalProperties": False}


def holds(required: dict) -> dict:
    """An object with these fields, among others."""
    return {"type": "object", "required": list(required), "properties": required}


def many(items: dict) -> dict:
    return {"type": "array", "items": items}


DETAILS = {"type": "object", "additionalProperties": TEXT}  # all values are texts
BETWEEN = {"lower": NUMBER, "upper": NUMBER, "confidence_level": {"type": "number", "minimum": 0, "maximum": 1}, "method": TEXT}
SOURCE = {
    "oneOf": [
        exactly(
            {"dataset_name": TEXT, "source_type": {"enum": ["hf_dataset"]}},
            {"hf_repo": TEXT, "hf_split": TEXT, "samples_number": WHOLE, "additional_details": DETAILS},
        ),
        exactly({"dataset_name": TEXT, "source_type": {"enum": ["other"]}}, {"additional_details": DETAILS}),
    ]
}
METRIC = {
    "lower_is_better": FLAG,
    "score_type": {"enum": ["continuous"]},  # which requires both bounds
    "min_score": NUMBER,
    "max_score": NUMBER,
    "metric_id": TEXT,
    "metric_name": TEXT,
    "metric_unit": TEXT,
    "evaluation_description": TEXT,
    "metric_parameters": {"type": "object"},
}
UNCERTAINTY = {"standard_error": holds({"value": NUMBER, "method": TEXT}), "num_samples": WHOLE, "confidence_interval": holds(BETWEEN)}
GENERATION = exactly({}, {"temperature": NUMBER, "top_p": NUMBER, "top_k": NUMBER, "max_tokens": {"type": "integer", "minimum": 1}})
RESULT = {
    "evaluation_result_id": TEXT,
    "evaluation_name": TEXT,
    "source_data": SOURCE,
    "evaluation_timestamp": TEXT,
    "metric_config": exactly(METRIC),
    "score_details": exactly({"score": NUMBER, "uncertainty": exactly({}, UNCERTAINTY)}),
    "generation_config": exactly({"generation_args": GENERATION, "additional_details": DETAILS}),
}
MODEL = {
    "name": TEXT,
    "id": TEXT,
    "developer": TEXT,
    "inference_engine": holds({"name": TEXT}),
    "additional_details": {**DETAILS, "required": ["deployment_type", "model_availability"]},
}
EVAL = exactly(
    {
        "schema_version": {"enum": ["0.3.0"]},
        "evaluation_id": TEXT,
        "evaluation_timestamp": {"type": "string", "pattern": r"\d+"},
        "retrieved_timestamp": {"type": "string", "pattern": r"\d+"},
        "source_metadata": exactly(
            {
                "source_name": TEXT,
                "source_type": {"enum": ["evaluation_run"]},
                "source_organization_name": TEXT,
                "evaluator_relationship": {"enum": ["first_party", "third_party", "collaborative", "other"]},
            }
        ),
        "eval_library": exactly({"name": TEXT, "version": TEXT, "additional_details": DETAILS}),
        "model_info": exactly(MODEL),
        "evaluation_results": many(exactly(RESULT)),
        "detailed_evaluation_results": exactly(
            {
                "format": {"enum": ["jsonl"]},
                "file_path": {"type": "string", "pattern": rf"data/[^/]+/[^/]+/[^/]+/{UUID4}_samples\.jsonl"},
                "hash_algorithm": {"enum": ["sha256", "md5"]},
                "checksum": TEXT,
                "total_rows": WHOLE,
            }
        ),
    }
)
ATTRIBUTION = {"turn_idx": WHOLE, "source": TEXT, "extracted_value": TEXT, "extraction_method": TEXT, "is_terminal": FLAG}
INSTANCE = exactly(
    {
        "schema_version": {"enum": ["0.3.0"]},
        "evaluation_id": TEXT,
        "model_id": TEXT,
        "evaluation_name": TEXT,
        "evaluation_result_id": TEXT,
        "sample_id": TEXT,
        "sample_hash": TEXT,
        "interaction_type": {"enum": ["single_turn"]},  # which requires an output and forbids messages
        "input": exactly({"raw": TEXT, "reference": many(TEXT)}),
        "output": exactly({"raw": many(TEXT)}),
        "messages": {"type": "null"},
        "answer_attribution": many(exactly(ATTRIBUTION)),
        "evaluation": exactly({"score": NUMBER, "is_correct": FLAG}),
        "token_usage": exactly({"input_tokens": WHOLE, "output_tokens": WHOLE, "total_tokens": WHOLE}),
        "error": {"type": ["string", "null"]},
        "metadata": DETAILS,
    }
)
RESULTS = holds(
    {
        "results": {"type": "object", "additionalProperties": holds({"name": TEXT, "alias": TEXT, "sample_len": WHOLE})},
        "group_subtasks": {"type": "object", "additionalProperties": many(TEXT)},
        "configs": {
            "type": "object",
            "additionalProperties": holds({"task": TEXT, "dataset_path": TEXT, "metric_list": many(holds({"metric": TEXT}))}),
        },
        "versions": {"type": "object", "additionalProperties": NUMBER},
        "n-shot": {"type": "object", "additionalProperties": WHOLE},
        "higher_is_better": {"type": "object", "additionalProperties": {"type": "object", "additionalProperties": FLAG}},
        "n-samples": {"type": "object", "additionalProperties": exactly({"original": WHOLE, "effective": WHOLE})},
        "config": holds({"model": TEXT, "model_args": {"type": "object"}, "model_revision": TEXT, "model_sha": TEXT}),
        "git_hash": TEXT,
        "date": NUMBER,
        "transformers_version": TEXT,
        "task_hashes": {"type": "object", "additionalProperties": TEXT},
        "model_source": TEXT,
        "model_name": TEXT,
        "model_name_sanitized": TEXT,
        "system_instruction": {"type": ["string", "null"]},
        "chat_template": TEXT,
        "total_evaluation_time_seconds": TEXT,
    }
)
SAMPLE = holds(
    {
        "doc_id": WHOLE,
        "doc": {"type": "object"},
        "target": TEXT,
        "arguments": exactly({"gen_args_0": exactly({"arg_0": TEXT, "arg_1": {"type": "object"}})}),
        "resps": many(many(TEXT)),
        "filtered_resps": many(many(TEXT)),
        "filter": TEXT,
        "metrics": many(TEXT),
        "doc_hash": TEXT,
        "prompt_hash": TEXT,
        "target_hash": TEXT,
    }
)

_TYPES = {"string": str, "number": (int, float), "integer": int, "boolean": bool, "object": dict, "array": list, "null": type(None)}


def errors(value: Any, schema: dict, where: str = "") -> list[str]:
    """Return what of a value a schema does not allow; [] if it is valid."""
    if "oneOf" in schema:
        valid = [not errors(value, one, where) for one in schema["oneOf"]]
        return [] if sum(valid) == 1 else [f"{where}: {sum(valid)} alternatives fit"]
    names = schema.get("type", [])
    kinds = [_TYPES[name] for name in ([names] if isinstance(names, str) else names)]
    if kinds and not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in kinds):
        return [f"{where}: {value!r} is not of type {names}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        found.append(f"{where}: {value!r} does not match")
    if ("minimum" in schema and value < schema["minimum"]) or ("maximum" in schema and value > schema["maximum"]):
        found.append(f"{where}: {value!r} is out of range")
    if isinstance(value, list):
        found += [error for number, item in enumerate(value) for error in errors(item, schema.get("items", {}), f"{where}[{number}]")]
    if isinstance(value, dict):
        found += [f"{where}: no {name}" for name in schema.get("required", []) if name not in value]
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, item in value.items():
            if name in properties or others is not False:
                found += errors(item, properties.get(name, others or {}), f"{where}.{name}")
            else:
                found.append(f"{where}: {name} is not allowed")
    return found
