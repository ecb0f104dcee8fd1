"""Forms of distillation through the command lines of opd and fkl-warmup."""

import json

import pytest
import torch
import typer
from conftest import read_jsonl, swap_two_tokens, write_jsonl

from s2dcli.errors import UsageError
from s2dcli.options import expand
from s2dcli.stages.fkl_warmup import fkl_warmup
from s2dcli.stages.opd import opd

SHORT = ["--steps", 2, "--problems-per-step", 8, "-n", 2, "--max-tokens", 16, "--lr", "1e-3", "-q"]


@pytest.fixture(scope="module")
def mixed(few, tmp_path_factory):
    """Eight problems, five of them of a second source."""
    rows = read_jsonl(few)
    for row in rows[3:]:
        row["source"] = {**row["source"], "dataset": "other"}
    return write_jsonl(tmp_path_factory.mktemp("mixed") / "problems.jsonl", rows)


@pytest.fixture(scope="module")
def rollouts(s2d, toy, mixed, tmp_path_factory):
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.jsonl"
    assert s2d("rollout", "-m", toy / "teacher", mixed, "-n", 4, "--max-tokens", 16, "-o", path).code == 0
    return path


@pytest.fixture(scope="module")
def cache(s2d, toy, rollouts, tmp_path_factory):
    """A cache of the 5 most likely ids at temperature 1."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    assert s2d("score", "-m", toy / "teacher", rollouts, "-o", path, "--top-k", 5).code == 0
    return path


@pytest.fixture(scope="module")
def models(toy):
    from transformers import AutoModelForCausalLM

    return {name: AutoModelForCausalLM.from_pretrained(toy / name, dtype=torch.float64) for name in ("student", "teacher")}


def dense(models, rows, value, tokens=None) -> float:
    """Mean over the first `tokens` completion tokens of each row of `value(log p of the student, log q of the teacher)`, float64."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        at = slice(len(row["prompt_ids"]) - 1, -1)
        with torch.no_grad():
            log_p, log_q = (models[name](input_ids=ids).logits[0, at][:tokens] for name in ("student", "teacher"))
        values = value(log_p, log_q, row)
        total, count = total + values.sum().item(), count + len(values)
    return total / count


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(beta):
    def value(logits_p, logits_q, _):
        log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)

    return value


def reverse_kl(logits_p, logits_q, _):
    return kl(logits_p.log_softmax(-1), logits_q.log_softmax(-1))


def forward_kl_at(temperature):
    return lambda logits_p, logits_q, _: kl((logits_q / temperature).log_softmax(-1), logits_p.log_softmax(-1))


def mixture(weight):
    """The toy student is the reference."""

    def value(logits_p, logits_q, _):
        log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
        return kl(log_p, (log_p + weight * (log_q - log_p)).log_softmax(-1))

    return value


def by_source(logits_p, logits_q, row):
    """The second source's teacher is the student itself."""
    value = kl(logits_p.log_softmax(-1), logits_q.log_softmax(-1))
    return value * (row["source"]["dataset"] != "other")


@pytest.mark.parametrize(
    ("command", "options", "name", "value", "tokens"),
    [
        ("opd", ["--divergence", "jsd", "--jsd-beta", 0.2, "--loss-tokens", 3], "jsd", jsd(0.2), 3),
        ("opd", ["--divergence", "forward-kl", "--teacher-temperature", 0.5], "kl", forward_kl_at(0.5), None),
        ("opd", ["--task-reward-weight", 1.8, "--reference", "{toy}/student"], "kl", mixture(1.8), None),
        ("opd", ["several"], "kl", by_source, None),
        ("fkl-warmup", ["--divergence", "reverse-kl", "--loss-tokens", 4], "kl", reverse_kl, 4),
        ("fkl-warmup", ["several", "--divergence", "reverse-kl"], "kl", by_source, None),
    ],
)  # fmt: skip
def test_the_first_divergence_equals_a_dense_float64_one(
    s2d, toy, models, mixed, rollouts, tmp_path, command, options, name, value, tokens
):
    teacher = ["--teacher", toy / "teacher"]
    if options[0] == "several":
        teacher, options = ["--teacher", f"toy-arithmetic={toy / 'teacher'}", "--teacher", f"other={toy / 'student'}"], options[1:]
    out, options = tmp_path / "run", [str(option).format(toy=toy) for option in options]
    if command == "opd":
        result = s2d("opd", *teacher, "--student", toy / "student", mixed, *options, "-o", out, *SHORT, "--steps", 1, "--keep-rollouts")
        rows = read_jsonl(out / "rollouts" / "step-000001.jsonl") if result.code == 0 else []
    else:
        result = s2d("fkl-warmup", *teacher, "--student", toy / "student", "--rollouts", rollouts, *options, "-o", out, "-q")
        rows = read_jsonl(rollouts)
    assert result.code == 0, result.err
    (first,) = read_jsonl(out / "metrics.jsonl")
    assert first[name] == pytest.approx(dense(models, rows, value, tokens), rel=1e-4)
    assert first["loss"] == pytest.approx(first[name], rel=1e-5)
    assert {
        f"{name}_first",
        f"{name}_middle",
        f"{name}_last",
        "teacher_mass",
        "student_mass",
        "top_k_overlap",
        "update_share",
    } <= first.keys()
    assert "clamped" not in first
    lengths = [len(row["completion_ids"]) for row in rows]
    assert first["mean_tokens"] == pytest.approx(sum(lengths) / len(lengths))
    assert first["tokens"] == sum(min(length, tokens or length) for length in lengths)
    parents = [parent["role"] for parent in json.loads((out / "s2d.json").read_text())["parents"]]
    several = ["teacher:toy-arithmetic", "teacher:other"]
    assert [role for role in parents if role != "sampler"] == ["student", *(several if len(teacher) > 2 else ["teacher"])] + (
        ["reference"] if "--reference" in options else []
    )


def test_clamping_is_told(s2d, toy, mixed, tmp_path):
    arguments = ["--teacher", toy / "teacher", "--student", toy / "student", mixed, *SHORT, "--clamp", 0.05]
    result = s2d("opd", *arguments, "-o", tmp_path / "run").result
    assert 0.1 < result["clamped"] < 0.95
    assert result["loss"] < 0.05 < result["kl"]


@pytest.mark.parametrize(
    "options",
    [
        ["--estimator", "sampled", "--baseline", "kl", "--loss-tokens", 5],
        ["several", "--task-reward-weight", 1.5, "--reference", "{toy}/student", "--loss-tokens", 5],
    ],
)
def test_phases_learn_what_models_side_by_side_do(s2d, toy, mixed, tmp_path, options):
    teacher = ["--teacher", toy / "teacher"]
    if options[0] == "several":
        teacher, options = ["--teacher", f"toy-arithmetic={toy / 'teacher'}", "--teacher", f"other={toy / 'student'}"], options[1:]
    options = [str(option).format(toy=toy) for option in options]
    for turns in ("on", "off"):
        result = s2d("opd", *teacher, "--student", toy / "student", mixed, *SHORT, *options, "--phases", turns, "-o", tmp_path / turns)
        assert result.code == 0, result.err
    for found, expected in zip(*(read_jsonl(tmp_path / turns / "metrics.jsonl") for turns in ("on", "off")), strict=True):
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
        assert found["student_mass"] == pytest.approx(expected["student_mass"], rel=1e-4)


def test_a_cache_gives_a_baseline_and_other_divergences(s2d, toy, rollouts, cache, tmp_path):
    stored = ["--student", toy / "student", "--rollouts", rollouts, "--cache", cache, "--lr", "1e-3", "-q"]
    result = s2d("opd", *stored, "--estimator", "sampled", "--baseline", "kl", "-o", tmp_path / "opd").result
    assert 0.5 < result["student_mass"] <= 1.0
    assert 0 < result["wait_seconds"] < result["seconds"]  # for the disk, and not in `update`
    assert 0 < result["wait_share"] <= 1 - result["update_share"]
    assert 0 < s2d("fkl-warmup", *stored, "--divergence", "jsd", "--loss-tokens", 3, "-o", tmp_path / "warmup").result["jsd"] < 0.7


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("opd", ["--jsd-beta", 0.3], "--jsd-beta requires --divergence jsd"),
        ("opd", ["--baseline", "kl"], "--baseline requires --estimator sampled"),
        ("opd", ["--baseline", "none"], "--baseline requires --estimator sampled"),
        ("opd", ["--estimator", "sampled", "--baseline", "kl", "--top-k", 5], "--top-k requires --estimator top-k"),
        ("opd", ["--estimator", "sampled", "--divergence", "jsd"], "estimate KL(student || teacher) alone; --estimator full or top-k"),
        ("opd", ["--clamp", 0], "no token would have a gradient"),
        ("opd", ["--divergence", "jsd", "--clamp", 0.7], "the divergence of --jsd-beta 0.5 never exceeds 0.693 nats"),
        ("opd", ["--task-reward-weight", 2], "--task-reward-weight needs the teacher before its RL; --reference CKPT"),
        ("opd", ["--reference", "{toy}/teacher"], "--reference is the other end of --task-reward-weight"),
        ("opd", ["--reference", "{toy}/teacher", "--task-reward-weight", 0], "nothing of the teacher would be learnt"),
        ("opd", ["--reference", "{toy}/teacher", "--task-reward-weight", 2, "--estimator", "top-k"], "mixes two whole distributions"),
        ("opd", ["served", "--reference", "{toy}/teacher", "--task-reward-weight", 2], "mixes two whole distributions"),
        ("opd", ["served", "--estimator", "sampled", "--teacher-temperature", 2], "the teacher's temperature is 2: a server scores at"),
        ("opd", ["--teacher", "more={toy}/teacher"], "of several teachers each is a model in memory, NAME=CKPT"),
        ("fkl-warmup", ["--jsd-beta", 0.3], "--jsd-beta requires --divergence jsd"),
        ("fkl-warmup", ["--divergence", "jsd", "--clamp", 0.7], "never exceeds 0.693 nats"),
        ("fkl-warmup", ["hard", "--clamp", 1], "--clamp applies to a teacher's distributions; --hard-labels has none"),
        ("fkl-warmup", ["hard", "--divergence", "jsd"], "--divergence applies to a teacher's distributions"),
        ("fkl-warmup", ["hard", "--teacher-temperature", 1], "--teacher-temperature applies to a teacher's distributions"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_or_would_be_ignored(tmp_path, monkeypatch, command, options, message):
    """They are refused before any file is looked at."""
    monkeypatch.chdir(tmp_path)
    teachers = {"served": ["--teacher", "http://127.0.0.1:9"], "hard": ["--hard-labels"]}
    kind, options = (options[0], options[1:]) if options[0] in teachers else ("", options)
    data = ["--rollouts", "r.jsonl"] if command == "fkl-warmup" else ["p.jsonl", "--max-tokens", 16]
    app = typer.Typer()
    for name, stage in (("opd", opd), ("fkl-warmup", fkl_warmup)):
        app.command(name)(expand(stage))
    given = [command, *teachers.get(kind, ["--teacher", "t"]), "--student", "s", *data, *options]
    with pytest.raises(UsageError) as caught:
        app([str(part).format(toy="toy") for part in given], standalone_mode=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("opd", ["--loss-tokens", 16], "--loss-tokens 16: completions have 16 tokens at most"),
        ("opd", ["cached", "--estimator", "top-k", "--top-k", 5, "--teacher-temperature", 2], "at temperature 1, 2 is needed"),
        ("opd", ["cached", "--reference", "{toy}/teacher", "--task-reward-weight", 2], "needs a cache of the whole distribution"),
        ("opd", ["cached", "--estimator", "top-k", "--top-k", 5, "--loss-tokens", 16], "completions have"),
        ("opd", ["several"], "problem 'validation-000' comes from 'toy-arithmetic', which has no teacher; math, other have one"),
        ("fkl-warmup", ["several"], "sample 0 of group 'validation-000' comes from 'toy-arithmetic', which has no teacher"),
        ("fkl-warmup", ["--loss-tokens", 17], "--loss-tokens 17: completions have"),
        ("fkl-warmup", ["cached", "--teacher-temperature", 2], "the cache holds probabilities at temperature 1, 2 is needed"),
    ],
)  # fmt: skip
def test_what_the_data_do_not_allow(s2d, toy, mixed, rollouts, cache, tmp_path, command, options, message):
    teachers = {
        "cached": ["--cache", cache],
        "several": ["--teacher", f"math={toy / 'teacher'}", "--teacher", f"other={toy / 'teacher'}"],
    }
    kind, options = (options[0], options[1:]) if options[0] in teachers else ("", options)
    teacher = teachers.get(kind, ["--teacher", toy / "teacher"])
    data = ["--rollouts", rollouts] if command == "fkl-warmup" or kind == "cached" else [mixed, "--max-tokens", 16]
    more = [str(option).format(toy=toy) for option in options]
    result = s2d(command, *teacher, "--student", toy / "student", *data, *more, "-o", tmp_path / "run", "-q")
    assert result.code == (1 if "has no teacher" in message else 2), result.err
    assert message in result.err
    assert len(result.err.splitlines()) == 1, result.err
    assert not (tmp_path / "run").exists()


def test_each_teacher_is_compared_with_the_student(s2d, toy, mixed, tmp_path):
    other = swap_two_tokens(toy / "teacher", tmp_path / "other")
    teachers = ["--teacher", f"toy-arithmetic={toy / 'teacher'}", "--teacher", f"other={other}"]
    result = s2d("opd", *teachers, "--student", toy / "student", mixed, *SHORT, "-o", tmp_path / "run")
    assert result.code == 1
    assert f"{other}: teacher and student have different tokenizers: id 9" in result.err
