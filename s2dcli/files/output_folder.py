"""The folder that a command writes: by one process at a time, resumed or replaced only where this command has written it.

out/ s2d.json and what the kind of folder consists of (RunFolder, EvalFolder, CacheFolder)
     .lock       while a process writes there
     .s2d-new/   what `--overwrite` writes, while the old content stays as it is ...
     .s2d-ready/ ... and when it is about to take its place: whatever ends the process, the next one completes that

Only what s2d has written is ever removed: files that match `FILES`, and the manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Self

from s2dcli import world
from s2dcli.errors import UsageError
from s2dcli.files.atomic import disk_errors, is_temporary, remove, remove_leftovers, sync
from s2dcli.files.lock import LOCK, locked
from s2dcli.files.manifest import MANIFEST, write_json
from s2dcli.files.output import inputs_of, refuse_both, refuse_inputs, refuse_other_kind, resumable

NEW, READY = ".s2d-new", ".s2d-ready"
SHOWN = 5  # files that an error names


class OutputFolder:
    """A folder in this process's hands, from entering it to leaving it.

    `folder` is where its files are written to: `out`, or a folder in it until `replace` puts these in the place of the
    old ones. `keep` says whether what was written is worth keeping if an error ends the work.
    """

    FILES: ClassVar[tuple[str, ...]] = ()  # glob patterns of what commands of this kind write, beside the manifest
    old: dict[str, Any] | None = None  # manifest of what is resumed

    def __init__(
        self, out: Path, manifest: dict[str, Any], *, may_change: Collection[str] = (), overwrite: bool = False, resume: bool = False
    ) -> None:
        """`manifest` describes the work (manifest.describe); `may_change` are options that a resume may change.

        Nothing is touched before the folder is entered.
        """
        self.out, self.manifest, self.may_change = out, manifest, may_change
        self.overwrite, self.resume = overwrite, resume
        self.folder = out
        self.keep = False
        self._held = ExitStack()

    @classmethod
    def check(cls, out: Path, command: str, inputs: Iterable[str | Path] = (), *, overwrite: bool = False, resume: bool = False) -> None:
        """Raise UsageError unless `out` is new or empty, or `command` wrote it and may replace or resume it."""
        world.from_main(cls._check, out, command, inputs, overwrite=overwrite, resume=resume)

    @classmethod
    def _check(cls, out: Path, command: str, inputs: Iterable[str | Path] = (), *, overwrite: bool, resume: bool) -> None:
        refuse_both(overwrite, resume)
        refuse_inputs(out, inputs)
        if os.path.lexists(out) and not out.is_dir():
            raise UsageError("exists and is not a folder", where=str(out), hint="choose another -o")
        if not out.is_dir() or not _contents(out):
            return
        if not overwrite and not resume:
            raise UsageError("output exists", where=str(out), hint="--resume resumes it, --overwrite replaces it, or choose another -o")
        how = "--overwrite" if overwrite else "--resume"
        manifest = next((path for path in (out / MANIFEST, out / READY / MANIFEST) if path.is_file()), None)
        if manifest is None:
            raise UsageError(f"was not made by s2d (no {MANIFEST}): {how} leaves it alone", where=str(out), hint="choose another -o")
        refuse_other_kind(out, manifest, command, how)
        if overwrite and (foreign := cls.foreign(out)):
            names = ", ".join(path.relative_to(out).as_posix() for path in foreign[:SHOWN]) + (", ..." if len(foreign) > SHOWN else "")
            problem = f"s2d did not write {names} in there: --overwrite leaves it all alone"
            raise UsageError(problem, where=str(out), hint="move it away, or choose another -o")

    @classmethod
    def written(cls, out: Path) -> set[Path]:
        """Return the files in `out` that commands of this kind have written."""
        return {path for pattern in (MANIFEST, *cls.FILES) for path in out.glob(pattern)}

    @classmethod
    def foreign(cls, out: Path) -> list[Path]:
        """Return the files in `out` that s2d did not write."""
        written = cls.written(out)
        top = (path for path in _contents(out) if path.name not in (NEW, READY))
        files = (path for entry in top for path in (entry, *entry.rglob("*")) if path.is_symlink() or not path.is_dir())
        return sorted(path for path in files if path not in written and not is_temporary(path))

    def __enter__(self) -> Self:
        """Lock the folder, and make or resume it. Raises UsageError or DataError."""
        options = {"overwrite": self.overwrite, "resume": self.resume}
        self._check(self.out, self.manifest["command"], inputs_of(self.manifest), **options)
        with disk_errors("make the folder", self.out), ExitStack() as held:
            self.out.mkdir(parents=True, exist_ok=True)
            held.callback(self._remove_if_empty)
            held.enter_context(locked(self.out))
            self._check(self.out, self.manifest["command"], **options)  # as it is now that nobody else writes there
            if (self.out / READY).is_dir():
                self._take_place()
            shutil.rmtree(self.out / NEW, ignore_errors=True)
            remove_leftovers(self.out)
            if self.overwrite and _contents(self.out):
                self.folder = self.out / NEW
                self.folder.mkdir()
            self._open()
            self._held = held.pop_all()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Unlock the folder; after an error nothing is left behind that is not worth keeping."""
        with suppress(OSError):
            if self.folder != self.out:
                shutil.rmtree(self.folder)
            elif error and not self.keep and not self.foreign(self.out):  # else --resume needs the manifest
                self._remove_written()
        self._held.close()

    @property
    def finished(self) -> bool:
        """Whether what is resumed was finished already."""
        return self.old is not None and self.old["complete"]

    def write_manifest(self, *, complete: bool, **more: Any) -> None:
        """Write the manifest, with `more` in it. Raises OSError."""
        write_json(self.folder / MANIFEST, {**self.manifest, "complete": complete, **more})

    def replace(self) -> None:
        """Put what was written in the place of the old content, if --overwrite is under way: it can stand alone now. Raises OSError."""
        if self.folder != self.out:
            self.folder.rename(self.out / READY)
            self.folder, self.keep = self.out, True
            self._take_place()

    def _open(self) -> None:
        """Make or resume what is in the folder. Raises UsageError or DataError."""
        if self.resume:
            self.old = resumable(self.out, self.folder / MANIFEST, self.manifest, self.may_change)
        if self.old is None:
            self.write_manifest(complete=False)
        self.keep = self.old is not None

    def _take_place(self) -> None:
        """Remove the old content, its manifest last, then move the new one up, its manifest last."""
        ready = self.out / READY
        if (ready / MANIFEST).is_file():
            if (self.out / MANIFEST).is_file():
                self._remove_written()
            for path in sorted(ready.iterdir(), key=lambda path: path.name == MANIFEST):
                path.rename(self.out / path.name)
            sync(self.out)
        shutil.rmtree(ready)

    def _remove_written(self) -> None:
        """Remove what s2d has written in the folder, last what shows that it was s2d. Raises OSError."""
        tops = {pattern.split("/")[0] for pattern in (MANIFEST, *self.FILES)}
        for path in sorted(_contents(self.out), key=lambda path: (path.name == MANIFEST, not path.is_file())):
            if any(fnmatch(path.name, top) for top in tops):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a file or folder of ours in `folder`, but nothing that s2d did not write in it. Raises OSError."""
        written = self.written(self.folder)
        files = [file for file in (path, *path.rglob("*")) if file.is_symlink() or not file.is_dir()]
        if written.issuperset(files):
            remove(path)
        else:
            for file in written.intersection(files):
                file.unlink()

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.out.rmdir()


def _contents(out: Path) -> list[Path]:
    """What is in a folder, but for its lock and what a killed process has left half written."""
    return [path for path in out.iterdir() if path.name not in (LOCK, NEW) and not is_temporary(path)]
