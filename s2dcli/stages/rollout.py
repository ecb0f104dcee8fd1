"""Sample completions: `s2d rollout --model CKPT problems.jsonl -n 8 > rollouts.jsonl`.

Every completion gets its own seed from (--seed, group, sample index), so what a row says does not
depend on its neighbours, and shards put together are the whole:

    s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -
    s2d rollout -m CKPT problems.jsonl --shard 2/8 -o part-2.jsonl

After an interruption the same command with --resume completes the file: it has the bytes of an
undisturbed run in the end, since planned batches that are not all there are sampled again.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.engines.opening import check_engine
from s2dcli.errors import UsageError
from s2dcli.files.manifest import describe, sidecar
from s2dcli.files.output import check_output, complete_lines, is_finished, open_recorded, resumable
from s2dcli.files.records import read_problems

# On --resume: how batches are cut and where they run changes log-probs in the sixth decimal only, but the cut
# also decides which problems a shard holds.
MAY_CHANGE_IN_SHARDS = {"device", "max_in_flight", "server_timeout"}
MAY_CHANGE = {*MAY_CHANGE_IN_SHARDS, "sample_tokens"}


def rollout(
    *,
    model: options.Model,
    problems: options.Problems = "-",
    out: options.OutFile = "-",
    num_samples: options.NumSamples = 8,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    max_tokens: options.MaxTokens = 1024,
    max_prompt_tokens: options.MaxPromptTokens = None,
    sampling: options.EngineOptions,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Sample only the I-th of N parts of the input.", rich_help_panel=options.SAMPLING)
    ] = "1/1",
    loading: options.ModelOptions,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    seed: options.Seed = 0,
) -> None:
    """Sample n completions for each problem."""
    settings = options.flatten(locals())
    check_engine(sampling)
    shard_index, shard_count = _parse_shard(shard)
    check_output(out, [problems], command="rollout", overwrite=overwrite, resume=resume)
    source, problems = problems, read_problems(problems)

    console.starting()
    from s2dcli.assembly.loading import load_scorer
    from s2dcli.assembly.sampling import count_done, make_tasks, open_sampler, plan, shard_of
    from s2dcli.engines.base import LENGTH, SamplingParams
    from s2dcli.models.checkpoints import resolve
    from s2dcli.models.prompts import PromptEncoder, load_tokenizer, parse_template_kwargs

    started = time.monotonic()
    checkpoint = resolve(model)
    template_kwargs = parse_template_kwargs(loading.chat_template_kwargs)
    streamed = [problem.to_record() for problem in problems]
    manifest = describe("rollout", settings, inputs=[source, *loading.files], parents=[("model", checkpoint)], streamed=streamed)
    may_change = MAY_CHANGE if shard_count == 1 else MAY_CHANGE_IN_SHARDS
    old = resumable(Path(out), sidecar(out), manifest, may_change) if resume else None
    if is_finished(out, old):
        return
    encoder = PromptEncoder(load_tokenizer(checkpoint.folder, loading.trust_remote_code), loading.chat_template, template_kwargs)
    params = SamplingParams(temperature, top_p, top_k, max_tokens)
    tasks = make_tasks(problems, encoder, max_prompt_tokens)
    batches = shard_of(plan(tasks, num_samples, max_tokens, sampling.sample_tokens), shard_index, shard_count)
    num_problems = sum(map(len, batches))
    tokens = truncated = 0
    with ExitStack() as stack:
        sampler = stack.enter_context(open_sampler(checkpoint, encoder, params, sampling, loading, seed=seed))
        if sampling.parity_rows:
            sampler.prove(tasks, load_scorer(checkpoint, loading))
        done = count_done(complete_lines(out), batches, num_samples, whole_batches=sampler.engine.whole_batches) if old else 0
        writer = stack.enter_context(open_recorded(out, manifest, overwrite=overwrite, kept=done if old else None))
        advance = stack.enter_context(console.progress("sampling", num_problems * num_samples, "rollouts"))

        for line in complete_lines(out, done):
            tokens += len(line.record["completion_ids"])
            truncated += line.record["finish_reason"] == LENGTH
        rollouts = done
        advance(done)
        for group in sampler.sample_batches(batches, num_samples, done):
            for row in group:
                writer.write(row.to_record())
                tokens += len(row.completion_ids)
                truncated += row.truncated
            writer.flush()
            rollouts += len(group)
            advance(len(group))
        seconds = time.monotonic() - started
        manifest["counts"] = {"problems": num_problems, "rollouts": rollouts, "tokens": tokens, "seconds": seconds}
    before = f" ({done} were there)" if done else ""
    share = truncated / max(1, rollouts)
    console.info(f"{rollouts} rollouts{before} of {num_problems} problems; {share:.1%} hit the limit of {max_tokens} tokens")


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r} is not I/N with 1 <= I <= N", hint="e.g. --shard 2/8")
    return int(match[1]), int(match[2])
