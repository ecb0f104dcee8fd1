"""From problems to rollouts: plans the batches, asks an engine, and builds the records.

The plan depends on the whole input only. Batches hold whole consecutive problems, so results come
out in input order, a group at a time, and a shard is a run of whole batches: the shards, one after
the other, are the bytes of the whole. Engines that batch by themselves get all rows at once, and a
shard is then the same problems and seeds, whose log-probs may differ in the last decimals.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

from s2dcli import console, world
from s2dcli.engines.base import Engine, Request, Sample, SamplingParams
from s2dcli.engines.opening import open_engine
from s2dcli.engines.weights import ParityGate, WeightSource, WeightSync
from s2dcli.errors import DataError, UsageError
from s2dcli.files.output import CompleteLine
from s2dcli.files.records import Problem, Rollout, row_seed
from s2dcli.models.checkpoints import Checkpoint, LoadedModel
from s2dcli.models.prompts import PromptEncoder
from s2dcli.options import EngineOptions, ModelOptions

if TYPE_CHECKING:
    from s2dcli.engines.weights import Score
    from s2dcli.models.adapters import Adapter
    from s2dcli.models.policy import Policy
    from s2dcli.models.sharding import Replica

LOGPROB_DECIMALS = 6
GIVE_UP_SECONDS = 10.0  # for vLLM to come to its next token


@dataclass(frozen=True)
class Task:
    """One group to sample: a problem, its prompt's ids, and the name of the group."""

    problem: Problem
    prompt_ids: list[int]
    group_id: str
    reasoning_open: bool = False  # the rendered prompt ends inside <think>


def make_tasks(problems: Sequence[Problem], encoder: PromptEncoder, max_prompt_tokens: int | None = None) -> list[Task]:
    """Encode problems; those with longer prompts are dropped and counted. Raises DataError if none is left."""
    tasks = [
        Task(problem, encoder.encode(problem.prompt, f"problem {problem.id!r}"), problem.id, encoder.opens_reasoning(problem.prompt))
        for problem in problems
    ]
    kept = [task for task in tasks if max_prompt_tokens is None or len(task.prompt_ids) <= max_prompt_tokens]
    if len(kept) < len(tasks):
        message = f"{len(tasks) - len(kept)} of {len(tasks)} prompts are longer than {max_prompt_tokens} tokens"
        if not kept:
            raise DataError(message, hint="raise --max-prompt-tokens")
        console.warn(f"{message}: their problems are dropped")
    return kept


def tasks_of_step(tasks: Sequence[Task], chosen: Sequence[int], step: int) -> list[Task]:
    """Name the groups of a training step `ID@STEP`, and `ID@STEP.DRAW` where a problem is drawn again in it."""
    draws: Counter[int] = Counter()
    named = []
    for index in chosen:
        name = f"{tasks[index].group_id}@{step}" + (f".{draws[index]}" if draws[index] else "")
        draws[index] += 1
        named.append(replace(tasks[index], group_id=name))
    return named


def plan(tasks: Sequence[Task], num_samples: int, max_tokens: int, batch_tokens: int) -> list[list[Task]]:
    """Cut tasks into batches of whole groups: rows x (longest prompt + max_tokens) <= batch_tokens.

    A group that is larger than that is a batch of its own, which the engine cuts further.
    """
    batches: list[list[Task]] = []
    longest = 0
    for task in tasks:
        longest = max(longest, len(task.prompt_ids))
        if batches and (len(batches[-1]) + 1) * num_samples * (longest + max_tokens) <= batch_tokens:
            batches[-1].append(task)
        else:
            batches.append([task])
            longest = len(task.prompt_ids)
    return batches


def shard_of(batches: list[list[Task]], index: int, count: int) -> list[list[Task]]:
    """Return the `index`-th (from 1) of `count` consecutive runs of whole batches."""
    return batches[len(batches) * (index - 1) // count : len(batches) * index // count]


def count_done(kept: Iterable[CompleteLine], batches: Sequence[Sequence[Task]], num_samples: int, *, whole_batches: bool) -> int:
    """Return how many rows of an unfinished file a resumed run keeps.

    With `whole_batches` those of a batch that is not all there are sampled again: log-probs depend, in
    the sixth decimal, on the batch that a row was sampled in. Raises DataError if the rows are others
    than the first ones of the plan.
    """
    expected = ((task, index) for batch in batches for task in batch for index in range(num_samples))
    count = 0
    for where, _, record in kept:
        task, index = next(expected, (None, 0))
        if task is None or (record.get("group_id"), record.get("sample_index"), record.get("prompt_ids")) != (
            task.group_id,
            index,
            task.prompt_ids,
        ):
            due = f"sample {index} of group {task.group_id!r}" if task else "the end"
            raise DataError(f"cannot be resumed: {due} was expected here", where=where, hint="--overwrite restarts")
        count += 1
    if not whole_batches:
        return count
    ends = accumulate(len(batch) * num_samples for batch in batches)
    return max((end for end in ends if end <= count), default=0)


def open_sampler(
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    params: SamplingParams,
    sampling: EngineOptions,
    loading: ModelOptions,
    *,
    seed: int,
    training: LoadedModel | None = None,
    adapter: Adapter | None = None,
    ahead: bool = False,
) -> Sampler:
    """Open the engine that `--engine` names as a sampler of a checkpoint.

    `training` is that checkpoint's model when it is trained here: the transformers engine samples from
    it and so follows it, others have to be told (`Sampler.follow`); `adapter`: what is trained of it, if not the weights;
    `ahead`: others sample while it learns.
    Raises EngineError, ModelError or UsageError.
    """
    engine, gate = open_engine(checkpoint, encoder.tokenizer, sampling, loading, training=training, adapter=adapter, ahead=ahead)
    identity = {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "step": checkpoint.step,
        "checkpoint": checkpoint.weights_sha256,
    }
    return Sampler(engine, encoder, params, seed=seed, identity=identity, batch_tokens=sampling.sample_tokens, gate=gate)


@dataclass(frozen=True)
class ReplicaSync:
    """Gathers a sharded policy's weights for the time in which an engine samples from its replica."""

    replica: Replica
    policy: Policy

    def begin(self, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        self.replica.fill(self.policy)

    def end(self, params: SamplingParams) -> None:
        self.replica.clear()


class Sampler:
    """Samples groups of rollouts with one engine and one set of sampling parameters; closes the engine at its end."""

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        params: SamplingParams,
        *,
        seed: int,
        identity: dict[str, Any],
        batch_tokens: int,
        gate: ParityGate | None = None,
    ) -> None:
        """`identity`: model, revision, step and checkpoint of the weights, for the `sampler` column. `gate`: of a hosted engine."""
        self.engine = engine
        self.encoder = encoder
        self.params = params
        self.seed = seed
        self.identity = identity
        self.batch_tokens = batch_tokens
        self.gate = gate
        self._sync: WeightSync | ReplicaSync | None = None
        self._ahead: Ahead | None = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ahead:
            self._ahead.give_up()
        self.engine.close()

    def follow(self, source: WeightSource) -> None:
        """From now on sample from a model in training, whatever its weights are then; each change is proved by the parity gate."""
        if self.gate:
            self._sync = WeightSync(self.engine, self.gate, source)

    def use_replica(self, replica: Replica, policy: Policy) -> None:
        """From now on give the engine, if it samples from a replica of a sharded policy, the policy's weights while it samples."""
        if self.gate is None:
            self._sync = ReplicaSync(replica, policy)

    def interrupted(self) -> bool:
        """Whether the engine may have lost the weights that it began to sample from."""
        return isinstance(self._sync, WeightSync) and self._sync.interrupted()

    def prove(self, tasks: Sequence[Task], score: Score) -> None:
        """Compare a hosted engine with a model that scores its tokens. Raises EngineError if they differ."""
        if self.gate:
            self.gate.check(self.engine, score, [task.prompt_ids for task in tasks[: self.gate.rows]], self.params)

    def sample(self, tasks: Sequence[Task], num_samples: int) -> Iterator[list[Rollout]]:
        """Yield one group of `num_samples` rollouts per task, in order; of several processes each samples a part of the tasks, for all."""
        groups = self.sample_batches(self._share(tasks, num_samples), num_samples)
        return groups if world.size() == 1 else chain.from_iterable(world.gather(list(groups)))

    def start(self, tasks: Sequence[Task], num_samples: int) -> Ahead:
        """Begin to sample what `sample` yields, from the weights as they are now; nothing else may be sampled until it is taken."""
        batches = self._begin(self._share(tasks, num_samples))
        self._ahead = Ahead(self, batches, num_samples)
        return self._ahead

    def _share(self, tasks: Sequence[Task], num_samples: int) -> list[list[Task]]:
        """Return the planned batches of this process's part of the tasks."""
        mine = tasks[len(tasks) * world.rank() // world.size() : len(tasks) * (world.rank() + 1) // world.size()]
        return plan(mine, num_samples, self.params.max_tokens, self.batch_tokens)

    def sample_batches(self, batches: Sequence[Sequence[Task]], num_samples: int, done: int = 0) -> Iterator[list[Rollout]]:
        """Yield the groups of planned batches, in order; the first `done` rows are there already and left out."""
        for batch in self._begin(batches):
            rows = len(batch) * num_samples
            if done < rows:
                yield from self.sample_batch(batch, num_samples, skip=max(0, done))
            done -= rows
        if self._sync:
            self._sync.end(self.params)

    def _begin(self, batches: Sequence[Sequence[Task]]) -> Sequence[Sequence[Task]]:
        """Make the engine ready for planned batches, with the weights that it should have; returns them as it takes them."""
        if not self.engine.whole_batches:
            batches = [[task for batch in batches for task in batch]]
        if self.engine.max_length is not None:
            self._require_room([task for batch in batches for task in batch])
        if self._sync:
            self._sync.begin([task.prompt_ids for batch in batches[:1] for task in batch], self.params)
        return batches

    def sample_batch(self, batch: Sequence[Task], num_samples: int, skip: int = 0) -> Iterator[list[Rollout]]:
        """Yield the groups of one batch, in order, each as soon as it and its predecessors are done.

        The first `skip` rows are not asked for; the group in which they end comes without them.
        """
        rows = islice(((task, index) for task in batch for index in range(num_samples)), skip, None)
        requests = (Request(task.prompt_ids, row_seed(self.seed, task.group_id, index)) for task, index in rows)
        done: dict[int, Sample] = {}
        first, end = skip, (skip // num_samples + 1) * num_samples  # rows of the next group to be handed out
        for row, sample in self.engine.generate(requests, self.params):
            done[skip + row] = sample
            while all(member in done for member in range(first, end)):
                task = batch[first // num_samples]
                yield [self._rollout(task, member % num_samples, done.pop(member)) for member in range(first, end)]
                first, end = end, end + num_samples

    def _require_room(self, tasks: Sequence[Task]) -> None:
        longest = max((len(task.prompt_ids) for task in tasks), default=0)
        if longest + self.params.max_tokens > self.engine.max_length:
            raise UsageError(
                f"a prompt of {longest} tokens and --max-tokens {self.params.max_tokens} exceed the {self.engine.max_length} tokens "
                f"that {self.engine.name} takes",
                hint="lower --max-tokens, drop long prompts (--max-prompt-tokens)"
                + (", or raise vLLM's --max-model-len" if self.gate else ": the model has no more positions"),
            )

    def _rollout(self, task: Task, sample_index: int, sample: Sample) -> Rollout:
        problem = task.problem
        return Rollout(
            problem_id=problem.id,
            problem_sha256=problem.problem_sha256,
            group_id=task.group_id,
            sample_index=sample_index,
            prompt=problem.prompt,
            completion=[{"role": "assistant", "content": self.encoder.decode(sample.completion_ids)}],
            answer=problem.answer,
            prompt_ids=task.prompt_ids,
            completion_ids=sample.completion_ids,
            completion_logprobs=[round(value, LOGPROB_DECIMALS) for value in sample.logprobs],
            finish_reason=sample.finish_reason,
            seed=row_seed(self.seed, task.group_id, sample_index),
            source=problem.source,
            sampler={
                **self.identity,
                "temperature": self.params.temperature,
                "top_p": self.params.top_p,
                "top_k": self.params.top_k,
                "max_tokens": self.params.max_tokens,
                "logprobs_mode": "processed_logprobs" if self.params.temperature else "raw_logprobs",
                "engine": self.engine.name,
                "template": self.encoder.description,
            },
            template_sha256=self.encoder.template_sha256,
            reasoning_open=task.reasoning_open,
        )


class Ahead:
    """Groups that a thread has a hosted engine sample, while the model whose weights it has learns on."""

    def __init__(self, sampler: Sampler, batches: Sequence[Sequence[Task]], num_samples: int) -> None:
        self.seconds = 0.0  # that sampling took
        self._sampler = sampler
        self._groups: list[list[Rollout]] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._sample, args=(batches, num_samples), daemon=True)
        self._thread.start()

    def take(self) -> list[list[Rollout]] | None:
        """Wait for the groups, of several processes those of all; None if the engine may have lost its weights. Raises EngineError."""
        self._thread.join()
        if self._failure:
            raise self._failure
        if self._sampler.interrupted():
            return None
        return list(chain.from_iterable(world.gather(self._groups)))

    def give_up(self) -> None:
        """Stop sampling, unless that is done. The engine can only be closed then."""
        self._sampler.engine.give_up()
        self._thread.join(GIVE_UP_SECONDS)

    def _sample(self, batches: Sequence[Sequence[Task]], num_samples: int) -> None:
        started = time.perf_counter()
        try:
            self._groups = [group for batch in batches for group in self._sampler.sample_batch(batch, num_samples)]
        except Exception as error:  # raised where the groups are waited for
            self._failure = error
        self.seconds = time.perf_counter() - started
