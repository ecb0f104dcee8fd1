"""The folder of a training run: written by one process at a time, and gone on with at its last whole step.

out/ s2d.json problems.jsonl metrics.jsonl evals.jsonl rollouts/step-000001.jsonl ... latest
     step-000100/   a checkpoint (checkpoint.py), with training_state/ in the newest

A step is whole once its folder has its name; the rows up to it are on the disk by then. Rows and
rollouts beyond the last whole step tell of work that was lost, and are cut when a run goes on. Where a
run stands is the number of that step, and what the s2d.json in it says: counts, and the labels spent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from s2dcli import console
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, remove, remove_leftovers, whole_file, whole_folder
from s2dcli.files.checkpoint import LATEST, TRAINING_STATE, empty_folder, refuse_folder, step_name, step_of
from s2dcli.files.lock import locked
from s2dcli.files.manifest import MANIFEST, read_manifest, refuse_differences, write_json
from s2dcli.files.output import cut_after, kept_lines
from s2dcli.options import Schedule

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
PROBLEMS = "problems.jsonl"
ROLLOUTS = "rollouts"
# Options that a run may go on with other values of. Most say what is kept or how fast things go. The
# first five change the shapes or the place of a computation: its results then agree to rounding only.
MAY_CHANGE = frozenset(
    {
        "tokens_per_batch",
        "sample_tokens",
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "max_model_len",
        "max_in_flight",
        "parity_rows",
        "parity_tolerance",
        "gradient_checkpointing",
        "attention",
        "device",
        "offload",
        "trust_remote_code",
        "workers",
        "timeout",
        "memory_limit",
        "save_every",
        "keep_last",
        "keep_states",
        "keep_rollouts",
        "eval_every",
    }
)


class RunFolder:
    """A run folder in this process's hands, from entering it to leaving it.

    `step` is its last whole step, 0 if there is none; `counts`, `labels`, `last_row` and `last_eval` are
    those up to that step.
    """

    def __init__(
        self,
        out: Path,
        manifest: Mapping[str, Any],
        *,
        steps: int,
        problems: Iterable[dict[str, Any]] = (),
        keep_last: int | None = None,
        keep_states: int = 1,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        """`manifest` describes a run (manifest.describe) of `steps` steps. Nothing is touched before the folder is entered.

        Of the checkpoints the newest `keep_last` are kept (None: all), of the training states the newest `keep_states`.
        """
        self.out, self.manifest, self.steps, self.problems = out, manifest, steps, problems
        self.keep_last, self.keep_states, self.overwrite, self.resume = keep_last, keep_states, overwrite, resume
        self.step = 0
        self.counts: dict[str, float] = {}
        self.labels: set[str] = set()
        self.last_row: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}
        self._files: dict[str, BinaryIO] = {}
        self._held = ExitStack()

    def __enter__(self) -> RunFolder:
        """Lock the folder, and make, empty or resume it. Raises UsageError or DataError."""
        refuse_folder(self.out, self.overwrite, self.resume)
        with disk_errors("make the folder", self.out), ExitStack() as held:
            self.out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.out))
            for folder in [self.out, self.out / ROLLOUTS, *self._step_folders()]:
                remove_leftovers(folder)
            if self.resume:
                self._take_up()
            else:
                empty_folder(self.out)
            self._write_manifest(complete=self.finished)
            if self.problems and not self.step:
                self._write_records(self.out / PROBLEMS, self.problems)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Unlock the folder; one in which nothing has come about before an error is not left behind."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            saved = f"step {self.step} of {self.steps} is saved" if self.step else "no step is saved"
            begun = self.last_row.get("step", 0) + 1
            lost = f"step {begun}" if begun == self.step + 1 else f"steps {self.step + 1} to {begun}"
            error.add_note(f"{saved}, the work on {lost} is discarded" if self.step < self.steps else saved)
        for file in self._files.values():
            with suppress(OSError):  # of a row that could not be written, which has been told
                file.close()
        with suppress(OSError):
            if error and not (self.last_row or self.last_eval):
                empty_folder(self.out)
        self._held.close()
        with suppress(OSError):
            self.out.rmdir()  # where it is empty

    @property
    def checkpoint(self) -> Path:
        """Folder of the last whole step."""
        return self.out / step_name(self.step)

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def write_rollouts(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Write what a step learnt from to rollouts/step-NNNNNN.jsonl."""
        path = self.out / ROLLOUTS / f"{step_name(step)}.jsonl"
        with disk_errors("write", path):
            path.parent.mkdir(exist_ok=True)
            self._write_records(path, records)

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a step's row to metrics.jsonl."""
        self.last_row = row
        self._append(METRICS, row)

    def add_eval(self, row: dict[str, Any]) -> None:
        """Add an evaluation's row to evals.jsonl."""
        self.last_eval = row
        self._append(EVALS, row)

    def save(self, step: int, counts: Mapping[str, float], labels: Iterable[str], fill: Callable[[Path], None]) -> None:
        """Make `step` the last whole step: `fill` writes a checkpoint with its training state to the folder it is given.

        Raises DataError if the file system refuses; the steps before are then as they were.
        """
        self.counts, self.labels = dict(counts), set(labels)
        final = self.out / step_name(step)
        with disk_errors("save the checkpoint", final):
            for file in self._files.values():
                os.fsync(file.fileno())
            with whole_folder(final) as draft:
                fill(draft)
                write_json(draft / MANIFEST, self._described(complete=True))
            self.step = step
            self._point_to_step()
        with disk_errors("remove old checkpoints", self.out):
            self._prune()

    def finish(self) -> None:
        """Say in the run's manifest that it is complete."""
        with disk_errors("write", self.out / MANIFEST):
            self._write_manifest(complete=True)

    def result(self) -> dict[str, Any]:
        """What a trainer prints at its end: the checkpoint, the last step's figures, the last evaluation's."""
        evaluated = {f"eval_{name}": value for name, value in self.last_eval.items() if name != "step"}
        return {"checkpoint": str(self.checkpoint), **self.last_row, **evaluated}

    def _take_up(self) -> None:
        """Find where a run that was stopped stands, and cut what came after its last whole step."""
        folders = self._step_folders()
        whole = [folder for folder in folders if (folder / TRAINING_STATE).is_dir()]
        if folders and not whole:
            raise DataError(
                f"holds checkpoints, but no {TRAINING_STATE} to go on from", where=str(self.out), hint="--overwrite begins anew"
            )
        self.step = step_of(whole[-1]) if whole else 0
        if (self.out / MANIFEST).is_file():
            begun = read_manifest(self.out / MANIFEST)
            refuse_differences(self.out, begun, self.manifest, MAY_CHANGE | self._may_grow(begun))
        rollouts = list((self.out / ROLLOUTS).glob("step-*.jsonl"))
        for path in [*folders, *rollouts]:
            if step_of(path) > self.step:
                remove(path)
        self.last_row, self.last_eval = self._cut(METRICS), self._cut(EVALS)
        if not self.step:
            return
        if self.last_row.get("step") != self.step:
            raise DataError(f"lacks the row of step {self.step}, the last whole one", where=str(self.out / METRICS))
        manifest = read_manifest(self.checkpoint / MANIFEST)
        self.counts, self.labels = manifest["counts"], set(manifest["labels"])
        self._point_to_step()
        self._prune()
        console.info(f"{self.out}: {'was finished' if self.finished else 'goes on'} after step {self.step} of {self.steps}")

    def _prune(self) -> None:
        if self.keep_last:
            for folder in self._step_folders()[: -self.keep_last]:
                remove(folder)
        states = [folder / TRAINING_STATE for folder in self._step_folders() if (folder / TRAINING_STATE).is_dir()]
        for state in states[: -self.keep_states]:
            remove(state)

    def _may_grow(self, begun: Mapping[str, Any]) -> set[str]:
        """Return `steps` if their number may be another: where no step so far depends on it, and all of them are within it."""
        was, now = begun["options"].get("steps"), self.manifest["options"].get("steps")
        constant = self.manifest["options"].get("schedule") == Schedule.constant
        return {"steps"} if constant and was and now and now >= self.step else set()

    def _cut(self, name: str) -> dict[str, Any]:
        """Drop the rows of a file that tell of later steps, and what is no whole row; returns the last row that stays."""
        path = self.out / name
        if not self.step or not path.exists():
            path.unlink(missing_ok=True)
            return {}
        kept = list(takewhile(lambda line: line.record["step"] <= self.step, kept_lines(path)))
        cut_after(path, len(kept))
        return kept[-1].record if kept else {}

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with disk_errors("write", self.out / name):
            if name not in self._files:
                self._files[name] = open(self.out / name, "ab")  # noqa: SIM115 - closed on leaving
            self._files[name].write(jsonl.dumps(row))
            self._files[name].flush()

    def _write_records(self, path: Path, records: Iterable[dict[str, Any]]) -> None:
        with whole_file(path) as file:
            file.writelines(map(jsonl.dumps, records))

    def _write_manifest(self, *, complete: bool) -> None:
        write_json(self.out / MANIFEST, self._described(complete=complete))

    def _described(self, *, complete: bool) -> dict[str, Any]:
        return {**self.manifest, "complete": complete, "counts": self.counts, "labels": sorted(self.labels)}

    def _point_to_step(self) -> None:
        with whole_file(self.out / LATEST) as file:
            file.write(self.checkpoint.name.encode() + b"\n")

    def _step_folders(self) -> list[Path]:
        """The checkpoints of the run, in the order of their steps."""
        return sorted((path for path in self.out.iterdir() if path.is_dir() and step_of(path)), key=step_of)
