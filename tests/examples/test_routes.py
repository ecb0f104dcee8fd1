"""Scripts of the method's routes: every command of theirs on tiny models, and what contrasts differ in."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ZYGOTE
from warm import warm_commands

EXAMPLES = Path(__file__).parents[2] / "examples"
ROUTES = ["r1", "r2", "r3", "r5", "r6", "r7", "r8", "raw", "same-size"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run all routes of an architecture in their shortest form, once; returns the folder of seed 0."""
    folders = {}

    def run(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            command = ["bash", EXAMPLES / "routes" / "smoke.sh", architecture, EXAMPLES / architecture / "settings.sh", folder / "out"]
            with warm_commands(folder / "bin", ZYGOTE) as environment:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            folders[architecture] = folder / "out" / "routes" / "seed-0"
        return folders[architecture]

    return run


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_every_route_runs(smoke, architecture):
    folder = smoke(architecture)
    for route in ROUTES:
        results = json.loads((folder / "eval" / f"{route}-sampled" / "results.json").read_text())
        assert (results["problems"], results["k"]) == (4, 2)
    config = json.loads((folder / "r5" / (folder / "r5" / "latest").read_text().strip() / "config.json").read_text())
    assert config["model_type"] == architecture


@pytest.mark.parametrize(
    ("a", "b", "differ"),
    [
        ("r5", "r7", {"labels", "problems"}),  # fresh against replayed labels
        ("bridge-1H", "opd-1H", {"student"}),  # with and without the warm-up
        ("r5", "r8", {"model"}),
    ],
)
def test_contrasts_differ_in_what_they_are_named_after(smoke, s2d, a, b, differ):
    folder = smoke("qwen3")
    found = s2d("compare", "--settings", folder / a, folder / b, "--json").result
    print(found)
    assert {name.split(" ")[0] for name in found} == differ
