"""Measuring: problem sets one after the other with one model load, or graded rollouts as they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2dcli import console, options, stats
from s2dcli.datasets.benchmarks import BENCHMARKS, read_benchmark
from s2dcli.errors import DataError, UsageError, nearest
from s2dcli.exports import formats
from s2dcli.exports.evaluated import HUB_ID, Evaluated
from s2dcli.files import jsonl
from s2dcli.files.atomic import disk_errors
from s2dcli.files.eval_folder import EXPORT, GRADED, PROBLEMS, RESULTS, EvalFolder
from s2dcli.files.ledger import warnings
from s2dcli.files.manifest import name_samplers
from s2dcli.files.records import Problem, dataset_of, read_problems, read_verdicts, require_labels
from s2dcli.grade.normalise import normalise
from s2dcli.grade.pool import MATH, Grader
from s2dcli.grade.rewards import parse_all

if TYPE_CHECKING:
    from s2dcli.assembly.sampling import Sampler
    from s2dcli.models.checkpoints import Checkpoint

ANSWERS_KEPT = 2**16  # answers whose normal form is remembered
# What tells samplers apart
SAMPLER_KEYS = ("model", "revision", "checkpoint", "step", "temperature", "top_p", "top_k", "max_tokens", "template")


@dataclass(frozen=True)
class Target:
    """One set of problems, or file of graded rollouts, that is measured; `out` is its folder."""

    source: str
    task: str
    problems: list[Problem]
    out: Path | None


def name_targets(sources: list[str], out: Path | None) -> list[Target]:
    """Name each source, and give it its folder: -o itself, or with several sources one in it. Raises UsageError for equal names."""
    tasks = [_task(source) for source in sources]
    if repeated := {task for task in tasks if tasks.count(task) > 1}:
        raise UsageError(f"several PROBLEMS are named {', '.join(sorted(repeated))}", hint="measure them one by one, or rename the files")
    return [
        Target(source, task, [], out and (out / task if len(sources) > 1 else out)) for source, task in zip(sources, tasks, strict=True)
    ]


def _task(source: str) -> str:
    if jsonl.is_stream(source):
        return "stdin"
    name, is_copy, _ = source.partition("=")
    return name if is_copy and name in BENCHMARKS else source if source in BENCHMARKS else Path(source).name.split(".")[0] or "problems"


def read_target(source: str) -> list[Problem]:
    """Return the problems of a file, of standard input or of a benchmark; a file of a benchmark's name counts as the file."""
    name, is_copy, path = source.partition("=")
    if is_copy and name in BENCHMARKS:
        return read_benchmark(name, path)
    if source in BENCHMARKS and not Path(source).exists():
        return read_benchmark(source)
    if not jsonl.is_stream(source) and not Path(source).exists() and "/" not in source and "." not in source:
        hint = f"benchmarks: {', '.join(BENCHMARKS)}"
        raise DataError(f"no such file, and no benchmark of that name{nearest(source, BENCHMARKS)}", where=source, hint=hint)
    return read_problems(source)


def check_problems(targets: list[Target], grading: options.GradingOptions, exports: list[formats.Export]) -> None:
    """Raise DataError for problems without answers that the rewards need, and for a data set that an export has no place for."""
    for target in targets:
        if any(reward.built_in for reward in parse_all(grading.reward or [MATH])):
            hint = "measure on labelled problems, or use a reward that needs no answer: --reward python:MODULE:FUNCTION"
            require_labels(target.problems, hint)
        dataset = dataset_of(target.problems[0].source)
        if formats.Export.hub in exports and not HUB_ID.fullmatch(dataset):
            problem = f"--export hub: no hub id is known of the data set {dataset!r}"
            raise DataError(problem, where=target.source, hint="NAME=PATH reads a benchmark's local copy under its hub id")


class Evaluation:
    """Measures one set of problems after the other; the model, once opened, stays."""

    def __init__(self, checkpoint: Checkpoint | None, k: int, name: str | None, preset: str, exports: list[formats.Export]) -> None:
        self.checkpoint, self.k, self.name, self.preset, self.exports = checkpoint, k, name, preset, exports
        self.sampler: Sampler | None = None
        self.canonical = lru_cache(ANSWERS_KEPT)(normalise)

    def open(
        self,
        stack: ExitStack,
        targets: list[Target],
        drawing: tuple[float, float, int, int],
        sampling: options.EngineOptions,
        grading: options.GradingOptions,
        loading: options.ModelOptions,
        seed: int,
    ) -> None:
        """Encode all problems, load the model and start the grader. `drawing`: temperature, top-p, top-k, maximum of tokens."""
        console.starting()
        from s2dcli.assembly.loading import load_scorer
        from s2dcli.assembly.sampling import make_tasks, open_sampler
        from s2dcli.engines.base import SamplingParams
        from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs

        self.grader = stack.enter_context(Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit))
        template_kwargs = parse_template_kwargs(loading.chat_template_kwargs)
        tokenizer = load_tokenizer(self.checkpoint.folder, loading.trust_remote_code)
        encoder = PromptEncoder(tokenizer, loading.chat_template, template_kwargs)
        self.tasks = {target.task: make_tasks(target.problems, encoder) for target in targets}
        self.sampler = stack.enter_context(open_sampler(self.checkpoint, encoder, SamplingParams(*drawing), sampling, loading, seed=seed))
        self.scorer = load_scorer(self.checkpoint, loading) if sampling.parity_rows else None

    def measure(self, target: Target, folder: EvalFolder | None, manifest: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
        """Sample and grade what is not there yet, count all of it, and finish the folder. Returns the results."""
        summary, seen, measured, started = stats.Summary(self.canonical), Seen(), set(), time.monotonic()
        done, rows = self._samples(target, folder) if self.checkpoint else (0, _lines(target.source, writing=folder is not None))
        writer = stack.enter_context(folder.open_rollouts(done)) if folder else None
        total = len(target.problems) * self.k if self.checkpoint else None
        advance = stack.enter_context(console.progress(f"evaluating {target.task}", total, "rollouts"))

        def count(record: dict[str, Any]) -> None:
            seen.note(record)
            measured.add(record["problem_sha256"])
            summary.add(record)
            advance()

        for line in folder.lines(done) if folder else ():
            count(line.record)
        for record, line in rows:
            count(record)
            if writer:
                writer.write_line(line)
                if self.checkpoint:  # graded rollouts that are there already are read from the start
                    writer.flush()
                    folder.keep = True
        try:
            figures = summary.report()
        except ValueError as error:
            raise DataError(f"cannot be evaluated: {error}", where=jsonl.input_name(target.source)) from None
        seconds = time.monotonic() - started
        told = {"preset": self.preset, **figures, "seconds": round(seconds, 3) if self.checkpoint else None}
        results = {"name": self.name or seen.sampler["model"], **seen.sampler, **told}
        if not self.checkpoint:
            name_samplers(manifest, [{"sampler": seen.sampler}])
        if folder:
            writer.sync()
            folder.write_rows(PROBLEMS, summary.rows())
            counts = {"problems": figures["problems"], "rollouts": figures["problems"] * figures["k"], "tokens": figures["tokens"]}
            folder.finish(results, counts={**counts, "seconds": seconds}, measured=sorted(measured))
        for caution in (*stats.cautions(figures), *warnings(manifest, measured)):
            console.warn(caution)
        console.info(stats.in_words(figures))
        if advice := stats.problems_or_samples(figures):
            console.info(advice)
        return results

    def _samples(self, target: Target, folder: EvalFolder | None) -> tuple[int, Iterator[tuple[dict[str, Any], bytes]]]:
        """Return how many rows are there already, and the graded rows that are still to be sampled."""
        from s2dcli.assembly.sampling import count_done, plan

        sampler, tasks = self.sampler, self.tasks[target.task]
        batches = plan(tasks, self.k, sampler.params.max_tokens, sampler.batch_tokens)
        done = count_done(folder.lines(), batches, self.k, whole_batches=sampler.engine.whole_batches) if folder else 0
        if self.scorer:
            sampler.prove(tasks, self.scorer)
        groups = ([row.to_record() for row in group] for group in sampler.sample_batches(batches, self.k, done))
        return done, ((record, jsonl.dumps(record)) for group in groups for record in self.grader.graded(group))

    def export(self, target: Target, folder: EvalFolder, results: dict[str, Any]) -> None:
        """Write what --export asks for, from what the folder holds."""
        if self.exports and "se_over" not in results:
            problem = "was measured by an earlier version of s2d, whose results have not all that an export needs"
            raise DataError(problem, where=str(folder.out), hint="s2d eval --rollouts FOLDER/rollouts.jsonl measures them again")

        def rows() -> Iterator[dict[str, Any]]:
            return (record for _, record in jsonl.read(folder.out / GRADED, "graded rollouts"))

        for kind in self.exports:
            dataset = dataset_of(next(rows())["source"])
            named = next((name for name, known in BENCHMARKS.items() if known.hub_id == dataset), "")
            task = named or (target.task if self.checkpoint else dataset.rpartition("/")[2] or target.task)
            when = (folder.out / RESULTS).stat().st_mtime
            with disk_errors("export", folder.out):
                files = formats.write(kind, Evaluated(results, rows, task, when, self.canonical), folder.out / EXPORT)
            console.info(f"{kind.value}: {', '.join(map(str, files))}")


def _lines(path: str, *, writing: bool) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield graded rollouts, each with the line to be written of it."""
    for where, raw, record in read_verdicts(path):
        line = b""
        if writing:
            line = raw.strip() + b"\n" if raw.isascii() else jsonl.dumps(jsonl.parse_strict(raw, where))
        yield record, line


class Seen:
    """Who sampled the completions, how, and of which data set; one result must not mix models or ways of sampling."""

    def __init__(self) -> None:
        self.sampler: dict[str, Any] = {}
        self._last: tuple[Any, Any] = (None, None)

    def note(self, record: dict[str, Any]) -> None:
        """Compare one row with those before it. Raises DataError."""
        sampler, source = record["sampler"], record["source"]
        if (sampler, source) == self._last:
            return
        self._last = (sampler, source)
        for key in SAMPLER_KEYS:
            value = sampler.get(key, "")
            if self.sampler.setdefault(key, value) != value:
                mixed = f"rollouts of different samplers in one evaluation: {key} {self.sampler[key]!r} and {value!r}"
                raise DataError(mixed, hint="evaluate them one by one")
        dataset = "/".join(str(part) for part in (source.get("dataset"), source.get("split")) if part)
        if self.sampler.setdefault("dataset", dataset) != dataset:
            self.sampler["dataset"] = "mixed"
