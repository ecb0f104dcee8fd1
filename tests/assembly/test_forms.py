"""Who is learnt from, which options exclude each other, and the warning of length inflation."""

from types import SimpleNamespace

import pytest

from s2dcli.assembly.distillation import Watch
from s2dcli.assembly.forms import largest_jsd, require_sources, teachers_of, tokens_learnt_from
from s2dcli.errors import DataError, UsageError
from s2dcli.files.records import Problem
from s2dcli.options import Divergence, OnPolicyOptions
from s2dcli.train.loop import Step
from s2dcli.train.objectives import Distillation


def named(*names: str, **more: object):
    return teachers_of(OnPolicyOptions(teacher=list(names), **more))


def test_one_teacher_is_as_it_stands_and_several_have_roles_by_their_sources(tmp_path):
    assert named("runs/a").checkpoints == {"teacher": "runs/a"}
    assert named("runs/a").told == "runs/a"
    odd = tmp_path / "lr=1e-3"
    odd.mkdir()
    assert named(str(odd)).checkpoints == {"teacher": str(odd)}
    assert named("http://h:1,http://h:2").served == "http://h:1,http://h:2"
    several = named("math=runs/a", "org/code=runs/b=2", reference="runs/r", task_reward_weight=2.0)
    assert several.checkpoints == {"teacher:math": "runs/a", "teacher:org/code": "runs/b=2", "reference": "runs/r"}
    assert several.sources == {"math": "teacher:math", "org/code": "teacher:org/code"}
    assert several.told == ["math=runs/a", "org/code=runs/b=2"]
    assert several.inputs == ["runs/a", "runs/b=2", "runs/r"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["math=runs/a"], "NAME=CKPT is for several teachers"),
        (["runs/a", "math=runs/b"], "--teacher runs/a: of several teachers each is a model in memory, NAME=CKPT"),
        (["math=runs/a", "=runs/b"], "NAME=CKPT"),
        (["math=runs/a", "code="], "NAME=CKPT"),
        (["math=runs/a", "math=runs/b"], "math=... was given twice"),
        (["math=http://h:1", "code=runs/b"], "a model in memory"),
        (["http://h:1", "http://h:2"], "a model in memory"),
    ],
)
def test_malformed_teachers_are_refused(names, message):
    with pytest.raises(UsageError, match=message):
        named(*names)


def problem(index: int, source: dict) -> Problem:
    return Problem(f"p{index}", [], "", "", source)


def test_every_source_needs_a_teacher_and_every_teacher_a_source():
    teachers, math, code = named("math=a", "code=b"), problem(0, {"dataset": "math"}), problem(1, {"dataset": "code"})
    require_sources(teachers, [math, code], (), "p.jsonl")
    for other, shown in ((problem(2, {"dataset": "chat"}), "'chat'"), (problem(2, {}), "''")):
        with pytest.raises(DataError, match=f"p.jsonl: problem 'p2' comes from {shown}, which has no teacher; math, code have one"):
            require_sources(teachers, [math, code, other], (), "p.jsonl")
    row = SimpleNamespace(dataset="chat", sample_index=3, group_id="g")
    with pytest.raises(DataError, match="sample 3 of group 'g' comes from 'chat'"):
        require_sources(teachers, (), [row], "r.jsonl")
    with pytest.raises(UsageError, match=r"--teacher code=...: nothing comes from 'code'; there are math"):
        require_sources(teachers, [math], (), "p.jsonl")
    require_sources(named("a"), [math], (), "p.jsonl")


def test_the_largest_jsd():
    assert largest_jsd(0.5) == pytest.approx(0.6931, abs=1e-4)
    assert largest_jsd(0.9) == pytest.approx(largest_jsd(0.1)) == pytest.approx(0.3251, abs=1e-4)
    assert largest_jsd(0.0) == largest_jsd(1.0) == float("inf")


def test_loss_tokens_must_cut_something():
    assert tokens_learnt_from(OnPolicyOptions(), 16) == 16
    assert tokens_learnt_from(OnPolicyOptions(loss_tokens=4), 16) == 4
    with pytest.raises(UsageError, match="--loss-tokens 16: completions have 16 tokens at most"):
        tokens_learnt_from(OnPolicyOptions(loss_tokens=16), 16)


def warnings(monkeypatch, lengths, divergences, max_tokens=100) -> list[int]:
    """Steps at which a run with these figures warns."""
    found = []
    monkeypatch.setattr("s2dcli.console.warn", lambda text: found.append(text))
    run = SimpleNamespace(log_rollouts=lambda step, rows: step.log(mean_tokens=rows))
    objective = Distillation(teacher=SimpleNamespace(waited=None), divergence=None, temperature=1.0)
    watch = Watch(run, OnPolicyOptions(divergence=Divergence.jsd), objective, max_tokens)
    for number, (length, divergence) in enumerate(zip(lengths, divergences, strict=True), 1):
        step = Step(number, tokens=1, sums={"kl": divergence})
        watch.log(step, length)
        assert step.metrics["jsd"] == divergence
    return [int(text.split(":")[0].removeprefix("step ")) for text in found]


def test_length_inflation_is_told_once_where_completions_grow_and_the_divergence_falls(monkeypatch):
    falling, level = [1.0] * 5 + [0.8] * 8, [1.0] * 13
    assert warnings(monkeypatch, [50] * 5 + [70] * 8, falling) == [10]  # the first step that has five before five
    assert warnings(monkeypatch, [50] * 5 + [70] * 8, level) == []
    assert warnings(monkeypatch, [50] * 13, falling) == []
    assert warnings(monkeypatch, [50] * 5 + [70] * 8, falling, max_tokens=1000) == []
