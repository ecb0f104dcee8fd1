"""`s2d rollout` through the command line."""

import json
import os
import shutil
import signal
import tempfile
import time

import pytest
import torch
from conftest import read_jsonl, start, wait, write_jsonl

from s2dcli.files.manifest import sidecar

COLUMNS = [
    "schema",
    "problem_id",
    "problem_sha256",
    "group_id",
    "sample_index",
    "prompt",
    "completion",
    "answer",
    "prompt_ids",
    "completion_ids",
    "completion_logprobs",
    "finish_reason",
    "seed",
    "source",
    "sampler",
    "template_sha256",
    "reasoning_open",
]


@pytest.fixture(scope="module")
def rolled(s2d, toy, few):
    result = s2d("rollout", "--model", toy / "teacher", few, "-n", 3, "--max-tokens", 16)
    assert result.code == 0, result.err
    return result


def test_rows_hold_the_contracts_columns_in_input_order(rolled, few):
    rows = rolled.rows
    assert all(list(row) == COLUMNS for row in rows)
    expected = [(problem["id"], i) for problem in read_jsonl(few) for i in range(3)]
    assert [(row["group_id"], row["sample_index"]) for row in rows] == expected
    for row in rows:
        assert row["schema"] == "s2d.rollout/1"
        assert len(row["completion_ids"]) == len(row["completion_logprobs"])
        assert 0 <= row["seed"] < 2**53
        assert all(value <= 0 and round(value, 6) == value for value in row["completion_logprobs"])
        assert row["sampler"]["temperature"] == 1.0
        assert len(row["sampler"]["checkpoint"]) == 64


def test_an_answer_inside_reasoning_that_the_template_opened_is_none(s2d, toy, few, tmp_path):
    model = tmp_path / "thinker"
    shutil.copytree(toy / "teacher", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((model / name).read_text().replace("<|assistant|>", "<think>"))
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|assistant|>", "<think>"))
    done = s2d("rollout", "--model", model, few, "-n", 1, "--max-tokens", 16)
    assert done.code == 0, done.err
    assert all(row["reasoning_open"] is True for row in done.rows)
    rows = [{**row, "completion": rf"\boxed{{{row['answer']}}}"} for row in done.rows]
    for ends, reward in (("", 0.0), ("so </think>", 1.0)):
        given = b"".join(json.dumps({**row, "completion": ends + row["completion"]}).encode() + b"\n" for row in rows)
        graded = s2d("verify", stdin=given).rows
        assert [row["reward"] for row in graded] == [reward] * len(rows)
    assert all("<think> was never closed" in row["verify_error"] for row in s2d("verify", stdin=json.dumps(rows[0]).encode()).rows)


def test_stored_ids_are_what_a_chat_template_gives_and_the_text_decodes_from_them(rolled, toy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy / "teacher")
    for row in rolled.rows:
        assert row["prompt_ids"] == tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert row["completion"] == [{"role": "assistant", "content": tokenizer.decode(row["completion_ids"], skip_special_tokens=True)}]
        assert (row["completion_ids"][-1] == tokenizer.eos_token_id) == (row["finish_reason"] == "stop")


def test_log_probs_equal_plain_transformers(rolled, toy):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy / "teacher", dtype=torch.float64)
    for row in rolled.rows[:6]:
        ids = row["prompt_ids"] + row["completion_ids"]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(row["prompt_ids"])
        exact = [logprobs[first + t - 1, token].item() for t, token in enumerate(row["completion_ids"])]
        assert row["completion_logprobs"] == pytest.approx(exact, abs=2e-5)


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(s2d, toy, few, rolled, tmp_path):
    out = tmp_path / "again.jsonl"
    assert s2d("rollout", "-m", toy / "teacher", "-n", 3, "--max-tokens", 16, "-o", out, stdin=few.read_bytes()).code == 0
    assert out.read_bytes() == rolled.out
    other = s2d("rollout", "-m", toy / "teacher", few, "-n", 3, "--max-tokens", 16, "--seed", 1)
    assert other.code == 0
    assert [row["completion_ids"] for row in other.rows] != [row["completion_ids"] for row in rolled.rows]


def test_shards_put_together_are_the_whole(s2d, toy, few, tmp_path):
    sampling = ["-m", toy / "student", few, "-n", 2, "--max-tokens", 16, "--sample-tokens", 200]
    whole = s2d("rollout", *sampling)
    parts = [s2d("rollout", *sampling, "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert all(part.code == 0 and part.out for part in parts)
    assert b"".join(part.out for part in parts) == whole.out


def test_greedy_repeats_itself_whatever_the_seed(s2d, toy, few):
    first, second = (
        s2d("rollout", "-m", toy / "student", few, "-n", 1, "--temperature", 0, "--max-tokens", 16, "--seed", seed) for seed in (0, 5)
    )
    assert [row["completion_ids"] for row in first.rows] == [row["completion_ids"] for row in second.rows]
    assert first.rows[0]["sampler"]["logprobs_mode"] == "raw_logprobs"


def test_long_prompts_are_dropped_and_counted(s2d, toy, few, tmp_path):
    problems = read_jsonl(few)
    problems[2]["prompt"][0]["content"] = "7-1-5-6+4-5=7-1-5-6+4-5="
    path = write_jsonl(tmp_path / "problems.jsonl", problems)
    result = s2d("rollout", "-m", toy / "student", path, "-n", 1, "--max-tokens", 4, "--max-prompt-tokens", 14)
    assert "1 of 8 prompts are longer than 14 tokens" in result.err
    assert [row["problem_id"] for row in result.rows] == [p["id"] for i, p in enumerate(problems) if i != 2]


def test_plain_template_needs_no_template_of_the_model(s2d, toy, few, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in (toy / "student").iterdir():
        if path.name != "chat_template.jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    refused = s2d("rollout", "-m", bare, few, "-n", 1)
    assert refused.code == 2
    assert "no chat template; --chat-template plain" in refused.err
    plain = s2d("rollout", "-m", bare, few, "-n", 1, "--max-tokens", 4, "--chat-template", "plain")
    assert plain.code == 0, plain.err
    assert plain.rows[0]["sampler"]["template"] == "plain"
    assert len(plain.rows[0]["prompt_ids"]) == 12  # the digits and operators, no role tokens
    by_file = s2d("rollout", "-m", bare, few, "-n", 1, "--max-tokens", 4, "--chat-template", toy / "student" / "chat_template.jinja")
    assert len(by_file.rows[0]["prompt_ids"]) == 14


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-m", "{toy}/nowhere", "{few}"], 2, "no such checkpoint folder"),
        (["-m", "{toy}/problems", "{few}"], 1, "neither a checkpoint (no config.json) nor a run folder"),
        (["-m", "{toy}/teacher", "{tmp}/missing.jsonl"], 1, "missing.jsonl: cannot read problems: No such file"),
        (["-m", "{toy}/teacher", "{tmp}/half.jsonl"], 1, "half.jsonl:2: not a line of JSON"),
        (["-m", "{toy}/teacher", "{tmp}/typo.jsonl"], 1, "typo.jsonl:1: no field 'answer' (did you mean 'anwser'?)"),
        (["-m", "{toy}/teacher", "{tmp}/raw.jsonl"], 1, "s2d prepare"),
        (["-m", "{toy}/teacher", "{tmp}/twice.jsonl"], 1, "was already used at"),
        (["-m", "{toy}/teacher", "{tmp}/empty.jsonl"], 1, "holds no problems"),
        (["-m", "{toy}/teacher", "{few}", "-o", "{few}"], 2, "output exists; --overwrite"),
        (["-m", "{toy}/teacher", "{few}", "--shard", "3/2"], 2, "is not I/N"),
        (["-m", "{toy}/teacher", "{few}", "--device", "tpu9"], 2, "no such device"),
        (["-m", "{toy}/teacher", "{few}", "--chat-template-kwargs", "[1]"], 2, "must be a JSON object"),
    ],
)
def test_bad_input_gets_one_line_and_an_exit_code(s2d, toy, few, tmp_path, arguments, code, message):
    problem = read_jsonl(few)[0]
    good = json.dumps(problem)
    (tmp_path / "half.jsonl").write_text(good + "\n" + good[:40])
    (tmp_path / "typo.jsonl").write_text(good.replace('"answer"', '"anwser"'))
    (tmp_path / "raw.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "twice.jsonl").write_text(good + "\n" + good + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    filled = [argument.format(toy=toy, few=few, tmp=tmp_path) for argument in arguments]
    before = few.read_bytes()
    result = s2d("rollout", *filled)
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") == 1
    assert result.out == b""
    assert few.read_bytes() == before


def test_datasets_and_trl_read_what_was_written(rolled, tmp_path):
    import datasets
    from trl.data_utils import is_conversational

    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(rolled.out)
    table = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(table) == len(rolled.rows)
    assert table[0]["answer"] == rolled.rows[0]["answer"]
    assert table.features["answer"].dtype == "string"
    assert table.features["seed"].dtype == "int64"
    assert [row["seed"] for row in table] == [row["seed"] for row in rolled.rows]
    assert is_conversational(table[0])


def test_a_reader_that_leaves_is_no_failure(toy, few):
    read, write = os.pipe()
    with tempfile.TemporaryFile() as err, open(few, "rb") as given:
        pid = start(
            ["rollout", "-m", str(toy / "student"), "-", "-n", "64", "--max-tokens", "16", "--sample-tokens", "500", "-q"],
            given.fileno(),
            write,
            err.fileno(),
        )
        os.close(write)
        assert os.read(read, 100)
        os.close(read)
        assert wait(pid) == 0
        err.seek(0)
        assert err.read() == b""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_exit_code(toy, tmp_path, sent, code):
    out = tmp_path / "out.jsonl"
    with tempfile.TemporaryFile() as err, open(toy / "problems" / "1H.jsonl", "rb") as given, open(os.devnull, "wb") as null:
        arguments = ["rollout", "-m", str(toy / "student"), "-", "-n", "256", "--max-tokens", "16", "--sample-tokens", "1", "-o", str(out)]
        pid = start(arguments, given.fileno(), null.fileno(), err.fileno())
        while not (out.exists() and out.stat().st_size):
            time.sleep(0.02)
        os.kill(pid, sent)
        assert wait(pid) == code
        err.seek(0)
        assert b"Traceback" not in err.read()
    assert all(line.endswith(b"}\n") for line in out.read_bytes().splitlines(keepends=True))
    assert json.loads(sidecar(out).read_text())["complete"] is False


RESUMED = ["-n", 2, "--max-tokens", 8, "--sample-tokens", 120]  # two problems, four rows, to a batch


@pytest.fixture(scope="module")
def undisturbed(s2d, toy, few, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "rollouts.jsonl"
    assert s2d("rollout", "-m", toy / "student", few, *RESUMED, "-o", out).code == 0
    return out


def cut(undisturbed, out, num_bytes):
    """Make what a command leaves that is killed after writing some bytes."""
    out.write_bytes(undisturbed.read_bytes()[:num_bytes])
    manifest = json.loads(sidecar(undisturbed).read_text())
    sidecar(out).write_text(json.dumps({**manifest, "complete": False, "counts": {}, "output_sha256": ""}))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_a_resumed_file_has_the_bytes_of_an_undisturbed_one(s2d, toy, few, tmp_path, undisturbed, share):
    out = tmp_path / "rollouts.jsonl"
    cut(undisturbed, out, int(share * undisturbed.stat().st_size))
    result = s2d("rollout", "-m", toy / "student", few, *RESUMED, "-o", out, "--resume")
    assert result.code == 0, result.err
    assert out.read_bytes() == undisturbed.read_bytes()
    ours, theirs = (json.loads(sidecar(path).read_text()) for path in (out, undisturbed))
    for manifest in (ours, theirs):
        manifest["counts"].pop("seconds")
        manifest["options"].pop("resume")
        manifest["options"].pop("out")
    assert ours == theirs


def test_rows_of_a_batch_that_is_not_all_there_are_sampled_again(s2d, toy, few, tmp_path, undisturbed):
    out = tmp_path / "rollouts.jsonl"
    cut(undisturbed, out, len(b"".join(undisturbed.read_bytes().splitlines(keepends=True)[:7])))
    result = s2d("rollout", "-m", toy / "student", few, *RESUMED, "-o", out, "--resume")
    assert "16 rollouts (4 were there) of 8 problems" in result.err


def test_a_finished_file_is_left_as_it_is_without_a_model(s2d, toy, few, undisturbed):
    before = undisturbed.stat().st_mtime_ns
    result = s2d("rollout", "-m", toy / "student", few, *RESUMED, "-o", undisturbed, "--resume")
    assert (result.code, result.err) == (0, f"{undisturbed} is complete already\n")
    assert undisturbed.stat().st_mtime_ns == before


def test_what_was_piped_in_must_be_piped_in_again(s2d, toy, few, tmp_path, undisturbed):
    piped = ["rollout", "-m", toy / "student", "-", *RESUMED, "-o", tmp_path / "out.jsonl", "--resume"]
    assert s2d(*piped, stdin=few.read_bytes()).code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed.read_bytes()
    assert "is complete already" in s2d(*piped, stdin=few.read_bytes()).err
    other = s2d(*piped, stdin=b"".join(few.read_bytes().splitlines(keepends=True)[1:]))
    assert other.code == 2
    assert "input - is not what - was (another sha256)" in other.err


def test_a_shard_is_resumed_as_that_shard(s2d, toy, few, tmp_path, undisturbed):
    out = tmp_path / "shard.jsonl"
    shard = ["rollout", "-m", toy / "student", few, *RESUMED, "--shard", "2/2", "-o", out]
    assert s2d(*shard).code == 0
    whole = out.read_bytes()
    assert undisturbed.read_bytes().endswith(whole)
    cut(out, out, len(whole) // 2)
    other = s2d(*shard, "--resume", "--sample-tokens", 60)
    assert other.code == 2
    assert "--sample-tokens was 120, is 60" in other.err  # it decides what a shard holds
    assert s2d(*shard, "--resume").code == 0
    assert out.read_bytes() == whole


def test_resuming_other_work_is_refused_with_every_difference(s2d, toy, few, tmp_path, undisturbed):
    out = tmp_path / "rollouts.jsonl"
    cut(undisturbed, out, 1000)
    fewer = write_jsonl(tmp_path / "fewer.jsonl", read_jsonl(few)[:4])
    result = s2d("rollout", "-m", toy / "teacher", fewer, "-n", 3, "--max-tokens", 8, "--sample-tokens", 200, "-o", out, "--resume")
    assert result.code == 2
    for phrase in ("3 things differ", "-n was 2, is 3", f"input {fewer} is not what {few} was", "(other weights)"):
        assert phrase in result.err
    assert "only --device, --max-in-flight, --sample-tokens, --server-timeout may change" in result.err
    assert result.err.count("\n") == 1
    assert out.stat().st_size == 1000


def test_an_output_without_a_manifest_is_not_resumed(s2d, toy, few, tmp_path):
    (tmp_path / "out.jsonl").write_text("{}\n")
    result = s2d("rollout", "-m", toy / "student", few, "-o", tmp_path / "out.jsonl", "--resume")
    assert result.code == 2
    assert "without out.jsonl.s2d.json it is not known what made it" in result.err
