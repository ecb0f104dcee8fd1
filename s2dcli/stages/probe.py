"""Measure a teacher and a student before compute is spent: is there something to transfer, and can it be?

    s2d probe --teacher runs/teacher --student CKPT --base-teacher CKPT validation.jsonl -o probes/rl-teacher
    s2d probe --teacher http://gpu1:8000 --student CKPT validation.jsonl

Both models answer the same labelled problems, n times each. Then the teacher is asked about every token of the student's
rollouts y, in state s_t (paper, conditions C1 and C2 of stage 2b):

    accuracy  avg@n and pass@n of both, and the share of groups with right and wrong answers: where a sparse reward teaches
    C2        KL(student(. | s_t) || teacher(. | s_t)) a token, its quantiles and by thirds of the completions; how many of
              the --top-k ids the two share, and how much probability is on these
    C1        the AUC of sum_t log teacher(y_t | s_t) - log base(y_t | s_t) against being right, over all rollouts and within groups

The KL is exact over the vocabulary; with a teacher on a server it is over the teacher's top k and one bucket for the rest.
All errors are over problems. The verdict names the route that these figures favour and whether they settle it; what the
teacher is ahead by decides, and the KL only whether a warm-up is needed (stats/routes.py). Use problems that neither model
was trained on: on those the KL misleads. Their labels are measured with, not learnt from, so none is spent, as in eval.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from s2dcli import console, options
from s2dcli.engines.opening import check_engine, check_served_teacher, is_served, server_urls
from s2dcli.errors import UsageError
from s2dcli.files import jsonl, ledger
from s2dcli.files.eval_folder import PROBLEMS
from s2dcli.files.manifest import describe
from s2dcli.files.probe_folder import FILE_OF, TOKENS, ProbeFolder
from s2dcli.files.records import read_problems, require_labels
from s2dcli.grade.pool import MATH, Grader, check_settings
from s2dcli.options import Estimator

# On --resume: places of computations, and what a server or the grader may take.
MAY_CHANGE = {"device", "sample_tokens", "tokens_per_batch", "workers", "max_in_flight", "server_timeout"}
# What would be ignored when the rollouts of both are there already
SAMPLING_ONLY = {
    "engine": "--engine",
    "max_tokens": "--max-tokens",
    "max_prompt_tokens": "--max-prompt-tokens",
    "reward": "--reward",
    "seed": "--seed",
}


def probe(
    context: typer.Context,
    *,
    teacher: Annotated[str, typer.Option("--teacher", metavar="CKPT|URL,...", help="Teacher to distil from.", show_default=False)],
    student: Annotated[str, typer.Option("--student", metavar="CKPT", help="Student.", show_default=False)],
    base_teacher: Annotated[
        str | None, typer.Option("--base-teacher", metavar="CKPT|URL,...", help="The teacher before RL; measures C1.", show_default=False)
    ] = None,
    problems: options.Problems = "-",
    rollouts: Annotated[
        str | None, typer.Option("--rollouts", metavar="GRADED", help="Graded rollouts of the student instead of sampling.")
    ] = None,
    teacher_rollouts: Annotated[
        str | None, typer.Option("--teacher-rollouts", metavar="GRADED", help="Graded rollouts of the teacher instead of sampling.")
    ] = None,
    out: Annotated[
        Path | None,
        options.in_output("Folder for results.json, the graded rollouts, and the figures of each token.", "--out", "-o", metavar="DIR"),
    ] = None,
    sampling: options.RolloutOptions,
    top_k: Annotated[int, options.in_scoring("Size of the top-k sets; with a teacher on a server also k of the KL.", min=1)] = 16,
    tokens_per_batch: Annotated[int, options.in_scoring("Tokens per micro-batch of the comparison, padding included.", min=1)] = 8192,
    engine: options.EngineOptions,
    grading: options.GradingOptions,
    loading: options.ModelOptions,
    dry_run: Annotated[bool, options.in_output("Check inputs and the pair, and print the plan; load no weights.", "--dry-run")] = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    seed: options.Seed = 0,
) -> None:
    """Measure whether a teacher suits a student, and which route is favoured."""
    settings = options.flatten(locals())
    _refuse_contradictions(context, settings)
    check_engine(engine, teacher=teacher)
    check_settings(grading.reward or [MATH], grading.timeout, grading.memory_limit)
    sources = [rollouts or problems, *filter(None, [teacher_rollouts])]
    if out is not None:
        models = [name for name in (student, teacher, base_teacher) if name and not is_served(name)]
        ProbeFolder.check(out, "probe", [*sources, *models], overwrite=overwrite, resume=resume)

    console.starting()
    from s2dcli.assembly.pair_figures import Samples, figures_of, problem_rows, require_same_problems, results_of, token_rows
    from s2dcli.assembly.probing import STUDENT, TEACHER, Pair, sample_graded
    from s2dcli.engines.base import SamplingParams

    started = time.monotonic()
    pair = Pair(student, teacher, base_teacher, engine, loading)
    stored: dict[str, Samples] = {}
    if rollouts is not None:
        stored[STUDENT] = pair.read_student(rollouts, sampling.temperature)
    if teacher_rollouts is not None:
        stored[TEACHER] = pair.read_teacher(teacher_rollouts, sampling.temperature)
    counted = {role: figures_of(samples, role)["k"] for role, samples in stored.items()}
    n = next(iter(counted.values()), sampling.num_samples)
    items = list(stored[STUDENT].problems.values()) if rollouts is not None else read_problems(problems)
    require_labels(items, "a probe compares accuracies: it needs labelled problems")
    missing = [role for role in (STUDENT, TEACHER) if role not in stored]
    tasks = pair.tasks(items, sampling.max_tokens, sampling.max_prompt_tokens) if missing else []
    if dry_run:
        to_sample = len(missing) * len(tasks) * n
        plan = {"problems": len(items), "rollouts": to_sample, "completion_tokens_at_most": to_sample * sampling.max_tokens}
        jsonl.print_result({**plan, "models": pair.names, "out": str(out or "")})
        return

    streamed = [problem.to_record() for problem in items]
    manifest = describe("probe", settings, inputs=[*sources, *loading.files], parents=[*pair.checkpoints.items()], streamed=streamed)
    params = SamplingParams(sampling.temperature, top_p=1.0, top_k=0, max_tokens=sampling.max_tokens)
    k = min(top_k, pair.vocabulary)
    with ExitStack() as stack:
        folder = ProbeFolder(out, manifest, may_change=MAY_CHANGE, overwrite=overwrite, resume=resume) if out else None
        if folder and stack.enter_context(folder).finished:
            console.info(f"{out} is complete already")
            jsonl.print_result(folder.result(), console.probe_table)
            return
        if missing:
            grader = stack.enter_context(Grader(grading.reward or [MATH], grading.workers, grading.timeout, grading.memory_limit))
        for role in missing:
            with pair.open_sampler(role, tasks, params, seed) as sampler:
                graded = sample_graded(sampler, grader, tasks, n, folder, FILE_OF[role])
                stored[role] = Samples().add_all(graded, rows=role == STUDENT)
        ours, theirs = stored[STUDENT], stored[TEACHER]
        require_same_problems(ours, theirs)
        tokens = pair.look(list(ours.rows), k, sampling.temperature, tokens_per_batch)
        ratios = pair.log_ratios(tokens, sampling.temperature)

        measured = sorted({row.problem_sha256 for row in ours.rows})
        results = {
            "models": pair.names,
            "temperature": sampling.temperature,
            **results_of(ours, theirs, tokens, ratios, k, exact=not is_served(teacher)),
            "labels": {"measured": len(measured), "spent": 0},
            "seconds": round(time.monotonic() - started, 3),
        }
        if folder:
            folder.write_rows(TOKENS, token_rows(ours, tokens, ratios))
            folder.write_rows(PROBLEMS, problem_rows(ours, theirs, tokens, ratios))
            counts = {"problems": len(measured), "rollouts": 2 * len(ours.rows), "seconds": results["seconds"]}
            folder.finish(results, counts=counts, measured=measured)
        for caution in ledger.warnings(manifest, measured):
            console.warn(caution)
        jsonl.print_result(results, console.probe_table)


def _refuse_contradictions(context: typer.Context, given: dict[str, Any]) -> None:
    """Raise UsageError if options exclude each other, or one would be ignored."""
    teacher, rollouts, teacher_rollouts, engine = (given[name] for name in ("teacher", "rollouts", "teacher_rollouts", "engine"))
    if is_served(given["student"]):
        raise UsageError("--student must be a checkpoint: its whole distribution is compared", hint="--engine URL samples from a server")
    for option in ("teacher", "base_teacher"):
        if is_served(given[option]):
            server_urls(given[option], f"--{option.replace('_', '-')}")
            check_served_teacher(Estimator.top_k, given["temperature"])
    if given["base_teacher"] == teacher:
        problem = "--base-teacher is the teacher itself: their log-ratio is 0 everywhere"
        raise UsageError(problem, hint="name the teacher before RL, or leave it out")
    if rollouts is not None and given["problems"] != jsonl.STDIN:
        raise UsageError("both PROBLEMS and --rollouts were given", hint="graded rollouts bring their problems")
    if teacher_rollouts == jsonl.STDIN == (rollouts or given["problems"]):
        raise UsageError("standard input can be read once only", hint="name files")
    if rollouts is not None or teacher_rollouts is not None:
        options.refuse_given(context, {"num_samples": "-n"}, "is that of the rollouts that are given")
    if rollouts is not None and teacher_rollouts is not None:
        options.refuse_given(context, SAMPLING_ONLY, "applies to sampling, and nothing is sampled")
    elif rollouts is None and given["num_samples"] < 2:
        raise UsageError("-n 1: whether a group of rollouts is mixed shows from two on", hint="-n 8")
    if (given["resume"] or given["overwrite"]) and given["out"] is None:
        raise UsageError("--resume and --overwrite need a folder", hint="-o DIR names it")
    if teacher_rollouts is None and not is_served(teacher) and is_served(engine):
        hint = "--teacher URL for the teacher's server, or --teacher-rollouts GRADED"
        raise UsageError("--engine URL is a server of one model, and two are sampled", hint=hint)
