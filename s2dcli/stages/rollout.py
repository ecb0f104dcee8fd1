"""Sample completions: `s2d rollout --model CKPT problems.jsonl -n 8 > rollouts.jsonl`.

Every completion gets its own seed from (--seed, group, sample index), so what a row says does not
depend on its neighbours, and shards put together are the whole:

    s2d rollout -m CKPT problems.jsonl -n 16 | s2d verify | s2d eval --rollouts -
    s2d rollout -m CKPT problems.jsonl --shard 2/8 -o part-2.jsonl
"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.errors import UsageError
from s2dcli.files import jsonl
from s2dcli.files.records import read_problems


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
    seed: options.Seed = 0,
) -> None:
    """Sample n completions for each problem."""
    shard_index, shard_count = _parse_shard(shard)
    if not jsonl.is_stream(out):
        jsonl.refuse_existing(out, overwrite)
    todo = read_problems(problems)

    from s2dcli.engines.base import SamplingParams
    from s2dcli.engines.sampling import make_tasks, open_sampler, plan, shard_of
    from s2dcli.models.checkpoints import load, resolve
    from s2dcli.models.prompts import PromptEncoder, parse_template_kwargs

    template_kwargs = parse_template_kwargs(loading.chat_template_kwargs)
    loaded = load(resolve(model), **loading.of_load())
    encoder = PromptEncoder(loaded.tokenizer, loading.chat_template, template_kwargs)
    params = SamplingParams(temperature, top_p, top_k, max_tokens)
    sampler = open_sampler(loaded, encoder, params, seed=seed, batch_tokens=sampling.sample_tokens)

    tasks = make_tasks(todo, encoder, max_prompt_tokens)
    batches = shard_of(plan(tasks, num_samples, max_tokens, sampling.sample_tokens), shard_index, shard_count)
    truncated = 0
    with (
        jsonl.open_output(out, overwrite=overwrite) as writer,
        console.progress("sampling", sum(map(len, batches)), "problems") as advance,
    ):
        for batch in batches:
            for group in sampler.sample_batch(batch, num_samples):
                for row in group:
                    writer.write(row.to_record())
                    truncated += row.truncated
                writer.flush()
                advance()
    share = truncated / writer.count if writer.count else 0.0
    console.info(f"{writer.count} rollouts of {sum(map(len, batches))} problems; {share:.1%} hit the limit of {max_tokens} tokens")


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r} is not I/N with 1 <= I <= N", hint="e.g. --shard 2/8")
    return int(match[1]), int(match[2])
