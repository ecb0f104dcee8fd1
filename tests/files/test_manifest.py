"""Manifests: what makes two runs different work."""

from pathlib import Path

import pytest

from s2dcli.errors import UsageError
from s2dcli.files.manifest import describe, differences, refuse_differences


class Model:
    """What `describe` reads of a checkpoint."""

    revision, step, folder = "", 0, Path("nowhere")

    def __init__(self, name: str, weights: str = "w", setup: str = "s") -> None:
        self.name, self.weights_sha256, self.setup_sha256 = name, weights, setup


def manifest(problems, model, **options):
    return describe(
        "rollout", {"model": model.name, "problems": str(problems), **options}, inputs=[str(problems)], parents=[("model", model)]
    )


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("{}\n")
    return path


def test_every_difference_is_listed_and_what_may_change_is_not(problems, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("{ }\n")
    old = manifest(problems, Model("a"), num_samples=8, top_p=1.0, device="cpu", out="x", template=None)
    new = manifest(other, Model("b", weights="v"), num_samples=4, top_p=0.5, device="cuda", out="y", template="plain", resume=True)
    found = differences(old, new, {"device"})
    assert found[:3] == ['--template was not given, is "plain"', "--top-p was 1.0, is 0.5", "-n was 8, is 4"]
    assert found[3:] == [
        f"input {other} is not what {problems} was (another sha256)",
        "model b is not what a was (other weights)",
    ]
    with pytest.raises(UsageError) as caught:
        refuse_differences(Path("out"), old, new, {"device"})
    assert all(phrase in str(caught.value) for phrase in found)
    assert "5 things differ" in str(caught.value)
    assert "only --device may change" in str(caught.value)


def test_a_moved_input_and_a_moved_model_are_no_difference(problems, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(problems.read_bytes())
    assert differences(manifest(problems, Model("a")), manifest(moved, Model("b"))) == []


def test_a_changed_tokenizer_is_a_difference(problems):
    old, new = manifest(problems, Model("a")), manifest(problems, Model("a", setup="t"))
    assert differences(old, new) == ["the config, tokenizer or chat template of a has changed"]


def test_another_command_is_the_only_difference_told(problems):
    old = manifest(problems, Model("a"))
    assert differences(old, {**old, "command": "eval"}) == ["the command was rollout, is eval"]
