"""Score rollouts with a teacher, once, and keep its distributions on disk for `fkl-warmup --cache` and `opd --cache`.

    s2d score --model runs/teacher rollouts.jsonl -o work/cache
    s2d score --model runs/teacher rollouts.jsonl -o work/cache --keep hidden --dry-run

At each completion token the cache holds (files/teacher_cache.py has the format)

    --keep top-k    the k most likely ids with their log-probs, the log of the mass of all others, and the log-prob of
                    the token itself: what a KL over k + 1 outcomes needs
    --keep sampled  the log-prob of the token itself: what `opd --estimator sampled` needs
    --keep hidden   the teacher's final hidden states and, once, its head: what the exact KL needs

all normalised over the whole vocabulary. The rollouts may be the teacher's or the student's. They are scored in fixed
portions of --shard-tokens, each a file of its own: after a kill the same command with --resume scores what is missing,
and the cache has the bytes of an undisturbed one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from s2dcli import console, options
from s2dcli.engines.opening import check_engine
from s2dcli.files.records import read_rollouts

# On --resume: places of computations, and what a server may take.
MAY_CHANGE = {"device", "max_in_flight", "server_timeout", "parity_rows", "parity_tolerance"}


def score(
    context: typer.Context,
    *,
    model: options.Model,
    rollouts: options.Rollouts = "-",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Cache folder.", rich_help_panel=options.OUTPUT)] = Path(
        "runs/cache"
    ),
    keep: Annotated[
        options.Keep, options.in_scoring("What to keep of each distribution: its top k, the sampled token's log-prob, or hidden states.")
    ] = options.Keep.top_k,
    top_k: Annotated[int, options.in_scoring("k of --keep top-k.", min=1)] = 128,
    cache_dtype: Annotated[options.ValueType, options.in_scoring("Type of the values on disk.")] = options.ValueType.float16,
    temperature: Annotated[float, options.in_scoring("Temperature of the teacher's distribution.", min=1e-3)] = 1.0,
    shard_tokens: Annotated[int, options.in_scoring("Completion tokens per shard, the unit of --resume.", min=1)] = 65536,
    tokens_per_batch: Annotated[int, options.in_scoring("Tokens per micro-batch, padding included (transformers engine).", min=1)] = 8192,
    scoring: options.ScoringOptions,
    loading: options.ModelOptions,
    dry_run: Annotated[
        bool, options.in_output("Print the bytes of each encoding and the teacher's mass in its top k, measured.", "--dry-run")
    ] = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
) -> None:
    """Cache a teacher's distributions on stored rollouts."""
    settings = options.flatten(locals())
    if keep is not options.Keep.top_k:
        options.refuse_given(context, {"top_k": "--top-k"}, "requires --keep top-k")
    prompts = {"chat_template": "--chat-template", "chat_template_kwargs": "--chat-template-kwargs"}
    options.refuse_given(context, prompts, "builds prompts; stored token ids are scored as they are")
    check_engine(scoring)
    from s2dcli.files.teacher_cache import CacheFolder

    CacheFolder.check(out, "score", [model, rollouts], overwrite=overwrite, resume=resume)

    console.starting()
    from s2dcli.assembly.rollouts import store
    from s2dcli.assembly.scoring import CacheForm, check_form, fill_cache, hidden_width, measure_mass, open_scorer, sizes
    from s2dcli.files import jsonl
    from s2dcli.files.manifest import describe
    from s2dcli.models.checkpoints import model_config, resolve
    from s2dcli.models.prompts import load_tokenizer, require_made_with, vocabulary_size
    from s2dcli.models.selftest import require_rows_fit

    started = time.monotonic()
    stored = store(rollouts, (rollout for _, rollout in read_rollouts(rollouts)))
    checkpoint = resolve(model)
    tokenizer = load_tokenizer(checkpoint.folder, loading.trust_remote_code)
    require_made_with(tokenizer, stored.rows, stored.samples)
    require_rows_fit(model_config(checkpoint, loading.trust_remote_code), stored.rows, rollouts)
    kept = min(top_k, vocabulary_size(tokenizer)) if keep is options.Keep.top_k else 0
    width = hidden_width(checkpoint, loading) if keep is options.Keep.hidden else 0
    form = CacheForm(keep, kept, cache_dtype, temperature)
    check_form(form, scoring, loading.device)
    lengths = [len(row.completion_ids) for row in stored.rows]

    opening = (checkpoint, tokenizer, scoring, loading, form, stored.rows, tokens_per_batch)
    if dry_run:
        with open_scorer(*opening) as scorer:
            plan = sizes(checkpoint, loading, vocabulary_size(tokenizer), form, sum(lengths))
            jsonl.print_result({**plan, **measure_mass(scorer, stored.rows, scorer.most_ids(vocabulary_size(tokenizer))), "out": str(out)})
        return

    manifest = describe("score", settings, inputs=[rollouts, *loading.files], parents=[("model", checkpoint)])
    if jsonl.is_stream(rollouts):
        manifest["inputs"][0]["sha256"] = stored.sha256
    with CacheFolder(out, manifest, may_change=MAY_CHANGE, overwrite=overwrite, resume=resume) as folder:
        if not folder.finished:
            with open_scorer(*opening) as scorer, console.progress("scoring", sum(lengths), "tokens") as advance:
                meta = fill_cache(folder, checkpoint, tokenizer, scorer, loading, form, width, stored.rows, shard_tokens, advance)
            counts = {"rollouts": len(lengths), "tokens": sum(lengths), "seconds": time.monotonic() - started}
            folder.finish(meta, counts)
        jsonl.print_result(folder.result())
