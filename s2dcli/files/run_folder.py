"""The folder of a training run, which is resumed at its last whole step.

out/ s2d.json problems.jsonl metrics.jsonl evals.jsonl rollouts/step-000001.jsonl ... latest
     step-000100/   a checkpoint (checkpoint.py), with training_state/ in the newest

A step is whole once its folder has its name; the rows up to it are on the disk by then. Rows and
rollouts beyond the last whole step tell of work that was lost, and are cut when a run is resumed. Where a
run stands is the number of that step, and what the s2d.json in it says: counts, the labels spent, and the
step's `files`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Self

from s2dcli import console, world
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors, remove, remove_leftovers, whole_file, whole_folder
from s2dcli.files.checkpoint import LATEST, TRAINING_STATE, step_name, step_of
from s2dcli.files.manifest import MANIFEST, read_json, read_manifest, write_json
from s2dcli.files.output import complete_lines, resumable, truncate_after
from s2dcli.files.output_folder import OutputFolder
from s2dcli.files.records import Rollout, take

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
PROBLEMS = "problems.jsonl"
ROLLOUTS = "rollouts"
TEACHER = "teacher.json"
TENSORBOARD = "tensorboard"
TRACKED = "track.json"  # names of the run with its trackers
PHASES = "phases"
PHASE_ROLLOUTS = "rollouts.jsonl"


class RunFolder(OutputFolder):
    """A run folder in the main process's hands; a run that is overwritten stays until the first whole step of the new one.

    `step` is its last whole step, 0 if there is none; `counts`, `labels`, `last_row` and `last_eval` are
    those up to that step. Other processes know where the run stands and touch nothing.
    """

    FILES = (
        *(PROBLEMS, METRICS, EVALS, LATEST, f"{ROLLOUTS}/step-*.jsonl", f"step-*/{MANIFEST}"),
        *(f"{PHASES}/step-*/*", f"{PHASES}/step-*/*/*"),  # of steps that are not saved yet
        *(f"{TENSORBOARD}/*", f"{TENSORBOARD}/*/*", TRACKED),
        TEACHER,  # what a teacher on servers first said
        ".weights/*",  # for a hosted engine to load
    )

    def __init__(
        self,
        out: Path,
        manifest: dict[str, Any],
        *,
        steps: int,
        problems: Iterable[dict[str, Any]] = (),
        keep_last: int | None = None,
        keep_states: int = 1,
        may_extend: bool = False,
        **how: Any,
    ) -> None:
        """`manifest` describes a run of `steps` steps; `how` is as OutputFolder takes it. Nothing is touched before entering.

        Of the checkpoints the newest `keep_last` are kept (None: all), of the training states the newest `keep_states`.
        With `may_extend` a resume may change the option `steps`: no step so far depends on it.
        """
        super().__init__(out, manifest, **how)
        self.steps, self.problems, self.may_extend = steps, problems, may_extend
        self.keep_last, self.keep_states = keep_last, keep_states
        self.step = 0
        self.counts: dict[str, float] = {}
        self.labels: set[str] = set()
        self.last_row: dict[str, Any] = {}
        self.last_eval: dict[str, Any] = {}
        self._files: dict[str, BinaryIO] = {}

    @classmethod
    def written(cls, out: Path) -> set[Path]:
        found = super().written(out)
        for manifest in out.glob(f"step-*/{MANIFEST}"):
            found.update(manifest.parent / str(name) for name in take(read_json(manifest), "files", list, str(manifest)))
        return found

    def _open(self) -> None:
        for folder in (self.folder / ROLLOUTS, self.folder / PHASES, *self._step_folders()):
            remove_leftovers(folder)
        if self.resume:
            self._take_up()
        self.write_manifest(complete=self.finished, **self._standing())
        if self.problems and not self.step:
            self._write_records(self.folder / PROBLEMS, self.problems)

    def __enter__(self) -> Self:
        """Lock the folder, and make or resume it. Raises UsageError or DataError."""
        self.step, self.counts, self.labels, self.last_row, self.last_eval = world.from_main(self._enter)
        return self

    def _enter(self) -> tuple[Any, ...]:
        super().__enter__()
        return self.step, self.counts, self.labels, self.last_row, self.last_eval

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Close what is open; of an interrupt it notes what is saved and what is lost."""
        if not world.is_main():
            return
        if isinstance(error, KeyboardInterrupt | SystemExit):
            saved = f"step {self.step} of {self.steps} is saved" if self.step else "no step is saved"
            begun = self.last_row.get("step", 0) + 1
            lost = f"step {begun}" if begun == self.step + 1 else f"steps {self.step + 1} to {begun}"
            error.add_note(f"{saved}, the work on {lost} is discarded" if self.step < self.steps else saved)
        for file in self._files.values():
            with suppress(OSError):  # of a row that could not be written, which has been told
                file.close()
        self.keep |= bool(self.last_row or self.last_eval)
        super().__exit__(kind, error)

    @property
    def checkpoint(self) -> Path:
        """Folder of the last whole step."""
        return self.folder / step_name(self.step)

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def phase(self, step: int) -> Path:
        """Return the folder of what a step has done so far, for a restart; it goes when the step is saved."""
        self.keep = True
        return self.folder / PHASES / step_name(step)

    def write_phase(self, step: int, groups: Iterable[Iterable[Rollout]]) -> None:
        """Write the rollouts of a step for a restart. Raises DataError."""
        if not world.is_main():
            return
        path = self.phase(step) / PHASE_ROLLOUTS
        with disk_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write_records(path, (rollout.to_record() for group in groups for rollout in group))

    def write_rollouts(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Write what a step learnt from to rollouts/step-NNNNNN.jsonl."""
        if not world.is_main():
            return
        path = self.folder / ROLLOUTS / f"{step_name(step)}.jsonl"
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

    def save(
        self, step: int, counts: Mapping[str, float], labels: Iterable[str], fill: Callable[[Path | None], dict[str, Any] | None]
    ) -> None:
        """Make `step` the last whole step: `fill` writes a checkpoint with its training state to the folder it is given.

        What it returns, if anything, is added to the step's manifest. In other processes than the main one it is given no
        folder, and hands its part of the weights over.

        Raises DataError if the file system refuses; the steps before are then as they were.
        """
        self.counts, self.labels = dict(counts), set(labels)
        if not world.is_main():
            fill(None)
            self.step = step
            return
        final = self.folder / step_name(step)
        with disk_errors("save the checkpoint", final):
            for file in self._files.values():
                os.fsync(file.fileno())
            with whole_folder(final) as draft:
                more = fill(draft) or {}
                files = sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())
                write_json(draft / MANIFEST, {**self.described(), "complete": True, **more, "files": files})
            self.step = step
            self._point_to_step()
            self._drop_phases()
            self.replace()
        with disk_errors("remove old checkpoints", self.out):
            self._prune()

    def described(self) -> dict[str, Any]:
        """Return the manifest with the counts and labels of the last step."""
        return {**self.manifest, **self._standing()}

    def evals(self) -> list[dict[str, Any]]:
        """Return the rows of evals.jsonl."""
        return [line.record for line in complete_lines(self.folder / EVALS)]

    def finish(self) -> None:
        """Say in the run's manifest that it is complete."""
        if not world.is_main():
            return
        with disk_errors("write", self.folder / MANIFEST):
            self.write_manifest(complete=True, **self._standing())

    def result(self) -> dict[str, Any]:
        """What a trainer prints at its end: the checkpoint, the last step's figures, the last evaluation's."""
        evaluated = {f"eval_{name}": value for name, value in self.last_eval.items() if name != "step"}
        return {"checkpoint": str(self.checkpoint), **self.last_row, **evaluated}

    def _take_up(self) -> None:
        """Find where a run that was stopped stands, and cut what came after its last whole step."""
        folders = self._step_folders()
        whole = [folder for folder in folders if (folder / TRAINING_STATE).is_dir()]
        if folders and not whole:
            message = f"holds checkpoints, but no {TRAINING_STATE} to resume from"
            raise DataError(message, where=str(self.out), hint="--overwrite restarts")
        self.step = step_of(whole[-1]) if whole else 0
        resumable(self.out, self.folder / MANIFEST, self.manifest, {*self.may_change, *self._may_grow()})
        rollouts = list((self.folder / ROLLOUTS).glob("step-*.jsonl"))
        for path in [*folders, *rollouts]:
            if step_of(path) > self.step:
                self._remove(path)
        self.last_row, self.last_eval = self._cut(METRICS), self._cut(EVALS)
        if not self.step:
            return
        if self.last_row.get("step") != self.step:
            raise DataError(f"lacks the row of step {self.step}, the last whole one", where=str(self.folder / METRICS))
        manifest = read_manifest(self.checkpoint / MANIFEST)
        self.counts, self.labels = manifest["counts"], set(manifest["labels"])
        self._point_to_step()
        self._prune()
        self._drop_phases()
        console.info(f"{self.out}: {'was finished' if self.finished else 'resumes'} after step {self.step} of {self.steps}")

    def _drop_phases(self) -> None:
        """Remove what was kept of steps that are saved now."""
        phases = self.folder / PHASES
        for path in phases.glob("step-*"):
            if step_of(path) <= self.step:
                remove(path)
        if phases.is_dir() and not any(phases.iterdir()):
            phases.rmdir()

    def _prune(self) -> None:
        if self.keep_last:
            for folder in self._step_folders()[: -self.keep_last]:
                self._remove(folder)
        states = [folder / TRAINING_STATE for folder in self._step_folders() if (folder / TRAINING_STATE).is_dir()]
        for state in states[: -self.keep_states]:
            remove(state)

    def _may_grow(self) -> set[str]:
        """Return `steps` if their number may be another one: no step so far depends on it, and all of them are within it."""
        if not self.may_extend or not (self.folder / MANIFEST).is_file():
            return set()
        was, now = (manifest["options"].get("steps") for manifest in (read_manifest(self.folder / MANIFEST), self.manifest))
        return {"steps"} if was and now and now >= self.step else set()

    def _cut(self, name: str) -> dict[str, Any]:
        """Drop the rows of a file that tell of later steps, and what is no whole row; returns the last row that stays."""
        path = self.folder / name
        if not self.step or not path.exists():
            path.unlink(missing_ok=True)
            return {}
        kept = list(takewhile(lambda line: take(line.record, "step", int, line.where) <= self.step, complete_lines(path)))
        truncate_after(path, len(kept))
        return kept[-1].record if kept else {}

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if not world.is_main():
            return
        with disk_errors("write", self.folder / name):
            if name not in self._files:
                self._files[name] = open(self.folder / name, "ab")  # noqa: SIM115 - closed on leaving
            self._files[name].write(jsonl.dumps(row))
            self._files[name].flush()

    def _write_records(self, path: Path, records: Iterable[dict[str, Any]]) -> None:
        with whole_file(path) as file:
            file.writelines(map(jsonl.dumps, records))

    def _standing(self) -> dict[str, Any]:
        return {"counts": self.counts, "planned_steps": self.steps, "labels": sorted(self.labels)}

    def _point_to_step(self) -> None:
        with whole_file(self.folder / LATEST) as file:
            file.write(self.checkpoint.name.encode() + b"\n")

    def _step_folders(self) -> list[Path]:
        """The checkpoints of the run, in the order of their steps."""
        return sorted((path for path in self.folder.iterdir() if step_of(path) and (path / MANIFEST).is_file()), key=step_of)
