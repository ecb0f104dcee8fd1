"""The folder of an evaluation: results.json, and the graded rollouts that it sums up.

out/ s2d.json results.json rollouts.jsonl
     problems.jsonl   what was counted of each problem: samples, right, score, ...
     export/          what --export writes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, whole_file
from s2dcli.files.manifest import MANIFEST, read_json, require_complete, sidecar, write_json
from s2dcli.files.output import CompleteLine, complete_lines, truncate_after
from s2dcli.files.output_folder import OutputFolder

RESULTS = "results.json"
GRADED = "rollouts.jsonl"
PROBLEMS = "problems.jsonl"
EXPORT = "export"


def results_path(run: str) -> Path:
    """Return the results.json that a folder or file stands for. Raises DataError if a folder has none or is not complete."""
    path = Path(run)
    if path.is_dir():
        require_complete(run, path / MANIFEST)
        path = path / RESULTS
        if not path.exists():
            raise DataError(f"no {RESULTS} in this folder", where=run, hint="s2d eval ... -o FOLDER writes one")
    return path


def graded_path(run: str) -> str:
    """Return the graded rollouts that a folder or file stands for. Raises DataError if these are not complete."""
    is_folder = Path(run).is_dir()
    require_complete(run, Path(run) / MANIFEST if is_folder else sidecar(run))
    return str(Path(run) / GRADED) if is_folder else run


class EvalFolder(OutputFolder):
    """The folder of an evaluation in this process's hands; one that is overwritten stays until the new one is finished."""

    FILES = (
        RESULTS,
        GRADED,
        PROBLEMS,
        f"{EXPORT}/lm-eval/*/results_*.json",
        f"{EXPORT}/lm-eval/*/samples_*.jsonl",
        f"{EXPORT}/every-eval-ever/data/*/*/*/*.json",
        f"{EXPORT}/every-eval-ever/data/*/*/*/*_samples.jsonl",
        f"{EXPORT}/hub/.eval_results/*.yaml",
    )

    def result(self) -> dict[str, Any]:
        return read_json(self.folder / RESULTS)

    def lines(self, count: int | None = None, name: str = GRADED) -> Iterator[CompleteLine]:
        """Yield the complete lines of the graded rollouts, `count` of them at most."""
        return complete_lines(self.folder / name, count)

    @contextmanager
    def open_rollouts(self, done: int = 0, name: str = GRADED) -> Iterator[jsonl.Writer]:
        """Open the graded rollouts, to continue after `done` of them."""
        path = self.folder / name
        with disk_errors("write", path):
            if path.exists():
                truncate_after(path, done)
        with jsonl.open_output(path, append=True) as writer:
            yield writer
            writer.sync()

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a file of rows, which appears when it is whole. Raises DataError."""
        path = self.folder / name
        with disk_errors("write", path), whole_file(path) as file:
            file.writelines(map(jsonl.dumps, rows))

    def finish(self, results: dict[str, Any], **more: Any) -> None:
        """Write the results and the manifest, with `more` in it."""
        with disk_errors("write the results", self.out):
            write_json(self.folder / RESULTS, results)
            self.write_manifest(complete=True, **more)
            self.replace()
        self.keep = True
