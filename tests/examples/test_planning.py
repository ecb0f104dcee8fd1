"""PLANNING.md and the script that prints its tables."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ZYGOTE
from warm import warm_commands

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def planning():
    spec = importlib.util.spec_from_file_location("planning", EXAMPLES / "planning.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["planning"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_page_has_what_the_script_prints(planning, tmp_path):
    page = (EXAMPLES / "PLANNING.md").read_text()
    with warm_commands(tmp_path / "bin", ZYGOTE) as environment:
        command = [sys.executable, EXAMPLES / "planning.py", "OPD from Llama-3.3-70B"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    head, _, row = rows(result.stdout)
    assert head in rows(page)
    assert row in rows(page)
    assert row[head.index("longest row")] == "18,432"
    planned = [found for found in rows(page) if len(found) == len(head) and found[1].isdigit()]
    gpus = {found[0].removesuffix(" --weights bfloat16"): int(found[1]) for found in planned}
    assumed = planning.Assumptions()
    assert planning.markdown(planning.hours_table(gpus, assumed)) in page
    assert planning.markdown(planning.disk_table(assumed)) in page


def test_shapes_and_formulas(planning):
    """Sizes as the model cards have them, in billions; the rate of Qwen3-8B on one GPU by hand."""
    sizes = {name: round(model.parameters / 1e9, 1) for name, model in planning.MODELS.items()}
    assert sizes == {"Qwen3-1.7B": 1.7, "Qwen3-8B": 8.2, "Qwen3-14B": 14.8, "Llama-3.1-8B": 8.0, "Llama-3.3-70B": 70.6}
    assumed = planning.Assumptions(mean_tokens=1000, mean_prompt=0, share_of_bandwidth=1.0, bandwidth=1e12)
    model = planning.MODELS["Qwen3-8B"]
    cache = 2 * 2 * 36 * 8 * 128  # keys and values, bytes, layers, heads, size
    rate, seconds = assumed.decoding(model, 10)
    assert seconds == pytest.approx((2 * model.parameters + 10 * cache * 500) / 1e12)
    assert rate == pytest.approx(10 / seconds)
    assert assumed.forward_flops(model) == pytest.approx(2 * model.parameters + 4 * 4096 * 500 * 36)
