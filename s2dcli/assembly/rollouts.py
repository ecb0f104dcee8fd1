"""Stored rollouts as training rows, and what of their file is needed beside them. Imports nothing heavy."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from s2dcli import console, world
from s2dcli.errors import DataError
from s2dcli.files import jsonl
from s2dcli.files.records import Graded, Rollout, Row, dataset_of, read_graded, read_rollouts
from s2dcli.train.rows import Group, RowMaker, TrainingRow, renamed

GOLD_ENGINE = "gold"  # `sampler.engine` of worked solutions written by `s2d prepare --solutions`
# Rollouts by which another tokenizer is noticed: the first ones, and one of each of the first prompts.
ROWS_TO_CHECK, PROMPTS_TO_CHECK = 16, 256


@dataclass(frozen=True)
class StoredRollouts:
    """The rows of a file or pipe.

    `samples` are some of them, by which another tokenizer is noticed; `samplers` tells who drew them, each once;
    `datasets` where their problems are from; `sha256` is the hash of what was piped in.
    """

    path: str
    rows: list[TrainingRow]
    samples: list[Rollout]
    samplers: list[dict]
    datasets: set[str]
    sha256: str

    def max_tokens(self) -> int:
        """Return the length limit that all rollouts were sampled under. Raises DataError if they differ."""
        limits = {sampler["max_tokens"] for sampler in self.samplers}
        if len(limits) > 1:
            raise DataError(f"sampled with several --max-tokens: {', '.join(map(str, sorted(limits)))}", where=jsonl.input_name(self.path))
        return limits.pop()

    def groups(self) -> list[Group]:
        """Return the rows group by group, in the order in which the groups begin."""
        groups: dict[str, Group] = {}
        for row in self.rows:
            groups.setdefault(row.group_id, []).append(row)
        return list(groups.values())


def store(path: str, rollouts: Iterable[Rollout], *, keep_records: bool = False) -> StoredRollouts:
    """Hold the rollouts read from `path` as training rows: 8 bytes for a completion token.

    With `keep_records` their whole records too, to be written again. The main process reads, for all.
    """
    return world.from_main(_store, path, rollouts, keep_records)


def _store(path: str, rollouts: Iterable[Rollout], keep_records: bool) -> StoredRollouts:
    rows: list[TrainingRow] = []
    samples: list[Rollout] = []
    maker, samplers, num_prompts, digest = RowMaker(), {}, 0, hashlib.sha256()
    datasets: set[str] = set()
    for rollout in rollouts:
        reward = rollout.reward if isinstance(rollout, Graded) else None
        rows.append(maker.row(rollout, reward, rollout.to_record() if keep_records else None))
        new_prompt, num_prompts = maker.num_prompts > num_prompts, maker.num_prompts
        if len(rows) <= ROWS_TO_CHECK:
            samples.append(rollout)
        elif new_prompt and num_prompts <= PROMPTS_TO_CHECK:
            samples.append(replace(rollout, completion=[], completion_ids=[], completion_logprobs=[]))
        samplers[jsonl.dumps(rollout.sampler)] = rollout.sampler
        datasets.add(dataset_of(rollout.source))
        if jsonl.is_stream(path):
            digest.update(jsonl.dumps(rollout.to_record()))
    return StoredRollouts(path, rows, samples, list(samplers.values()), datasets, digest.hexdigest())


def read_on_policy(path: str, temperature: float) -> Iterator[Graded]:
    """Yield graded rollouts whose log-probs are those they were sampled with, at `temperature`. Raises DataError for others."""
    return _on_policy(path, read_graded(path), temperature)


def on_policy(path: str, temperature: float | None) -> Iterator[Rollout]:
    """Yield rollouts, graded or not, as `read_on_policy` does; with None however they were sampled."""
    return _on_policy(path, read_rollouts(path), temperature)


def _on_policy(path: str, rollouts: Iterable[tuple[str, Row]], temperature: float | None) -> Iterator[Row]:
    empty = True
    for where, row in rollouts:
        empty = False
        drawn = (row.sampler.get("temperature"), row.sampler.get("top_p"), row.sampler.get("top_k"))
        if temperature is not None and drawn != (temperature, 1.0, 0):
            raise DataError(
                "sampled at temperature {}, top-p {}, top-k {}: the log-probs do not belong to the policy at --temperature {}".format(
                    *drawn, temperature
                ),
                where=where,
                hint="sample with --top-p 1 --top-k 0 and train with the same --temperature",
            )
        yield row
    if empty:
        raise DataError("holds no rollouts", where=jsonl.input_name(path))


def read_targets(path: str, only_correct: bool, labels: set[str]) -> Iterator[Rollout]:
    """Yield the rollouts to train on; adds to `labels` whose answers that spends, also those of dropped rows."""
    kept = dropped = 0
    for _, rollout in read_graded(path) if only_correct else read_rollouts(path):
        if only_correct or rollout.sampler.get("engine") == GOLD_ENGINE:
            labels.add(rollout.problem_sha256)
        if only_correct and not rollout.label:
            dropped += 1
        else:
            kept += 1
            yield rollout
    if only_correct:
        console.info(f"--only-correct keeps {kept} of {kept + dropped} rollouts")
    if not kept:
        raise DataError("holds no rollouts to train on", where=jsonl.input_name(path))


def read_groups(path: Path, num_samples: int) -> list[list[Rollout]]:
    """Return the groups, of `num_samples` rollouts each, that RunFolder.write_phase has written to a file. Raises DataError."""
    rollouts = [rollout for _, rollout in read_rollouts(path)]
    return [rollouts[start : start + num_samples] for start in range(0, len(rollouts), num_samples)]


def draw(groups: Sequence[Group], chosen: Sequence[int]) -> list[Group]:
    """Return fresh copies of the chosen groups; one that is drawn again in the step gets a name of its own."""
    draws: Counter[int] = Counter()
    drawn = []
    for index in chosen:
        again = f".{draws[index]}" if draws[index] else ""
        drawn.append(renamed(groups[index], groups[index][0].group_id + again))
        draws[index] += 1
    return drawn
