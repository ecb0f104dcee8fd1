"""What `s2d eval --export` writes, against the published formats and against the results."""

import hashlib
import json

import export_schemas as schemas
import pytest
import yaml
from conftest import read_jsonl, write_jsonl
from huggingface_hub import parse_eval_result_entries

EVERY = ["--export", "lm-eval", "--export", "every-eval-ever", "--export", "hub"]


@pytest.fixture(scope="module")
def graded(s2d, toy, tmp_path_factory):
    """Graded rollouts of a data set that has a hub id: 20 problems, 4 samples; one not graded, one with a null character."""
    folder = tmp_path_factory.mktemp("graded")
    problems = read_jsonl(toy / "problems" / "validation.jsonl")[:20]
    path = write_jsonl(folder / "problems.jsonl", problems)
    rolled = s2d("rollout", "-m", toy / "teacher", path, "-n", 4, "--max-tokens", 8).out
    rows = s2d("verify", stdin=rolled).rows
    rows[3] |= {"reward": None, "label": None, "verify_error": "timeout"}
    rows[5]["completion"] = [{"role": "assistant", "content": "\x00 <b>& 'ü'\n"}]
    rows = [{**row, "source": {**row["source"], "dataset": "openai/gsm8k", "split": "test"}} for row in rows]
    return write_jsonl(folder / "graded.jsonl", rows)


@pytest.fixture(scope="module")
def exported(s2d, graded, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "eval"
    result = s2d("eval", "--rollouts", graded, "-o", out, *EVERY)
    assert result.code == 0, result.err
    return out, result.result


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_lm_eval_files_have_the_harness_form_and_our_figures(exported, graded):
    out, found = exported
    results = json.loads(only(out, "export/lm-eval/*/results_*.json").read_text())
    samples = read_jsonl(only(out, "export/lm-eval/*/samples_gsm8k_*.jsonl"))
    assert schemas.errors(results, schemas.RESULTS) == []
    assert [schemas.errors(sample, schemas.SAMPLE) for sample in samples] == [[]] * 20
    task = results["results"]["gsm8k"]
    assert (task["exact_match,none"], task["exact_match_stderr,none"]) == (found["avg_at_k"], found["se"])
    assert (task["pass@4,none"], task["maj@4,none"]) == (found["pass_at_k"], found["maj_at_k"])
    for name in samples[0]["metrics"]:  # the documents' values make up the aggregate
        assert sum(sample[name] for sample in samples) / 20 == pytest.approx(task[f"{name},none"])
    assert (results["configs"]["gsm8k"]["dataset_path"], results["configs"]["gsm8k"]["repeats"]) == ("openai/gsm8k", 4)
    assert results["configs"]["gsm8k"]["generation_kwargs"]["max_gen_toks"] == 8
    rows = read_jsonl(graded)
    assert samples[1]["resps"] == [[row["completion"][0]["content"] for row in rows[4:8]]]
    hashed = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    assert results["task_hashes"]["gsm8k"] == hashlib.sha256(hashed.encode()).hexdigest()


def test_every_eval_ever_records_are_valid_and_belong_together(exported, graded):
    out, found = exported
    base = out / "export" / "every-eval-ever"
    aggregate = json.loads(only(base, "data/gsm8k/local/*/*.json").read_text())
    path = base / aggregate["detailed_evaluation_results"]["file_path"]
    instances = read_jsonl(path)
    assert schemas.errors(aggregate, schemas.EVAL) == []
    assert [error for instance in instances for error in schemas.errors(instance, schemas.INSTANCE)] == []
    told = aggregate["detailed_evaluation_results"]
    assert (told["total_rows"], told["checksum"]) == (80, hashlib.sha256(path.read_bytes()).hexdigest())
    assert {instance["evaluation_id"] for instance in instances} == {aggregate["evaluation_id"]}
    main, *others = aggregate["evaluation_results"]
    assert main["score_details"]["score"] == found["avg_at_k"] == sum(one["evaluation"]["score"] for one in instances) / 80
    uncertainty = main["score_details"]["uncertainty"]
    assert uncertainty["standard_error"]["value"] == found["se"]
    assert [uncertainty["confidence_interval"]["lower"], uncertainty["confidence_interval"]["upper"]] == found["ci95"]
    assert [one["evaluation_result_id"] for one in others] == ["pass@2", "pass@4", "maj@4"]
    assert main["source_data"] == {"dataset_name": "gsm8k", "source_type": "hf_dataset", "hf_repo": "openai/gsm8k", "hf_split": "test"} | {
        "samples_number": 20
    }
    rows = read_jsonl(graded)
    assert [instance["evaluation"]["is_correct"] for instance in instances] == [row["label"] is True for row in rows]
    assert (instances[3]["error"], instances[5]["output"]["raw"]) == ("timeout", [rows[5]["completion"][0]["content"]])


def test_the_hubs_own_reader_takes_its_file(exported):
    out, found = exported
    (entry,) = parse_eval_result_entries(yaml.safe_load(only(out, "export/hub/.eval_results/*.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", round(100 * found["avg_at_k"], 2))
    assert entry.notes.startswith(f"avg@4 in per cent, standard error over 20 problems {100 * found['se']:.2f}; T=1, top-p 1, top-k 0")


def test_a_finished_folder_is_exported_later_and_replaced_as_a_whole(s2d, graded, tmp_path, exported):
    out = tmp_path / "eval"
    first = s2d("eval", "--rollouts", graded, "-o", out)
    assert not (out / "export").exists()
    later = s2d("eval", "--rollouts", graded, "-o", out, "--resume", "--export", "hub")
    assert later.result == first.result
    assert (out / "export" / "hub" / ".eval_results" / "gsm8k.yaml").is_file()
    again = s2d("eval", "--rollouts", graded, "-o", out, "--overwrite", "--export", "lm-eval")
    assert again.code == 0, again.err
    assert sorted(path.name for path in (out / "export").iterdir()) == ["lm-eval"]
    (out / "export" / "lm-eval" / "mine.txt").write_text("kept")
    assert "did not write export/lm-eval/mine.txt" in s2d("eval", "--rollouts", graded, "-o", out, "--overwrite").err


def test_exports_that_cannot_be_are_refused(s2d, graded, toy, few, tmp_path):
    assert "--export needs a folder" in s2d("eval", "--rollouts", graded, "--export", "hub").err
    rows = [{**row, "source": {"dataset": "mine"}} for row in read_jsonl(graded)]
    local = s2d("eval", "--rollouts", write_jsonl(tmp_path / "local.jsonl", rows), "-o", tmp_path / "local", "--export", "hub")
    assert (local.code, "no hub id is known of the data set 'mine'" in local.err) == (1, True)
    assert (tmp_path / "local" / "results.json").is_file()  # what was measured is there
    early = s2d("eval", "-m", toy / "teacher", few, "-o", tmp_path / "early", "--export", "hub")
    assert (early.code, "no hub id is known of the data set 'toy-arithmetic'" in early.err) == (1, True)
    assert not (tmp_path / "early").exists()
    unlabelled = [{**row, "label": None, "reward": 2.5} for row in read_jsonl(graded)]
    none = s2d("eval", "--rollouts", write_jsonl(tmp_path / "none.jsonl", unlabelled), "-o", tmp_path / "none", "--export", "lm-eval")
    assert (none.code, "there is no score to export" in none.err) == (1, True)


def test_the_checks_find_what_is_wrong(exported):
    out, _ = exported
    aggregate = json.loads(only(out, "export/every-eval-ever/data/gsm8k/local/*/*.json").read_text())
    assert schemas.errors({**aggregate, "extra": 1}, schemas.EVAL) == [": extra is not allowed"]
    assert schemas.errors({**aggregate, "eval_library": {"name": "s2d"}}, schemas.EVAL)[0] == ".eval_library: no version"
    aggregate["evaluation_results"][0]["score_details"]["score"] = "high"
    assert "is not of type number" in schemas.errors(aggregate, schemas.EVAL)[0]
