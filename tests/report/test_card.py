"""Model cards: what they say is what the manifest says, and the hub's own library reads them."""

import json
import re
import shlex
import shutil

import pytest
import typer
import yaml
from huggingface_hub import EvalResult, ModelCard, metadata_load

from s2dcli import cli, console
from s2dcli.files.command_line import POSITIONAL, command_line
from s2dcli.files.manifest import files_sha256, flag, sha256_json
from s2dcli.report.card import LARGEST, MOST, Card, carried_over, code, fenced

PARENT = """---
license: other
license_name: toy-licence
license_link: LICENSE
language: [en]
tags: [toy, "quoted: tag"]
---
# Teacher
A parent's prose stays where it is.
"""
STEPS = ["--steps", 2, "--problems-per-step", 4, "-n", 4, "--max-tokens", 16, "--lr", "1e-3"]


@pytest.fixture(scope="module")
def place(s2d, toy, few, tmp_path_factory):
    """A folder in which a teacher with a card has been trained, and by it a student in two stages more."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("teacher", "student"):
        shutil.copytree(toy / name, folder / name)
        (folder / name / "README.md").write_text(PARENT)
        (folder / name / "LICENSE").write_text(f"terms of the {name}")
    shutil.copyfile(few, folder / "few.jsonl")
    rolled, warm = folder / "out" / "rolled.jsonl", folder / "out" / "warm"
    measured = ["--eval-problems", "few.jsonl", "--eval-every", 2, "--eval-samples", 3]
    for command in (
        ["grpo", "--model", "teacher", "few.jsonl", *STEPS, "--reward", "exact", "-o", "rl", "--save-every", 1, *measured],
        ["rollout", "-m", "rl", "few.jsonl", "-n", 2, "--max-tokens", 16, "-o", rolled],
        ["fkl-warmup", "--teacher", "rl", "--student", "student", "--rollouts", rolled, *STEPS[:2], "-o", warm],
        ["opd", "--teacher", "rl", "--student", warm, "few.jsonl", *STEPS, "--lora-rank", 2, "-o", "end"],
    ):
        result = s2d(*command, cwd=folder)
        assert result.code == 0, result.err
    return folder


def manifest_of(step):
    return json.loads((step / "s2d.json").read_text())


def test_the_hub_reads_the_card_and_its_evaluation(place):
    for step, evaluation in ((2, 1), (1, None)):
        folder = place / "rl" / f"step-00000{step}"
        card = ModelCard.load(folder / "README.md")
        assert metadata_load(folder / "README.md") == card.data.to_dict()
        assert "base_model" not in card.data.to_dict()  # no hub id is known
        assert (card.data.library_name, card.data.pipeline_tag, card.data.language) == ("transformers", "text-generation", ["en"])
        assert card.data.tags == ["toy", "quoted: tag", "s2d", "grpo"]
        assert (card.data.eval_results is None) == (evaluation is None)
    row = [json.loads(line) for line in (place / "rl" / "evals.jsonl").read_text().splitlines()][-1]
    error = round(100 * row["se"], 2)
    (result,) = ModelCard.load(place / "rl" / "step-000002" / "README.md").data.eval_results
    assert result == EvalResult(
        task_type="text-generation",
        dataset_type="toy-arithmetic",
        dataset_name="toy-arithmetic",
        dataset_split="validation",
        metric_type="accuracy",
        metric_name="avg@3, per cent",
        metric_value=round(100 * row["avg_at_k"], 2),
        metric_args={"standard_error": error, "problems": 8, "k": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 16},
    )
    first, last = ((place / "rl" / f"step-00000{step}" / "README.md").read_text() for step in (1, 2))
    assert f"| 2 | {100 * row['avg_at_k']:.1f} ± {100 * row['se']:.1f} % |" in last
    assert "| 0 (before training) | " in first
    assert "this checkpoint, of step 1, was not measured itself" in first
    assert "contamination: 8 of 8 evaluated problems were learnt from, by grpo rl" in last


def test_licence_and_tags_go_through_stages(place):
    for folder, stages in ((place / "out" / "warm", ["fkl-warmup"]), (place / "end", ["fkl-warmup", "opd"])):
        step = folder / "step-000002"
        data = ModelCard.load(step / "README.md").data
        assert (data.license, data.license_name, data.license_link) == ("other", "toy-licence", "LICENSE")
        assert (step / "LICENSE").read_text() == "terms of the student"
        assert data.tags == ["toy", "quoted: tag", "s2d", *stages]
        assert "prose" not in (step / "README.md").read_text()
    adapter = ModelCard.load(place / "end" / "step-000002" / "adapter" / "README.md")
    assert (adapter.data.library_name, adapter.data.license_name) == ("peft", "toy-licence")


def test_lineage_and_labels_are_those_of_the_manifest(place):
    step = place / "end" / "step-000002"
    text, manifest = (step / "README.md").read_text(), manifest_of(step)
    lines = re.findall(r"^\d\. (.*)$", text, re.M)
    assert [line.split("`")[1] for line in lines] == ["s2d grpo", "s2d rollout", "s2d fkl-warmup", "s2d opd"]
    assert lines[-1].endswith("**This checkpoint.**")
    for parent in manifest["parents"]:
        assert f"weights `{parent['weights_sha256'][:12]}`" in lines[-1]
        assert files_sha256((place / parent["name"] / "step-000002").glob("*.safetensors")) == parent["weights_sha256"]
    labels = set().union(*(record["labels"] for record in (manifest, *manifest["ancestors"].values())))
    assert f"{len(labels)} labelled problems were learnt from" in text
    assert f"| 1. `s2d grpo` | {len(labels)} |" in text
    counts = manifest["counts"]
    assert f"2 updates, {counts['rollouts']} rollouts, {counts['tokens']} tokens" in lines[-1]
    assert "second" not in text
    assert str(place) not in text


def test_the_commands_make_it_again(s2d, place, tmp_path):
    for name in ("teacher", "student", "few.jsonl"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copyfile
        copy(place / name, tmp_path / name)
    text = (place / "end" / "step-000002" / "README.md").read_text()
    for line in re.search(r"```bash\n(.*?)\n```", text, re.S)[1].splitlines():
        program, *words = shlex.split(line)
        assert program == "s2d"
        result = s2d(*words, cwd=tmp_path)
        assert result.code == 0, result.err
    for file in ("model.safetensors", "README.md", "adapter/README.md"):
        assert (tmp_path / "end" / "step-000002" / file).read_bytes() == (place / "end" / "step-000002" / file).read_bytes()


def test_no_card_leaves_it_out_and_may_change(s2d, place):
    command = ["fkl-warmup", "--hard-labels", "--student", "student", "--rollouts", "out/rolled.jsonl", "--lora-rank", 2, "-o", "bare"]
    assert s2d(*command, "--steps", 1, "--no-card", cwd=place).code == 0
    assert not list((place / "bare").rglob("README.md"))
    result = s2d(*command, "--steps", 2, "--resume", cwd=place)
    assert result.code == 0, result.err
    assert [path.parent.name for path in sorted((place / "bare").rglob("README.md"))] == ["step-000002", "adapter"]
    assert "supervised training on the tokens of stored completions" in (place / "bare" / "step-000002" / "README.md").read_text()


def record(command="grpo", **more):
    return {
        "command": command,
        "options": {},
        "given": [],
        "versions": {"s2d": "1"},
        "commit": "",
        "seeds": {},
        "inputs": [],
        "parents": [],
        "counts": {"steps": 1},
        "labels": [],
        **more,
    }


def parent(name, record="", revision="", role="model"):
    return {
        "role": role,
        "name": name,
        "revision": revision,
        "step": 0,
        "weights_sha256": "a" * 64,
        "setup_sha256": "",
        "record": record,
    }


def written(folder, manifest, evals=(), **known):
    folder.mkdir(exist_ok=True)
    Card(**{"steps": 1, **known}).write(folder, {"ancestors": {}, "saved": {"dtype": "float32"}, **manifest}, evals)
    return ModelCard.load(folder / "README.md"), (folder / "README.md").read_text()


def test_the_base_is_the_hub_model_at_the_root(tmp_path):
    first = record(parents=[parent("Qwen/Qwen3-1.7B", revision="c" * 40)])
    second = record("opd", parents=[parent("runs/first", sha256_json(first), role="student"), parent("some/teacher", revision="d" * 40)])
    manifest = {**second, "ancestors": {sha256_json(first): first}}
    carried = {"base_model": "Qwen/Other", "datasets": ["openai/gsm8k"], "license": "mit"}
    card, text = written(tmp_path, manifest, carried=carried, datasets=["nvidia/problems", "local"])
    assert (card.data.base_model, card.data.base_model_relation) == ("Qwen/Qwen3-1.7B", "finetune")
    assert card.data.datasets == ["nvidia/problems", "openai/gsm8k"]
    assert f"`Qwen/Qwen3-1.7B` (weights `{'a' * 12}`, revision `{'c' * 12}`)" in text
    assert "# Qwen3-1.7B-opd" in text
    local = record(parents=[parent("owner/name")])  # a folder, whatever its name looks like
    assert written(tmp_path, local)[0].data.base_model is None
    assert written(tmp_path, local, carried=carried)[0].data.base_model == "Qwen/Other"
    assert written(tmp_path, local, carried=carried)[0].data.datasets is None  # what a base model was trained on is not this run's


def test_rewards_without_a_notion_of_right_are_reported_as_rewards(tmp_path):
    row = {"step": 1, "k": 2, "problems": 5, "avg_at_k": None, "se": None, "mean_reward": 0.25, "mean_reward_se": 0.125, "truncated": 0.5}
    card, text = written(tmp_path, record(parents=[parent("p")]), [row], eval_file="data/held out.jsonl")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_args["standard_error"]) == ("mean_reward", 0.25, 0.12)
    assert result.dataset_name == "held-out"
    assert "| 1 | 0.25 ± 0.12 | 50.0 % |" in text
    many = [{**row, "step": step, "avg_at_k": 0.5, "se": 0.1, "mean_reward": 0.5} for step in range(31)]
    text = written(tmp_path, record(parents=[parent("p")], counts={"steps": 30}), many)[1]
    assert re.findall(r"^\| (\d+)", text, re.M) == ["0", *map(str, range(20, 31))]
    assert "19 evaluations between the first two rows are left out" in text


HOSTILE = [
    ("aliases", "a: &a [x]\nb: *a\nlicense: mit"),
    ("a bomb", "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nlicense: mit"),
    ("levels deep", "license: mit\nx: " + "[" * 50 + "]" * 50),
    ("cannot be read", "license: !!python/object/apply:os.system [echo]"),
    ("cannot be read", "license: 'open"),
    ("no mapping", "- license"),
    ("cannot be read", "license: \x1b[31mmit"),
]


@pytest.mark.parametrize(("why", "front"), HOSTILE)
def test_a_front_matter_that_is_an_attack_or_a_mess_is_told_and_left(tmp_path, capfd, why, front):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\ntext")
    assert carried_over(tmp_path) == {}
    assert "licence and tags are not carried over" in capfd.readouterr().err
    (tmp_path / "README.md").write_text("---\nlicense: mit\nx: " + "a" * LARGEST + "\n---\n")
    assert carried_over(tmp_path) == {}
    assert "it does not end within" in capfd.readouterr().err


@pytest.mark.parametrize(
    "value",
    ["mit\n---\n# injected", "mi\u202et", "m" * 1000, "", 3, {"a": 1}, [["mit"]], ["t"] * (MOST + 1), "\x9b31m", "two\u2028lines"],
)
def test_values_that_are_no_plain_text_are_not_carried(tmp_path, capfd, value):
    (tmp_path / "README.md").write_text("---\n" + yaml.safe_dump({"license": value, "tags": ["kept"], 1: 2}) + "---\n")
    assert carried_over(tmp_path) == {"tags": ["kept"]}
    assert "no plain text: license" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["no front matter", "", "---\n---\n", "\ufeff---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\n"])
def test_plain_cards_are_read_silently(tmp_path, capfd, text):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert carried_over(tmp_path) == ({"license": "mit"} if "mit" in text else {})
    assert capfd.readouterr().err == ""


TEXTS = ["a: b", "- x", "'", '"', "{}", "yes", "1.0", "# no", "!!int 3", "&a", "*a", "---", "%TAG", "` `` ```", "a|b", "<script>", "\u00e9"]


def test_whatever_others_wrote_stays_a_value(tmp_path):
    carried = {"license": "---", "tags": TEXTS, "language": "no"}
    evil = "x\n```\n# `injected` \x1b[2J``"
    manifest = record(parents=[parent(evil)], inputs=[{"path": evil, "sha256": "b" * 64, "record": ""}], given=["problems", "model"])
    card, text = written(tmp_path, {**manifest, "options": {"problems": evil, "model": evil}}, carried=carried)
    assert (card.data.license, card.data.language) == ("---", "no")
    assert card.data.tags == [*TEXTS, "s2d", "grpo"]
    assert console.printable(text) == text
    headings = re.findall("^#+ .*", text.split("bash\n")[0], re.M)
    assert headings[1:] == ["## Lineage", "## Labels", "## Reproduction"]
    block = re.search(r"^(`{4,})bash\n(.*)\n\1$", text, re.M | re.S)[2]
    assert shlex.split(block) == ["s2d", "grpo", console.printable(evil), "--model", console.printable(evil)]


@pytest.mark.parametrize("text", ["plain", "`", "``a`", "a\nb", "", "```"])
def test_code_is_code(text):
    ticks = re.match("`+", code(text))[0]
    assert code(text).endswith(ticks)
    assert ticks not in code(text)[len(ticks) : -len(ticks)].strip(" ").replace(ticks + "`", "")
    assert fenced(text).splitlines()[-1] == fenced(text).splitlines()[0].removesuffix("bash")


def test_every_option_of_every_stage_is_written_as_the_command_line_takes_it():
    made = typer.main.get_command(cli.app)
    for stage in ("prepare", "rollout", "verify", "score", "grpo", "fkl-warmup", "opd", "eval"):
        command = made.commands[stage]
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                assert POSITIONAL[stage] == parameter.name
            elif parameter.name not in ("help", "quiet", "verbose", "help_all"):
                assert ("-o" if parameter.name == "out" else flag(parameter.name)) in parameter.opts, (stage, parameter.name)
                assert not parameter.secondary_opts
    options = {"problems": "-", "reward": ["a", "b"], "offload": True, "lr": 1e-06, "num_samples": 4, "out": "o", "seed": 0}
    words = command_line({"command": "grpo", "options": options, "given": [name for name in options if name not in ("out", "seed")]})
    assert words == ["s2d", "grpo", "--reward", "a", "--reward", "b", "--offload", "--lr", "1e-06", "-n", "4", "-o", "o"]
