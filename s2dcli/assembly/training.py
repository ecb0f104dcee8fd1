"""Opening a training: what grpo, opd and fkl-warmup share before their first step and around each step.

setup = TrainingSetup("opd", options, out, {"student": ...}, teachers=..., ...)  # no weights are loaded
opened = setup.start(order, ...)
if opened is None:  # --dry-run, or the run is finished already
    return
with opened as run:
    for step in run: ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from s2dcli import console, stats, world
from s2dcli.assembly.ahead import AheadBatches
from s2dcli.assembly.forms import Teachers, require_sources
from s2dcli.assembly.loading import load_reference, load_trained, require_shardable
from s2dcli.assembly.order import Order
from s2dcli.assembly.pairs import open_cache, require_same_pair, warn_of_other_teacher
from s2dcli.assembly.plan import device_bytes, memory_plan, processes_of
from s2dcli.assembly.rollouts import StoredRollouts, read_groups
from s2dcli.assembly.sampling import Sampler, Task, make_tasks, open_sampler, tasks_of_step
from s2dcli.engines.base import SamplingParams
from s2dcli.engines.opening import TRANSFORMERS, VLLM, engine_kind, require_a_gpu_each, require_ahead
from s2dcli.engines.vllm import GPU_SHARE_BESIDE_TRAINER
from s2dcli.errors import GradingError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.manifest import describe
from s2dcli.files.records import Problem, Rollout, dataset_of, require_labels
from s2dcli.files.run_folder import PHASE_ROLLOUTS, RunFolder
from s2dcli.grade.answer import FAILURES
from s2dcli.grade.pool import MATH, Errors, Grader, check_reward
from s2dcli.models.checkpoints import Checkpoint, LoadedModel, model_config, pick_device, resolve
from s2dcli.models.policy import Policy
from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs, require_made_with
from s2dcli.models.selftest import max_length, require_rows_fit
from s2dcli.options import (
    HOW_STARTED,
    MAY_CHANGE_ON_RESUME,
    EngineOptions,
    GradingOptions,
    ModelOptions,
    Phases,
    RunOptions,
    SampledRunOptions,
    Schedule,
    TrainingOptions,
)
from s2dcli.report.card import Card, carried_over
from s2dcli.train.loop import Step, TrainingRun
from s2dcli.train.rows import Group, RowMaker, TrainingRow
from s2dcli.train.tracking import Trackers, parse_trackers

# Of a device's memory that the plan may fill: Python, torch and CUDA come on top of it.
FIT_SHARE = 0.9


class TrainingSetup:
    """A trainer before anything is loaded: its checkpoints are found, their tokenizers agree, its prompts are encoded."""

    def __init__(
        self,
        stage: str,
        options: Mapping[str, Any],
        out: Path,
        checkpoints: Mapping[str, str],
        *,
        inputs: Sequence[str],
        eval_problems: Sequence[Problem],
        params: SamplingParams,
        engine: EngineOptions,
        grading: GradingOptions | None = None,
        training: TrainingOptions,
        loading: ModelOptions,
        running: RunOptions,
        offload: bool = False,
        ahead: int = 0,
        teachers: Teachers | None = None,
    ) -> None:
        """`options` are all of the command's, as they are recorded; `checkpoints` maps roles to names, the trained one first.

        `ahead`: steps that sampling runs ahead. The `teachers`' checkpoints are frozen models beside those. Raises DataError,
        ModelError or UsageError.
        """
        self.stage, self.options, self.out, self.params, self.offload, self.ahead = stage, options, out, params, offload, ahead
        self.teachers = teachers or Teachers()
        if teachers:
            self.options = {**options, "teacher": teachers.told}
        self.engine, self.grading, self.training, self.loading, self.running = engine, grading, training, loading, running
        self.processes = processes_of(running)
        require_a_gpu_each(engine, self.processes.number)
        if self.processes.sharded:
            require_shardable(training, offload=offload)
        pick_device(loading.device, here=not running.dry_run)
        if ahead:
            require_ahead(engine, loading.device)
        self.trackers = parse_trackers(running.track)
        self.parents: dict[str, Checkpoint] = {
            role: resolve(name, weights=not running.dry_run) for role, name in {**checkpoints, **self.teachers.checkpoints}.items()
        }
        self.parent, *others = self.parents.values()
        cache = self.teachers.cache
        self.inputs = [*inputs, *([cache] if cache else []), *([running.eval_problems] if running.eval_problems else []), *loading.files]
        self.tokenizer = load_tokenizer(self.parent.folder, loading.trust_remote_code)
        for other in others:
            require_same_pair(other, self.parent, self.tokenizer, loading)
        self.cache = open_cache(Path(cache), self.parent, self.tokenizer, loading.trust_remote_code) if cache else None
        if self.cache and stage == "opd":
            warn_of_other_teacher(self.cache, self.parent)
        self.eval_problems = labelled = require_labels(list(eval_problems), "--eval-problems must be labelled")
        self.eval_tasks = make_tasks(labelled, self.encoder) if labelled else []

    @cached_property
    def encoder(self) -> PromptEncoder:
        kwargs = parse_template_kwargs(self.loading.chat_template_kwargs)
        return PromptEncoder(self.tokenizer, self.loading.chat_template, kwargs)

    def start(
        self,
        order: Order,
        rollouts_per_item: int,
        phases: Sequence[str],
        *,
        frozen: Sequence[str] = (),
        problems: Sequence[Problem] = (),
        tasks: Sequence[Task] = (),
        stored: StoredRollouts | None = None,
        learnt: int | None = None,
        turns: Phases = Phases.off,
    ) -> Training | None:
        """Return the training, to be entered; None if there is nothing to do: a dry run, whose plan is printed, or a finished run.

        `phases` names the parts of a step to be timed, `frozen` the roles of models that are held beside the trained one and its
        teachers; `turns`: whether these are loaded only while they score (assembly/phases.py). `problems`, which the run folder
        keeps, with their `tasks`, or `stored` rollouts are what was read from the first input. `learnt`: completion tokens that
        are learnt from of a row, at most; all unless it is given.
        """
        samples = bool(problems or self.eval_tasks)
        require_sources(self.teachers, problems, stored.rows if stored else (), jsonl.input_name(self.inputs[0]))
        if stored:
            require_made_with(self.tokenizer, stored.rows, stored.samples)
            if self.cache:
                self.cache.find(stored.rows)
            for parent in self.parents.values():
                require_rows_fit(model_config(parent, self.loading.trust_remote_code), stored.rows, self.inputs[0])
        prompts = [len(task.prompt_ids) for task in (*tasks, *self.eval_tasks)]
        for role, parent in self.parents.items():
            require_length(parent, role, max(prompts, default=0) + self.params.max_tokens if prompts else 0, self.loading)
        held = [self.parents[role] for role in (*self.teachers.checkpoints, *frozen)]
        several = self.processes.number > 1
        if several and (turns is Phases.on or self.teachers.served):
            what = "--phases on" if turns is Phases.on else "a teacher on a server"
            raise UsageError(f"{what} is for one process, and there are {self.processes.number}")
        rows = stored.rows if stored else ()
        completion = max(len(row.completion_ids) for row in rows) if rows else self.params.max_tokens
        longest = max(len(row.prompt_ids) for row in (rows or tasks)) + min(completion, learnt or completion)
        memory = partial(self._memory, longest=longest, sampled=max(prompts) + self.params.max_tokens if prompts else 0)
        phased = turns is Phases.on or (turns is Phases.auto and not several and not self._fits(held, memory))
        if phased and self.ahead:
            why = "--phases on lets" if turns is Phases.on else "all models at once do not fit, so"
            raise UsageError(
                f"--async-depth 1 samples while the student learns, and {why} them take turns",
                hint="leave out --async-depth" + ("" if turns is Phases.on else ", or --phases off"),
            )
        if self.running.dry_run:
            if not world.is_main():
                return None
            for reward in (self.grading.reward or [MATH]) if self.grading and problems else []:
                check_reward(reward, self.grading.timeout, self.grading.memory_limit)
            per_step = min(order.per_step, order.total) * rollouts_per_item
            plan = {
                "steps": order.steps,
                "rollouts_per_step": per_step,
                "rollouts": order.steps * per_step,
                "completion_tokens_at_most": order.steps * per_step * completion,
                "processes": self.processes.number,
                "sharded": self.processes.sharded,
                "step_tokens_at_most": math.ceil(per_step * longest / self.processes.number),
                "row_tokens_at_most": longest,
                **memory([] if phased else held),
                **({"phases": phased} if held else {}),
                "available_bytes": device_bytes(self.loading.device, self.processes),
                "out": str(self.out),
            }
            jsonl.print_result(plan, console.plan_table)
            return None
        datasets = stored.datasets if stored else {dataset_of(problem.source) for problem in problems}
        card = self._card(order.steps, datasets) if world.is_main() and not self.running.no_card else None
        given = [problem.to_record() for problem in problems]
        samplers = [{"sampler": sampler} for sampler in stored.samplers] if stored else []
        told = {name: value for name, value in self.options.items() if name not in HOW_STARTED}
        manifest: dict[str, Any] = {}
        if world.is_main():
            manifest = describe(self.stage, told, inputs=self.inputs, parents=[*self.parents.items()], rollouts=samplers, streamed=given)
            if stored and jsonl.is_stream(self.inputs[0]):
                manifest["inputs"][0]["sha256"] = stored.sha256
        elif samples:
            _ = self.parent.weights_sha256  # which rollouts name, and takes time while the main process takes it too
        folder = RunFolder(
            self.out,
            manifest,
            steps=order.steps,
            problems=given,
            keep_last=self.running.keep_last,
            keep_states=self.running.keep_states,
            may_change=MAY_CHANGE_ON_RESUME,
            may_extend=self.training.schedule is Schedule.constant and not self.ahead,  # the last step samples nothing ahead
            overwrite=self.running.overwrite,
            resume=self.running.resume,
        )
        with ExitStack() as opened:
            opened.enter_context(folder)
            if folder.finished:
                jsonl.print_result(folder.result(), console.run_table)
                return None
            return Training(self, folder, phases, opened.pop_all(), card=card, samples=samples, phased=phased)

    def _card(self, steps: int, datasets: Collection[str]) -> Card:
        """Return what the model cards of the run's checkpoints say beside its manifest."""
        sources = {tuple(str(problem.source.get(name, "")) for name in ("dataset", "split")) for problem in self.eval_problems}
        params = self.params
        return Card(
            steps=steps,
            carried=carried_over(self.parent.folder),
            datasets=sorted(datasets),
            eval_file=self.running.eval_problems or "",
            eval_datasets=sorted(sources),
            measured=frozenset(problem.problem_sha256 for problem in self.eval_problems),
            sampling={"temperature": params.temperature, "top_p": params.top_p, "max_tokens": params.max_tokens},
        )

    def _memory(self, held: Sequence[Checkpoint], *, longest: int, sampled: int) -> dict[str, int]:
        """Return the memory plan of the run with the frozen models that are held beside the trained one.

        `longest`: tokens of the longest row that is learnt from; `sampled`: those of the longest that is sampled, 0 if none is.
        """
        kind = engine_kind(self.engine, self.loading.device) if sampled else ""
        cached = max(self.engine.sample_tokens, sampled) if kind == TRANSFORMERS else 0
        share = self.engine.gpu_memory_utilization or GPU_SHARE_BESIDE_TRAINER
        on_gpu = pick_device(self.loading.device, here=False).type == "cuda"
        hosted = int(share * (device_bytes(self.loading.device) or 0)) if kind == VLLM and on_gpu else 0
        sampling = {"sample_tokens": cached, "sampler_bytes": hosted, "ahead": bool(self.ahead)}
        return memory_plan(self.parent, held, self.loading, self.training, **sampling, longest=longest, processes=self.processes)

    def _fits(self, held: Sequence[Checkpoint], memory: Callable[[Sequence[Checkpoint]], dict[str, int]]) -> bool:
        """Whether all models fit into the device's memory at once, as far as that is known; says so where they do not."""
        there = device_bytes(self.loading.device)
        if not held or there is None:
            return True
        needed = memory(held)["total_bytes"]
        if needed > FIT_SHARE * there:
            console.info(
                f"all models at once would take {needed / 1e9:.1f} of {there / 1e9:.1f} GB: "
                "sampling, scoring and learning take turns (--phases)"
            )
        return needed <= FIT_SHARE * there


class Training:
    """An open training: the policy, and the sampler and grader where they are needed, around the run of its steps."""

    def __init__(
        self,
        setup: TrainingSetup,
        folder: RunFolder,
        phases: Sequence[str],
        held: ExitStack,
        *,
        card: Card | None,
        samples: bool,
        phased: bool,
    ) -> None:
        """`card` is that of the checkpoints; `phased`: sampling, scoring and learning take turns, with files between them."""
        self.setup, self.folder, self.phases, self.samples, self.phased = setup, folder, phases, samples, phased
        self.keep_rollouts = isinstance(setup.running, SampledRunOptions) and setup.running.keep_rollouts
        self._held, self._card = held, card
        self.policy: Policy
        self.loaded: LoadedModel
        self.run: TrainingRun
        self._sampler: Sampler
        self._ahead: AheadBatches | None = None
        self._grader: Grader

    def __enter__(self) -> TrainingRun:
        """Load the policy, open what samples and grades, and return the run at the step where it stands."""
        setup = self.setup
        with self._held as held:
            if self.samples and (setup.grading or setup.eval_tasks) and world.is_main():
                grading = setup.grading or GradingOptions()
                grader = Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit)
                self._grader = held.enter_context(grader)
            self.loaded, self.policy = load_trained(
                setup.parent, setup.loading, setup.training, seed=setup.running.seed, tokenizer=setup.tokenizer
            )
            how = {"phases": self.phases, "write_card": self._card and self._card.write}
            self.run = TrainingRun(self.folder, self.policy, self.loaded, setup.training, setup.running, **how)
            if setup.trackers and world.is_main():
                self.run.trackers = held.enter_context(Trackers(setup.trackers, self.folder, self.folder.manifest["options"]))
            if self.samples:
                sampler = open_sampler(
                    setup.parent,
                    setup.encoder,
                    setup.params,
                    setup.engine,
                    setup.loading,
                    seed=setup.running.seed,
                    training=self.loaded,
                    adapter=self.policy.adapter,
                    ahead=bool(setup.ahead),
                )
                self._sampler = held.enter_context(sampler)
                self._sampler.follow(self.run)
                if self.loaded.replica:
                    self._sampler.use_replica(self.loaded.replica, self.policy)
            if setup.eval_tasks:
                self.run.evaluate = self._evaluate
            self._held = held.pop_all()
        return self.run

    def __exit__(self, *error: Any) -> None:
        """Close everything; after a run without error its result is printed."""
        self._held.__exit__(*error)
        if error[0] is None:
            jsonl.print_result(self.folder.result(), console.run_table)

    def load_reference(self) -> Policy:
        """Return the policy as it was when loaded, frozen. Raises ModelError or UsageError."""
        setup = self.setup
        return load_reference(self.policy, self.loaded, setup.loading, setup.training, offload=setup.offload)

    def sample_step(self, step: Step, order: Order, tasks: Sequence[Task], num_samples: int) -> list[Group]:
        """Return what `sample` does of the tasks of a step; with --async-depth 1 they were sampled during the one before."""
        chosen = tasks_of_step(tasks, order.batch(step.number), step.number)
        if not self.setup.ahead:
            step.log(off_policy_steps=0)
            return self.sample(step, chosen, num_samples)
        if self._ahead is None:
            self._ahead = AheadBatches(self._sampler, self.run, num_samples)
            self.run.before_saving = self._ahead.keep
        last = step.number == order.steps
        following = [] if last else tasks_of_step(tasks, order.batch(step.number + 1), step.number + 1)
        with step.phase("sample"):
            groups = self._ahead.batch(step, chosen, following)
        return self._graded(step, groups)

    def sample(self, step: Step, tasks: Sequence[Task], num_samples: int) -> list[Group]:
        """Sample a group of rollouts per task, under the weights as they are now.

        Where the setup has GradingOptions they are graded too, which spends the labels of the tasks' problems.
        """
        with step.phase("sample"):
            self._sampler.identity = self.run.identity(step)
            groups = self._sample(step, tasks, num_samples)
        return self._graded(step, groups)

    def _graded(self, step: Step, groups: list[list[Rollout]]) -> list[Group]:
        """Return groups as training rows, graded where the setup has GradingOptions."""
        rollouts = [rollout for group in groups for rollout in group]
        step.sampled_tokens += sum(len(rollout.completion_ids) for rollout in rollouts)
        if self.setup.grading:
            self.run.labels.update(rollout.problem_sha256 for rollout in rollouts)
            with step.phase("grade"):
                records, errors = world.from_main(self._grade, rollouts)
            self._count_errors(step, errors, len(rollouts))
            graded = iter(records)
        else:
            graded = (rollout.to_record() if self.keep_rollouts else {} for rollout in rollouts)
        maker = RowMaker()
        return [[self._row(maker, rollout, next(graded)) for rollout in group] for group in groups]

    def _sample(self, step: Step, tasks: Sequence[Task], num_samples: int) -> list[list[Rollout]]:
        """Sample groups; in phases, to a file of the step, from which a restart takes them."""
        if not self.phased:
            return list(self._sampler.sample(tasks, num_samples))
        path = self.folder.phase(step.number) / PHASE_ROLLOUTS
        if not path.is_file():
            groups = list(self._sampler.sample(tasks, num_samples))
            self.folder.write_phase(step.number, groups)
            return groups
        return read_groups(path, num_samples)

    def _grade(self, rollouts: Sequence[Rollout]) -> tuple[list[dict[str, Any]], Errors]:
        """Return the graded rows, whole if they are to be kept, and what failed."""
        if self.keep_rollouts:
            rows = list(self._grader.graded([rollout.to_record() for rollout in rollouts]))
        else:
            rows = [{"reward": verdict["reward"]} for verdict in self._grader.grade(rollout.to_record() for rollout in rollouts)]
        return rows, self._grader.take_errors()

    def _count_errors(self, step: Step, errors: Errors, num_rollouts: int) -> None:
        """Log the failures of rewards by kind, and warn of them. Raises GradingError if every rollout's failed."""
        step.grader_errors.update(errors.counts)
        step.num_graded += num_rollouts
        step.num_failed += errors.rows
        step.log(grader_errors={kind: step.grader_errors[kind] for kind in FAILURES})
        if step.num_failed == step.num_graded:
            raise GradingError(f"the rewards of all {num_rollouts} rollouts of step {step.number} failed: {errors.first}")
        if errors.counts:
            console.warn(f"step {step.number}: {_in_words(errors, num_rollouts)}")

    def _row(self, maker: RowMaker, rollout: Rollout, record: dict[str, Any]) -> TrainingRow:
        return maker.row(rollout, record.get("reward"), record if self.keep_rollouts else None)

    def _evaluate(self) -> dict[str, Any]:
        if self._ahead:
            self._ahead.settle()
        groups = self._sampler.sample(self.setup.eval_tasks, self.setup.running.eval_samples)
        return world.from_main(self._figures, [row.to_record() for group in groups for row in group])

    def _figures(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        figures = stats.summarize(self._grader.graded(rows))
        errors = self._grader.take_errors()
        if errors.counts:
            console.warn(f"evaluation: {_in_words(errors, len(rows))}")
        return figures


def _in_words(errors: Errors, num_rollouts: int) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in errors.counts.most_common())
    return f"rewards of {errors.rows} of {num_rollouts} rollouts failed ({kinds}), the first: {errors.first}"


def require_length(checkpoint: Checkpoint, role: str, tokens: int, loading: ModelOptions) -> None:
    """Raise UsageError if a model is to take more tokens than it computes right."""
    limit = max_length(model_config(checkpoint, loading.trust_remote_code))
    if limit is not None and tokens > limit:
        raise UsageError(
            f"the longest prompt and --max-tokens make {tokens} tokens; the {role} computes at most {limit} right",
            where=checkpoint.name,
            hint="lower --max-tokens, or drop long prompts (--max-prompt-tokens)",
        )
