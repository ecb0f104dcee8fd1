"""Probing a pair before either is trained: what both answer, and what the teacher says of each token that the student samples.

Shapes: N completion tokens of a micro-batch, K ids, E hidden width of the teacher.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch

from s2dcli import console
from s2dcli.assembly.loading import load_scorer
from s2dcli.assembly.pair_figures import Samples, TokenFigures, count_stored
from s2dcli.assembly.pairs import require_same_pair
from s2dcli.assembly.rollouts import read_on_policy
from s2dcli.assembly.sampling import Sampler, Task, count_done, make_tasks, open_sampler, plan
from s2dcli.assembly.scoring import tail_logprobs
from s2dcli.assembly.served import has_same_texts, require_likely
from s2dcli.assembly.training import require_length
from s2dcli.engines.base import SamplingParams, Scores
from s2dcli.engines.opening import is_served, open_served_teacher
from s2dcli.engines.server import ServerEngine
from s2dcli.errors import DataError, UsageError
from s2dcli.files.manifest import without_credentials
from s2dcli.files.probe_folder import ProbeFolder
from s2dcli.files.records import Graded, Problem, Rollout
from s2dcli.grade.pool import Grader
from s2dcli.models.batching import MicroBatch
from s2dcli.models.checkpoints import load, model_config, resolve, return_freed_memory
from s2dcli.models.forward import Head
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs, require_made_with, vocabulary_size
from s2dcli.models.readers import top_k_logprobs
from s2dcli.models.scoring import read
from s2dcli.models.selftest import require_rows_fit
from s2dcli.options import EngineOptions, ModelOptions
from s2dcli.train.rows import TrainingRow
from s2dcli.train.targets import ExactTargets, TopKTargets
from s2dcli.train.vocab import divergence_loss, reverse_kl, top_k_divergence_loss

STUDENT, TEACHER, BASE = "student", "teacher", "base teacher"


class Pair:
    """Student, teacher and, where C1 is measured, the teacher before RL: found and checked against each other, nothing loaded."""

    def __init__(self, student: str, teacher: str, base_teacher: str | None, engine: EngineOptions, loading: ModelOptions) -> None:
        """Raises ModelError or UsageError."""
        named = {role: name for role, name in ((STUDENT, student), (TEACHER, teacher), (BASE, base_teacher)) if name}
        self.urls = {role: name for role, name in named.items() if is_served(name)}
        self.checkpoints = {role: resolve(name) for role, name in named.items() if role not in self.urls}
        self.student, self.engine, self.loading = self.checkpoints[STUDENT], engine, loading
        self.tokenizer = load_tokenizer(self.student.folder, loading.trust_remote_code)
        for role, checkpoint in self.checkpoints.items():
            if role != STUDENT:
                require_same_pair(checkpoint, self.student, self.tokenizer, loading)
        weights = [self.checkpoints[role].weights_sha256 for role in (TEACHER, BASE) if role in self.checkpoints]
        if len(weights) > len(set(weights)):
            problem = "--base-teacher has the teacher's weights: their log-ratio is 0 everywhere"
            raise UsageError(problem, hint="name the teacher before RL, or leave it out")

    @property
    def names(self) -> dict[str, str]:
        return {role: found.name for role, found in self.checkpoints.items()} | {
            role: without_credentials(urls) for role, urls in self.urls.items()
        }

    @property
    def vocabulary(self) -> int:
        return vocabulary_size(self.tokenizer)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Makes the prompts of both, as on-policy distillation does: the student's chat template."""
        return PromptEncoder(self.tokenizer, self.loading.chat_template, parse_template_kwargs(self.loading.chat_template_kwargs))

    @cached_property
    def _servers(self) -> dict[str, ServerEngine]:
        return {
            role: open_served_teacher(urls, self.student, self.tokenizer, self.engine, self.loading) for role, urls in self.urls.items()
        }

    def read_student(self, path: str, temperature: float) -> Samples:
        """Read graded rollouts of the student. Raises an S2DError for those of another model, tokenizer or temperature."""
        samples = Samples().add_all(read_on_policy(path, temperature))
        self._require_sampler(STUDENT, samples, path)
        rows = list(samples.rows)
        require_made_with(self.tokenizer, rows, samples.picked)
        for checkpoint in self.checkpoints.values():
            require_rows_fit(model_config(checkpoint, self.loading.trust_remote_code), rows, path)
        return samples

    def read_teacher(self, path: str, temperature: float) -> Samples:
        """Count graded rollouts of the teacher. Raises DataError for those of another model or temperature."""
        samples = count_stored(path)
        self._require_sampler(TEACHER, samples, path)
        found = samples.seen.sampler["temperature"]
        if found != temperature:
            raise DataError(f"sampled at temperature {found}, the student at {temperature:g}", where=path, hint="sample both alike")
        return samples

    def _require_sampler(self, role: str, samples: Samples, path: str) -> None:
        sampler, checkpoint = samples.seen.sampler, self.checkpoints.get(role)
        if checkpoint and sampler.get("checkpoint") not in ("", checkpoint.weights_sha256):
            raise DataError(
                f"sampled by {sampler['model']} (step {sampler['step']}), whose weights are not those of the {role} {checkpoint.name}",
                where=path,
                hint=f"name the checkpoint that sampled them, or sample the {role}'s own",
            )

    def tasks(self, problems: Sequence[Problem], max_tokens: int, max_prompt_tokens: int | None) -> list[Task]:
        """Encode problems; raises UsageError if a model is to take more tokens than it computes right."""
        tasks = make_tasks(problems, self.encoder, max_prompt_tokens)
        longest = max(len(task.prompt_ids) for task in tasks) + max_tokens
        for role, checkpoint in self.checkpoints.items():
            require_length(checkpoint, role, longest, self.loading)
        return tasks

    def open_sampler(self, role: str, tasks: Sequence[Task], params: SamplingParams, seed: int) -> Sampler:
        """Open what samples from student or teacher: the engine of the options, or the servers of the teacher. Raises an S2DError."""
        if role in self.urls:
            identity = {"model": self.names[role], "revision": "", "step": 0, "checkpoint": ""}
            return Sampler(self._servers[role], self.encoder, params, seed=seed, identity=identity, batch_tokens=self.engine.sample_tokens)
        checkpoint = self.checkpoints[role]
        sampler = open_sampler(checkpoint, self.encoder, params, self.engine, self.loading, seed=seed)
        if self.engine.parity_rows:
            sampler.prove(tasks, load_scorer(checkpoint, self.loading))
        return sampler

    def look(self, rows: Sequence[TrainingRow], k: int, temperature: float, tokens_per_batch: int) -> dict[TrainingRow, TokenFigures]:
        """Load teacher and student, and return what both say of the tokens of the student's rows. Raises an S2DError."""
        if not any(len(row.completion_ids) for row in rows):
            raise DataError("no completion of the student has a token", where=self.names[STUDENT])
        scores = self._served_scores(TEACHER, rows, k) if TEACHER in self.urls else {}
        how = {**self.loading.of_load(), "tokenizer": self.tokenizer}
        loaded = load(self.student, **how)
        watcher: Watcher = ServedWatcher(scores)
        if TEACHER in self.checkpoints:
            teacher = load(self.checkpoints[TEACHER], **how)
            watcher = LiveWatcher(freeze(Policy(teacher.model, loaded.vocabulary)), k, temperature)
        policy = freeze(Policy(loaded.model, loaded.vocabulary))
        found = {}
        with console.progress("comparing token by token", len(rows), "rollouts") as advance:
            for row, figures in look_at(policy, watcher, rows, k, temperature, tokens_per_batch=tokens_per_batch, pad_id=loaded.pad_id):
                found[row] = figures
                advance()
        return found

    def log_ratios(self, tokens: Mapping[TrainingRow, TokenFigures], temperature: float) -> dict[TrainingRow, np.ndarray] | None:
        """Return log teacher - log base teacher of each row's tokens, [T]; None without a base teacher. Raises an S2DError."""
        rows = list(tokens)
        if BASE in self.urls:
            scored = ((row, scores.sampled_T) for row, scores in self._served_scores(BASE, rows, 1).items())
        elif BASE in self.checkpoints:
            gc.collect()
            return_freed_memory()
            scored = load_scorer(self.checkpoints[BASE], self.loading)(rows, temperature)
        else:
            return None
        return {row: tokens[row].teacher_logprobs.astype(np.float64) - logprobs for row, logprobs in scored}

    def _served_scores(self, role: str, rows: Sequence[TrainingRow], k: int) -> dict[TrainingRow, Scores]:
        engine = self._servers[role]
        proved = has_same_texts(engine, self.tokenizer)
        rows = [row for row in rows if len(row.completion_ids)]
        found = {}
        with console.progress(f"scoring by the {role}", len(rows), "rollouts") as advance:
            for index, scores in engine.score(rows, k):
                if not proved:
                    require_likely(engine, scores)
                found[rows[index]] = scores
                advance()
        return found


def sample_graded(
    sampler: Sampler, grader: Grader, tasks: Sequence[Task], n: int, folder: ProbeFolder | None, name: str
) -> Iterator[Graded]:
    """Yield `n` graded rollouts of each task: those that a folder's file `name` holds already, then new ones, which it gets."""
    batches = plan(tasks, n, sampler.params.max_tokens, sampler.batch_tokens)
    done = count_done(folder.lines(name=name), batches, n, whole_batches=sampler.engine.whole_batches) if folder else 0
    with console.progress(f"sampling {name.removesuffix('.jsonl')}", len(tasks) * n, "rollouts") as advance:
        for line in folder.lines(done, name) if folder else ():
            yield Graded.from_record(line.record, line.where)
            advance()
        if not folder:
            for group in sampler.sample_batches(batches, n):
                yield from _graded(grader, group, advance)
            return
        with folder.open_rollouts(done, name) as writer:
            for group in sampler.sample_batches(batches, n, done):
                for rollout in _graded(grader, group, advance):
                    writer.write(rollout.to_record())
                    yield rollout
                writer.flush()
                folder.keep = True


def _graded(grader: Grader, group: Sequence[Rollout], advance: Callable[[], None]) -> Iterator[Graded]:
    for record in grader.graded([rollout.to_record() for rollout in group]):
        yield Graded.from_record(record, "")
        advance()


class Look(NamedTuple):
    """What a teacher says of completion tokens: what their KL is taken to, its K likeliest ids, and the tokens' own log-probs."""

    targets: ExactTargets | TopKTargets
    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    sampled_N: torch.Tensor


class Watcher(Protocol):
    """A teacher that looks at micro-batches; `others` are models that are given these."""

    others: Sequence[Policy]

    def look(self, batch: MicroBatch) -> Look: ...


class LiveWatcher:
    """A teacher in memory."""

    def __init__(self, policy: Policy, k: int, temperature: float) -> None:
        self.policy, self.k, self.temperature = policy, k, temperature
        self.others = [policy]

    def look(self, batch: MicroBatch) -> Look:
        hidden_NE, head = self.policy.states(batch), self.policy.head()
        ids_NK, logprobs_NK, _, sampled_N = top_k_logprobs(hidden_NE, head, self.k, self.temperature, batch.targets_N)
        return Look(ExactTargets(hidden_NE, head, self.temperature), ids_NK, logprobs_NK, sampled_N)


class ServedWatcher:
    """A teacher on servers, which has scored all rows before they are looked at."""

    others = ()

    def __init__(self, scores: Mapping[TrainingRow, Scores]) -> None:
        self.scores = scores

    def look(self, batch: MicroBatch) -> Look:
        found = [self.scores[row] for row in batch.rows]
        ids_NK, logprobs_NK = (np.concatenate([getattr(scores, name) for scores in found]) for name in ("ids_TK", "logprobs_TK"))
        arrays = (ids_NK.astype(np.int64), logprobs_NK, tail_logprobs(logprobs_NK))
        targets = TopKTargets(*(torch.from_numpy(values).to(batch.targets_N.device) for values in arrays))
        sampled_N = batch.per_token([scores.sampled_T for scores in found])
        return Look(targets, targets.ids_NK, targets.logprobs_NK, sampled_N)


def look_at(
    student: Policy, watcher: Watcher, rows: Sequence[TrainingRow], k: int, temperature: float, *, tokens_per_batch: int, pad_id: int
) -> Iterator[tuple[TrainingRow, TokenFigures]]:
    """Yield the rows that have completion tokens, with what teacher and student say of them, without gradient."""

    def reader(hidden_ND: torch.Tensor, head: Head, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        look = watcher.look(batch)
        even_N = hidden_ND.new_ones(len(hidden_ND), dtype=torch.float32)
        loss = divergence_loss if isinstance(look.targets, ExactTargets) else top_k_divergence_loss
        _, figures = loss(hidden_ND, head, look.targets, even_N, reverse_kl, temperature=temperature)
        ids_NK, logprobs_NK, _ = top_k_logprobs(hidden_ND, head, k, temperature)
        both_NKK = ids_NK[:, :, None] == look.ids_NK[:, None, :]
        ours_NK, theirs_NK = both_NKK.any(2), both_NKK.any(1)
        student_N, teacher_N = ((logs.exp() * shared).sum(1) for logs, shared in ((logprobs_NK, ours_NK), (look.logprobs_NK, theirs_NK)))
        return figures["kl"], ours_NK.sum(1), student_N, teacher_N, look.sampled_N

    for row, found in read(student, rows, reader, tokens_per_batch=tokens_per_batch, pad_id=pad_id, others=watcher.others):
        yield row, TokenFigures(*found)
