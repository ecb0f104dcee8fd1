"""Lineages: what is behind a manifest, what it has cost, and what is warned of."""

import json

import pytest

from s2dcli.errors import DataError
from s2dcli.files.ledger import behind, distinct_labels, manifest_of, spent, unknown_parents, warnings
from s2dcli.files.manifest import MANIFEST, describe, file_sha256, files_sha256, read_manifest, record_of, sidecar, write_json

TEACHER = [f"t{i}" for i in range(6)]


class Folder:
    """A checkpoint as `describe` sees it: a folder with weights and, if a stage made it, a manifest."""

    revision = ""

    def __init__(self, path, weights: bytes, step: int = 0) -> None:
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_bytes(weights)
        self.name, self.folder, self.step = str(path), path, step
        self.weights_sha256, self.setup_sha256 = files_sha256([path / "model.safetensors"]), "s"

    def made_by(self, command, labels, **options):
        """Write the manifest of the stage that made it; options that are folders become its parents."""
        parents = [(name, value) for name, value in options.items() if isinstance(value, Folder)]
        names = {name: value.name if isinstance(value, Folder) else value for name, value in options.items()}
        manifest = describe(command, {**names, "out": self.name}, parents=parents)
        write_json(self.folder / MANIFEST, {**manifest, "complete": True, "labels": labels})
        return self


@pytest.fixture
def family(tmp_path):
    """Base models; a teacher with labels t0..t5; a bridged student; that student after RL on t4, t5 and two new labels."""
    base, small = Folder(tmp_path / "base", b"b"), Folder(tmp_path / "small", b"s")
    teacher = Folder(tmp_path / "teacher", b"t").made_by("grpo", TEACHER, model=base)
    bridged = Folder(tmp_path / "bridged", b"w").made_by("opd", [], student=small, teacher=teacher)
    final = Folder(tmp_path / "final", b"f").made_by("grpo", ["t4", "t5", "n0", "n1"], model=bridged)
    return {"base": base, "teacher": teacher, "bridged": bridged, "final": final}


def test_labels_add_up_over_a_lineage_each_counted_once(family):
    manifest = manifest_of(family["final"].name)
    assert [(title.split()[0], len(labels)) for title, labels in spent(manifest)] == [("grpo", 6), ("grpo", 4)]
    assert distinct_labels(manifest) == {*TEACHER, "n0", "n1"}
    assert [record["command"] for record in behind(manifest, manifest["ancestors"]).values()] == ["opd", "grpo"]
    assert distinct_labels(manifest_of(family["base"].name)) == set()


def test_a_lineage_outlives_the_folders_it_speaks_of(family):
    for name in ("base", "teacher", "bridged"):
        for path in family[name].folder.iterdir():
            path.unlink()
    assert len(distinct_labels(manifest_of(family["final"].name))) == 8


def test_learning_again_from_an_ancestors_labels_is_replay(family):
    (caution,) = warnings(manifest_of(family["final"].name))
    assert caution == f"replay: grpo {family['final'].name} learns again from 2 of 4 labels, spent by grpo {family['teacher'].name} before"
    assert not [*warnings(manifest_of(family["bridged"].name))]


def test_evaluating_on_what_was_learnt_from_is_contamination(family):
    manifest = {**describe("eval", {"model": family["bridged"].name}, parents=[("model", family["bridged"])]), "measured": ["t0", "x", "y"]}
    (caution,) = warnings(manifest)
    assert caution == f"contamination: 1 of 3 evaluated problems were learnt from, by grpo {family['teacher'].name}"
    assert not [*warnings({**manifest, "measured": ["x", "y"]})]
    assert "2 of 2" in next(warnings(manifest_of(family["teacher"].name), ["t1", "t2"]))


def sampler(folder, **fields):
    return {"sampler": {"model": folder.name, "revision": "", "step": folder.step, "checkpoint": folder.weights_sha256, **fields}}


def test_who_sampled_the_rollouts_is_a_parent_too(family):
    rows = [sampler(family["teacher"]), sampler(family["teacher"]), sampler(family["base"])]
    manifest = describe("fkl-warmup", {"student": family["base"].name}, parents=[("student", family["base"])], rollouts=rows)
    assert [(parent["role"], parent["name"]) for parent in manifest["parents"]] == [
        ("student", family["base"].name),
        ("sampler", family["teacher"].name),
        ("sampler", family["base"].name),
    ]
    assert distinct_labels(manifest) == {*TEACHER}
    assert manifest["parents"][2]["record"] == ""
    assert not unknown_parents(manifest)


def test_a_sampler_is_found_in_its_run_folder_by_step_and_only_with_the_same_weights(tmp_path, family):
    step = Folder(tmp_path / "run" / "step-000020", b"r", 20).made_by("grpo", ["r0"], model=family["base"])
    at_run = sampler(step, model=str(tmp_path / "run"))
    assert distinct_labels(describe("grpo", {}, rollouts=[at_run])) == {"r0"}
    (step.folder / "model.safetensors").write_bytes(b"changed")
    manifest = describe("grpo", {}, rollouts=[at_run])
    assert unknown_parents(manifest) == [str(tmp_path / "run")]
    gold = {"sampler": {"model": "", "revision": "", "step": 0, "checkpoint": "", "engine": "gold"}}
    assert describe("fkl-warmup", {}, rollouts=[gold])["parents"] == []


def test_an_input_leads_to_what_made_it_unless_it_was_changed_since(tmp_path, family):
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("{}\n")
    made = describe("rollout", {"model": family["teacher"].name}, parents=[("model", family["teacher"])])
    write_json(sidecar(rollouts), {**made, "complete": True, "output_sha256": file_sha256(rollouts)})
    manifest = describe("fkl-warmup", {}, inputs=[str(rollouts)], rollouts=[sampler(family["teacher"])])
    assert [record["command"] for record in behind(manifest, manifest["ancestors"]).values()] == ["grpo", "rollout"]
    rollouts.write_text("{ }\n")
    changed = describe("fkl-warmup", {}, inputs=[str(rollouts)])
    assert changed["inputs"][0]["record"] == ""
    assert changed["ancestors"] == {}


def test_a_changed_record_is_refused(family):
    path = family["final"].folder / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"t0"', '"x0"'))
    with pytest.raises(DataError, match=r"s2d.json: the record [0-9a-f]{12} in it was changed"):
        read_manifest(path)
    path.write_text(json.dumps({"schema": "s2d.manifest/1", "ancestors": []}))
    with pytest.raises(DataError, match="no 'ancestors' in it"):
        record_of(path, {})


def test_what_has_no_manifest_and_is_no_model_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        manifest_of(str(tmp_path / "nothing"))
    (tmp_path / "file.jsonl").write_text("")
    with pytest.raises(DataError, match=r"was not made by s2d \(no file.jsonl.s2d.json\)"):
        manifest_of(str(tmp_path / "file.jsonl"))
