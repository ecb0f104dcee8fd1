"""Manifests: what makes two runs different work."""

import hashlib
from pathlib import Path

import pytest

from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.manifest import MANIFEST, UNKNOWN, describe, differences, refuse_differences, write_json


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


def test_a_changed_list_is_a_difference(problems):
    old, new = ({**manifest(problems, Model("a")), "options": {"teacher": names}} for names in (["x=a", "y=b"], ["x=a", "y=c"]))
    assert differences(old, new) == ['--teacher was ["x=a", "y=b"], is ["x=a", "y=c"]']


def test_a_changed_tokenizer_is_a_difference(problems):
    old, new = manifest(problems, Model("a")), manifest(problems, Model("a", setup="t"))
    assert differences(old, new) == ["the config, tokenizer or chat template of a has changed"]


def test_another_command_is_the_only_difference_told(problems):
    old = manifest(problems, Model("a"))
    assert differences(old, {**old, "command": "eval"}) == ["the command was rollout, is eval"]


def test_roles_are_given_so_that_a_role_may_have_several_models():
    one, other = Model("teacher"), Model("teacher", weights="v")
    found = describe("opd", {"teacher": "teacher,teacher"}, parents=[("student", one), ("teacher", one), ("teacher", other)])["parents"]
    assert [(parent["role"], parent["name"], parent["weights_sha256"]) for parent in found] == [
        ("student", "teacher", "w"),
        ("teacher", "teacher", "w"),
        ("teacher", "teacher", "v"),
    ]


def test_an_input_folder_has_a_hash_and_a_lineage(problems, tmp_path):
    folder = tmp_path / "cache"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "a").write_text("1")
    (folder / "b").write_text("2")

    def given() -> dict:
        return describe("fkl-warmup", {}, inputs=[str(folder)])

    before = given()["inputs"][0]
    assert (len(before["sha256"]), before["record"]) == (64, "")
    (folder / ".lock").write_text("hidden files do not count")
    assert given()["inputs"][0] == before
    (folder / "b").rename(folder / "c")
    renamed = given()["inputs"][0]["sha256"]
    assert renamed != before["sha256"]
    made = describe("score", {"model": "m"}, inputs=[str(problems)])
    write_json(folder / MANIFEST, {**made, "complete": True})
    found = given()
    assert found["inputs"][0]["sha256"] not in (renamed, before["sha256"])
    assert found["ancestors"][found["inputs"][0]["record"]]["command"] == "score"
    write_json(folder / MANIFEST, made)
    with pytest.raises(DataError, match=r"cache: is not complete: .* s2d score \.\.\. -o .*cache --overwrite completes it"):
        given()


def test_what_comes_through_a_pipe_is_known_by_its_records():
    rows = [{"id": "a"}, {"id": "b"}]
    (item,) = describe("rollout", {}, inputs=["-"], streamed=iter(rows))["inputs"]
    assert item == {"path": "-", "sha256": hashlib.sha256(b"".join(map(jsonl.dumps, rows))).hexdigest(), "record": ""}
    assert describe("verify", {}, inputs=["-"])["inputs"][0]["sha256"] == ""


def test_a_sampler_with_an_endless_name_is_unknown():
    whose = {"sampler": {"model": "m" * 5000, "revision": "", "step": 0, "checkpoint": "c"}}
    assert describe("fkl-warmup", {}, rollouts=[whose])["parents"][0]["record"] == UNKNOWN
