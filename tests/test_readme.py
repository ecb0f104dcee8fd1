"""Every command in the README runs, except those it says are not run here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ZYGOTE
from warm import warm_commands

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- not run by the tests: [^>]+-->\n)?```bash\n(.*?)```", re.DOTALL)


@pytest.mark.skipif(shutil.which("jq") is None, reason="the README's commands use jq")
def test_commands_of_the_readme_run_one_after_the_other(tmp_path):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    script = "set -euo pipefail\n" + "\n".join(body for skipped, body in blocks if not skipped)
    commands = {"prepare", "rollout", "verify", "eval", "report", "score", "probe", "grpo", "fkl-warmup", "opd", "compare", "lineage"}
    assert commands <= set(re.findall(r"s2d ([a-z-]+)", script))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with warm_commands(tmp_path / "bin", ZYGOTE) as environment:
        result = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "\\boxed{" in result.stdout
    assert "model.safetensors" in result.stdout
