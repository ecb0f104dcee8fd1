"""Figures of a run for TensorBoard, Weights & Biases and Trackio, through accelerate's trackers.

They get the rows of metrics.jsonl and evals.jsonl as these are written, from a thread of their own: a step does not wait for a disk or a
network. A tracker that fails is warned of and left; the run continues. A resumed run continues the tracker's: in TensorBoard the
steps that are done again replace the old ones (purge_step), wandb and trackio keep what they were given first, which is the same.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Self

from s2dcli import console, world
from s2dcli.errors import UsageError
from s2dcli.files.atomic import disk_errors
from s2dcli.files.manifest import read_json, write_json
from s2dcli.files.run_folder import TENSORBOARD, TRACKED, RunFolder

TRACKERS = {"tensorboard": "s2d[track]", "wandb": "s2d[track]", "trackio": "trackio"}  # and what pip installs for each
PROJECT = "s2d"  # of wandb and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT names another
FINISH_SECONDS = 60.0  # that trackers are given at the end for what they were sent last


def parse_trackers(given: Sequence[str] | None) -> list[str]:
    """Return the trackers that --track names, each once. Raises UsageError for one that is unknown or not installed."""
    names = [name for text in given or () for name in text.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"unknown tracker {name!r}", where="--track", hint=f"there are {', '.join(TRACKERS)}")
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise UsageError(f"--track {name} needs {name}, which is not installed", hint=f"pip install '{TRACKERS[name]}'")
    return list(dict.fromkeys(names))


class Trackers:
    """The trackers of a run, from entering it to leaving it, in the main process.

    Of a run that is overwritten they are told once its folder is in its place, at the first saved step.
    """

    def __init__(self, names: Sequence[str], folder: RunFolder, options: Mapping[str, Any]) -> None:
        self._names, self._folder, self._options = names, folder, options
        self._first_step = folder.step
        self._trackers: dict[str, Any] = {}
        self._queue: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._waiting: list[tuple[dict[str, float], int]] = []
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._open()
        if self._thread:
            self._queue.put(None)
            self._thread.join(FINISH_SECONDS)
            if self._thread.is_alive():
                console.warn(f"--track: {', '.join(self._trackers)} did not take everything within {FINISH_SECONDS:.0f} s")

    def log(self, row: Mapping[str, Any], prefix: str = "") -> None:
        """Hand over the numbers in a row; those of an inner object by `outer/inner`."""
        flat: dict[str, Any] = {}
        for name, value in row.items():
            flat |= {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        values = {prefix + name: value for name, value in flat.items() if isinstance(value, int | float) and name != "step"}
        self._waiting.append((values, row["step"]))
        self._open()

    def _open(self) -> None:
        """Start the trackers unless the run's folder is still to take its place; then hand over what has waited."""
        if self._folder.folder != self._folder.out:
            return
        if self._thread is None:
            for name in self._names:
                self._start(name)
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        for item in self._waiting:
            self._queue.put(item)
        self._waiting = []

    def _start(self, name: str) -> None:
        try:
            self._trackers[name] = self._made(name)
        except Exception as error:  # each raises its own, for want of a login or a network too
            console.warn(f"--track {name}: not tracked: {_reason(error)}")

    def _made(self, name: str) -> Any:
        from accelerate import PartialState, tracking

        if world.size() == 1:
            PartialState(cpu=True)  # which trackers ask whether they are in the main process
        out, step = self._folder.out, self._first_step
        config = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in self._options.items()}
        if name == "tensorboard":
            tracker = tracking.TensorBoardTracker(TENSORBOARD, str(out), purge_step=step + 1 if step else None)
        else:
            path = out / TRACKED
            ids = read_json(path) if step and path.is_file() else {}
            resumed = name in ids
            if not resumed:
                ids[name] = f"{out.name}-{secrets.token_hex(4)}"
                with disk_errors("write", path):
                    write_json(path, ids)
            if name == "wandb":
                import wandb

                settings = wandb.Settings(console="off", silent=not console.verbose())
                how = {"id": ids[name], "name": str(out), "resume": "allow", "settings": settings}
                tracker = tracking.WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), **how)
            else:
                how = {"name": ids[name], "resume": "allow" if resumed else "never", "embed": False}
                tracker = tracking.TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), **how)
        with console.muted():
            tracker.start()
            if not step:
                tracker.store_init_configuration(config)
            url = getattr(tracker.tracker, "url", None)
        if url:
            console.info(f"{name}: {url}")
        return tracker

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            values, step = item
            self._each(lambda tracker, values=values, step=step: tracker.log(values, step=step))
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._trackers[name]
                console.warn(f"--track {name}: no longer tracked: {_reason(error)}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
