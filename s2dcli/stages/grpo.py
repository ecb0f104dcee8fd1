"""Sparse-reward RL by group-relative policy optimisation: sample, grade, update, repeat.

    s2d grpo --model CKPT problems.jsonl -o runs/teacher
    s2d grpo --model CKPT --rollouts graded.jsonl -o runs/offline

Each step samples n completions for each of some problems, grades them, turns the rewards of a
group into advantages relative to the group (DeepSeekMath, arXiv 2402.03300), and maximises PPO's
clipped objective, by default with one update per step (paper, stages 1 and 3).

Departures from the paper's settings: the KL term is off unless asked for (paper: --kl-coef 5e-4),
and all rollouts of a step are one mini-batch unless --mini-batch-size says otherwise.

Shapes: R rollouts of a step, G groups among them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options, stats
from s2dcli.errors import DataError, UsageError
from s2dcli.files import jsonl
from s2dcli.files.checkpoint import refuse_folder
from s2dcli.files.records import Problem, read_problems, read_rollouts, take
from s2dcli.grade.pool import Grader

OBJECTIVE = "Objective"


def grpo(
    *,
    model: options.Model,
    problems: options.Problems = "-",
    out: options.RunDir = Path("runs/grpo"),
    rollouts: Annotated[
        str | None, typer.Option("--rollouts", metavar="GRADED", help="Train one pass on graded rollouts instead of sampling.")
    ] = None,
    num_samples: options.NumSamples = 8,
    max_tokens: options.MaxTokens = 1024,
    max_prompt_tokens: options.MaxPromptTokens = None,
    temperature: options.TrainTemperature = 1.0,
    sample_tokens: options.BatchTokens = options.SAMPLE_TOKENS,
    aggregate: options.AggregateOption = options.Aggregate.sequence,
    advantage: Annotated[
        options.Advantage, typer.Option(help="Divide by the group's standard deviation, or not.", rich_help_panel=OBJECTIVE)
    ] = options.Advantage.group_std,
    clip_low: Annotated[float, typer.Option(min=0.0, help="The ratio is clipped at 1 - this.", rich_help_panel=OBJECTIVE)] = 0.2,
    clip_high: Annotated[float, typer.Option(min=0.0, help="The ratio is clipped at 1 + this.", rich_help_panel=OBJECTIVE)] = 0.2,
    kl_coef: Annotated[
        float, typer.Option(min=0.0, help="Weight of the KL to the initial policy (k3 in the loss).", rich_help_panel=OBJECTIVE)
    ] = 0.0,
    steps: options.Steps = None,
    epochs: options.Epochs = 1,
    problems_per_step: options.ProblemsPerStep = 32,
    mini_batch_size: options.MiniBatchSize = None,
    lr: options.LearningRate = 1e-6,
    schedule: options.ScheduleOption = options.Schedule.constant,
    min_lr_ratio: options.MinLrRatio = 0.0,
    warmup_steps: options.WarmupSteps = 0,
    weight_decay: options.WeightDecay = 0.0,
    adam_beta2: options.AdamBeta2 = 0.999,
    grad_clip: options.GradClip = 1.0,
    tokens_per_batch: options.TokensPerBatch = 8192,
    workers: options.Workers = None,
    timeout: options.Timeout = 5.0,
    memory_limit: options.MemoryLimit = "2GiB",
    chat_template: options.ChatTemplate = None,
    chat_template_kwargs: options.ChatTemplateKwargs = "{}",
    dtype: options.DtypeOption = options.Dtype.auto,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    save_every: options.SaveEvery = 50,
    eval_problems: options.EvalProblems = None,
    eval_every: options.EvalEvery = 50,
    eval_samples: options.EvalSamples = 4,
    keep_rollouts: options.KeepRollouts = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
) -> None:
    """Train a model by sparse-reward RL (GRPO) on labelled problems."""
    settings = dict(locals())
    refuse_folder(out, overwrite)
    if rollouts is not None and problems != jsonl.STDIN:
        raise UsageError("both PROBLEMS and --rollouts were given", hint="name one source to learn from")
    stored = [] if rollouts is None else _read_groups(rollouts, temperature)
    todo = _require_labels(read_problems(problems)) if rollouts is None else []
    held_out = read_problems(eval_problems) if eval_problems else []

    from s2dcli.engines.base import SamplingParams
    from s2dcli.engines.sampling import make_tasks, open_sampler, tasks_of_step
    from s2dcli.models.checkpoints import load, resolve
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs
    from s2dcli.train.batching import Row, consecutive, split
    from s2dcli.train.loop import TrainingRun
    from s2dcli.train.losses import group_advantages, is_mixed, weights_of
    from s2dcli.train.objectives import PolicyGradient
    from s2dcli.train.order import Order
    from s2dcli.train.plan import dry_run_plan
    from s2dcli.train.policy import Policy, freeze, score

    parent = resolve(model)
    encoder = PromptEncoder(load_tokenizer(parent.folder, trust_remote_code), chat_template, parse_template_kwargs(chat_template_kwargs))
    tasks = make_tasks(todo, encoder, max_prompt_tokens) if todo else []
    eval_tasks = make_tasks(held_out, encoder)
    order = Order(len(tasks) or len(stored), problems_per_step, seed=seed, steps=steps, epochs=epochs)
    if dry_run:
        per_step = min(problems_per_step, order.total) * (len(stored[0]) if stored else num_samples)
        jsonl.print_result(
            dry_run_plan(settings, steps=order.steps, rollouts_per_step=per_step, student=parent, frozen=[parent] if kl_coef else [])
        )
        return

    with Grader(workers=workers, timeout=timeout, memory_limit=memory_limit) as grader:
        how = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loaded = load(parent, masters=True, **how)
        policy = Policy(loaded.model, loaded.vocabulary, loaded.autocast)
        reference = None
        if kl_coef:
            reference = freeze(Policy(load(parent, **how).model, loaded.vocabulary))
        scoring = {"tokens_per_batch": tokens_per_batch, "pad_id": loaded.pad_id, "temperature": temperature}
        params = SamplingParams(temperature, top_p=1.0, top_k=0, max_tokens=max_tokens)
        sampler = open_sampler(loaded, encoder, params, seed=seed, batch_tokens=sample_tokens)

        def evaluate() -> dict[str, Any]:
            rows = [row.to_record() for group in sampler.sample(eval_tasks, eval_samples) for row in group]
            return stats.summarize({**row, **verdict} for row, verdict in zip(rows, grader.grade(rows), strict=True))

        run = TrainingRun(
            "grpo",
            settings,
            policy,
            loaded,
            steps=order.steps,
            phases=("sample", "grade", "score", "update"),
            inputs=[path for path in (rollouts or problems, eval_problems) if path],
            parents=[parent],
            evaluate=evaluate if eval_tasks else None,
        )
        labels: set[str] = set()
        for step in run:
            chosen = order.at(step.number)
            if stored:
                records = [record for index in chosen for record in stored[index]]
            else:
                with step.phase("sample"):
                    groups = sampler.sample(tasks_of_step(tasks, chosen, step.number), num_samples)
                    sampled = [row.to_record() for group in groups for row in group]
                with step.phase("grade"):
                    records = [{**row, **verdict} for row, verdict in zip(sampled, grader.grade(sampled), strict=True)]
            labels.update(record["problem_sha256"] for record in records)

            rewards_R = [record["reward"] for record in records]
            groups_G = consecutive([record["group_id"] for record in records])
            advantages_R = [value for group in groups_G for value in group_advantages(rewards_R[group], advantage)]
            rows_R = [Row(record["prompt_ids"], record["completion_ids"]) for record in records]
            lengths_R = [len(row.completion_ids) for row in rows_R]
            # Rows without a verdict teach nothing and leave the denominators.
            mini_batches = split([r for r, reward in enumerate(rewards_R) if reward is not None], mini_batch_size)
            with step.phase("score"):
                reference_R = None if reference is None else score(reference, rows_R, **scoring)
                old_R = sampler_R = [record["completion_logprobs"] for record in records]
                if not stored:
                    old_R = score(policy, rows_R, **scoring) if len(mini_batches) > 1 else None
            for mini_batch in mini_batches:
                objective = PolicyGradient(
                    weights_of(mini_batch, lengths_R, aggregate, max_tokens),
                    advantages_R,
                    sampler_R,
                    old_R,
                    reference_R,
                    clip_low=clip_low,
                    clip_high=clip_high,
                    kl_coef=kl_coef,
                    temperature=temperature,
                )
                # Advantage 0 gives gradient 0: such rows stay in the denominators but cost no pass.
                if taught := [r for r in mini_batch if advantages_R[r] != 0.0 or kl_coef]:
                    run.update(step, rows_R, taught, objective)
            if not step.updates:
                console.warn(f"step {step.number}: the rewards of every group are all equal; no update was made")

            known = [reward for reward in rewards_R if reward is not None]
            step.log(
                reward=stats.mean(known) if known else 0.0,
                mixed_groups=stats.mean(float(is_mixed(rewards_R[group])) for group in groups_G),
                kl=step.per_token("kl") if reference is not None else None,
                entropy=step.per_token("entropy"),
                clip_fraction=step.per_token("clipped"),
                ratio=step.per_token("ratio"),
                sampler_gap=step.per_token("sampler_gap"),
                rollouts=len(records),
                ungraded=len(records) - len(known),
                mean_tokens=stats.mean(lengths_R),
                truncated=stats.mean(float(record["finish_reason"] == "length") for record in records),
                labels=len(labels),
                sample_tokens_per_second=step.per_second(sum(lengths_R), "sample"),
                update_tokens_per_second=step.per_second(step.tokens, "update"),
            )
            if keep_rollouts:
                run.keep_rollouts(step, records)
        jsonl.print_result(run.result())


def _require_labels(problems: list[Problem]) -> list[Problem]:
    unlabelled = [problem.id for problem in problems if not problem.answer]
    if unlabelled:
        raise DataError(
            f"{len(unlabelled)} of {len(problems)} problems have no answer to grade against, the first is {unlabelled[0]!r}",
            hint="RL needs labels; for unlabelled problems use s2d opd",
        )
    return problems


def _read_groups(path: str, temperature: float) -> list[list[dict]]:
    """Read graded rollouts as groups. Refuses rows whose log-probs are not those they were sampled with."""
    groups: dict[str, list[dict]] = {}
    for where, row, record in read_rollouts(path):
        if "reward" not in record:
            raise DataError("no field 'reward'", where=where, hint=f"grade first: s2d verify {path} -o graded.jsonl")
        take(record, "reward", (float, int, type(None)), where)
        drawn = (row.sampler.get("temperature"), row.sampler.get("top_p"), row.sampler.get("top_k"))
        if drawn != (temperature, 1.0, 0):
            raise DataError(
                "sampled at temperature {}, top-p {}, top-k {}: the log-probs do not belong to the policy at --temperature {}".format(
                    *drawn, temperature
                ),
                where=where,
                hint="sample with --top-p 1 --top-k 0 and train with the same --temperature",
            )
        groups.setdefault(row.group_id, []).append(record)
    if not groups:
        raise DataError("holds no rollouts", where=jsonl.input_name(path))
    return list(groups.values())
