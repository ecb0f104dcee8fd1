"""Pre-train a small teacher and a small student on a task of one's own, from scratch: what toy/ and countdown/ share.

A task says what a problem, a solution and a right answer are, and has several styles of solution, told by their first token.
Pre-training leaves both models with the skill of each style but little inclination to the one that pays: reinforcement learning can
find that one. So styles are DRAWN mostly in that style, that the skill is learnt, while the loss of a solution's first token is
weighted by wanted / drawn share, that the model's own choice of style comes out as WANTED.

One thread and a fixed seed: on one machine a second run writes the same bytes. The problems do not depend on --seed, so that
families made with different seeds differ in one thing.

Shapes: B sequences in a batch, T tokens of prompt and solution, V tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from s2dcli.files import jsonl
from s2dcli.files.records import Problem, problem_sha256

PROBLEM_SEED = 0
PAD, USER, ASSISTANT, EOS = SPECIAL = "<pad>", "<|user|>", "<|assistant|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('only user and assistant messages') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_POSITIONS = 64  # tokens of prompt and solution

BATCH_SIZE = 64
WARMUP_STEPS = 50
DECAY_STEPS = 100
CHECK_EVERY = 25  # steps between two measurements of the accuracy
CHECK_SAMPLES = 4  # per validation problem


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models.

    The accuracy in the task's best style says when: a fixed number of steps gives another skill with each seed.
    Reaching `decay_at` starts the decay of the learning rate, reaching `stop_at` ends it early.
    """

    hidden_size: int
    learning_rate: float
    decay_at: float
    stop_at: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems, their solutions, and the models that are to learn them."""

    dataset: str  # its name, in the source of each problem
    tokens: list[str]  # in the order of their ids, SPECIAL first
    token_pattern: str  # how text is cut into them
    prompt_tokens: int  # of every prompt
    max_response_tokens: int
    splits: Mapping[str, int]  # problems of each
    styles: Mapping[str, str]  # style: its first token
    best_style: str
    drawn: Mapping[str, float]  # share of a style in pre-training
    wanted: Mapping[str, float]  # share that a model's own choice comes out as
    recipes: Mapping[str, Recipe]
    draw_problem: Callable[[random.Random], str]
    identity: Callable[[str], Hashable]  # equal for problems that are one
    answer: Callable[[str], str]  # of a problem
    solve: Callable[[str, str, random.Random], str]  # problem, style -> solution, without the end token
    is_right: Callable[[str, Problem], bool]  # of a completion's text, without the end token


# Problems


def make_splits(task: Task) -> dict[str, list[Problem]]:
    """Return the splits, cut from one seeded stream in which no problem comes twice."""
    stream = _distinct(task, random.Random(PROBLEM_SEED))
    splits = {}
    for split, size in task.splits.items():
        splits[split] = [
            Problem(
                id=f"{split}-{index:03d}",
                prompt=[{"role": "user", "content": text}],
                answer=task.answer(text),
                problem_sha256=problem_sha256(text),
                source={"dataset": task.dataset, "split": split, "index": index},
            )
            for index, text in enumerate(itertools.islice(stream, size))
        ]
    return splits


def _distinct(task: Task, rng: random.Random) -> Iterator[str]:
    seen = set()
    while True:
        text = task.draw_problem(rng)
        if task.identity(text) not in seen:
            seen.add(task.identity(text))
            yield text


# Tokenizer and models


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """Return the tokenizer: one id per symbol or number, text that it cannot split is an error."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(task.tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(task.token_pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()  # tokens are joined as they are, with no blanks between
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def make_model(task: Task, hidden_size: int) -> Qwen3ForCausalLM:
    ids = {"pad_token_id": task.tokens.index(PAD), "eos_token_id": task.tokens.index(EOS), "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(task.tokens),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU kernels take
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        attn_implementation="eager",  # faster than the fused kernel at these shapes
        dtype="float32",
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


# Training and measuring


@torch.no_grad()
def sample_accuracy(
    task: Task,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    first_token: str | None,
    seed: int,
    num_samples: int = CHECK_SAMPLES,
) -> float:
    """Return the share of right answers at temperature 1; `first_token` forces the style."""
    generator = torch.Generator().manual_seed(seed)
    problems = [problem for problem in problems for _ in range(num_samples)]
    prompts = [tokenizer.apply_chat_template(problem.prompt, add_generation_prompt=True, tokenize=False) for problem in problems]
    inputs = torch.tensor(tokenizer([prompt + (first_token or "") for prompt in prompts])["input_ids"])  # [B, T]
    cache = DynamicCache(config=model.config)
    response = [inputs[:, task.prompt_tokens :]]  # parts of [B, <= max_response_tokens]
    for _ in range(task.max_response_tokens - response[0].shape[1]):
        logits_BV = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        inputs = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)  # [B, 1]
        response.append(inputs)
    texts = tokenizer.batch_decode(torch.cat(response, 1))
    solutions = (text.partition(EOS)[0] for text in texts)
    return sum(task.is_right(solution, problem) for solution, problem in zip(solutions, problems, strict=True)) / len(problems)


def draw_batch(
    task: Task, rng: random.Random, tokenizer: PreTrainedTokenizerFast, held_out: set[Hashable]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [B, T] and the weight of each token's loss [B, T]: 0 on prompt and padding."""
    styles = rng.choices(list(task.drawn), task.drawn.values(), k=BATCH_SIZE)
    texts = []
    for style in styles:
        while task.identity(problem := task.draw_problem(rng)) in held_out:
            pass
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": task.solve(problem, style, rng)}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    weights = (ids != tokenizer.pad_token_id).float()
    weights[:, : task.prompt_tokens] = 0.0
    weights[:, task.prompt_tokens] = torch.tensor([task.wanted[style] / task.drawn[style] for style in styles])
    return ids, weights


def pretrain(task: Task, name: str, seed: int, tokenizer: PreTrainedTokenizerFast, splits: dict[str, list[Problem]]) -> Qwen3ForCausalLM:
    """Train one model until it is good enough in the best style, then let the learning rate decay to zero."""
    recipe, validation, best = task.recipes[name], splits["validation"], task.best_style
    held_out = {task.identity(problem.prompt[0]["content"]) for split in splits.values() for problem in split}
    torch.manual_seed(seed)
    rng = random.Random(f"{name} {seed}")
    model = make_model(task, recipe.hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    decay_start = None
    started = time.monotonic()
    for step in itertools.count(1):
        decay = 0 if decay_start is None else (step - 1 - decay_start) / DECAY_STEPS
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(step / WARMUP_STEPS, 1.0 - decay)

        ids_BT, weights_BT = draw_batch(task, rng, tokenizer, held_out)
        logits_BTV = model(input_ids=ids_BT).logits  # padding is on the right: a causal model needs no mask
        losses_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), ids_BT[:, 1:], reduction="none")
        loss = (losses_BT * weights_BT[:, 1:]).sum() / (weights_BT > 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if step % CHECK_EVERY == 0:
            accuracy = sample_accuracy(task, model, tokenizer, validation, task.styles[best], seed=step)
            print(f"{name}: step {step}, loss {loss.item():.3f}, {best} accuracy {accuracy:.1%}", flush=True)
            if decay_start is None and accuracy >= recipe.decay_at:
                decay_start = step
            elif decay_start is not None and (accuracy >= recipe.stop_at or step == decay_start + DECAY_STEPS):
                break
    print(f"{name}: {model.num_parameters():,} parameters, {step} steps, {time.monotonic() - started:.0f} s")
    for style, first_token in {**task.styles, "own choice": None}.items():
        accuracy = sample_accuracy(task, model, tokenizer, validation, first_token, seed=0, num_samples=16)
        print(f"{name}: validation accuracy at temperature 1, {style}: {accuracy:.1%}")
    return model


def main(task: Task) -> None:
    """The command line of a task's script: make its problems, tokenizer, teacher and student in a new folder."""
    parser = argparse.ArgumentParser(description="Make a family: problems, tokenizer, teacher and student.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for problems/, teacher/ and student/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pre-training (default 0)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    torch.set_num_threads(1)  # sums in one order, so that a rerun gives the same bytes

    splits = make_splits(task)
    for split, problems in splits.items():
        with jsonl.open_output(options.out / "problems" / f"{split}.jsonl") as writer:
            for problem in problems:
                writer.write(problem.to_record())
    tokenizer = make_tokenizer(task)
    for name in task.recipes:
        model = pretrain(task, name, options.seed, tokenizer, splits)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
