"""Make the toy family: problems, a tokenizer, a teacher and a student, all from scratch.

    python examples/toy/pretrain.py --out toy
    python examples/toy/pretrain.py --out toy-1 --seed 1

The task is arithmetic on six digits, read from left to right, where `-` is the ABSOLUTE
difference: 7-1-5-6+4-5= has the running totals 6, 1, 5, 9, 4 and the answer 4. Nested absolute
values cannot be guessed without the steps. A solution has one of three styles, told by its
first token:

    direct   \\boxed{4}                   no totals
    terse    ,1,9,4\\n\\boxed{4}           every second total
    careful  =6=1=5=9=4\\n\\boxed{4}       every total

Pre-training leaves both models with the skill to be careful but little inclination: reinforcement
learning can find that careful pays. So styles are DRAWN mostly careful, that the skill is learnt,
while the loss of a solution's first token is weighted by wanted / drawn share, that the model's
own choice of style comes out as WANTED. The numbers were tuned on the validation split only.

One thread and a fixed seed: on one machine a second run writes the same bytes. The problems do
not depend on --seed, so that families made with different seeds differ in one thing.

Shapes: B sequences in a batch, T tokens of prompt and solution, V tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from s2dcli.files import jsonl
from s2dcli.files.records import Problem, problem_sha256

# The task
NUM_DIGITS = 6
OPERATORS = "+---"  # drawn evenly from these four
TOTAL_LIMIT = 20  # problems with a running total of 20 or more are rejected
NOISE_RATE = 0.03  # share of a pre-training solution's totals that are off
NOISE_RANGE = 9  # by at most so much, and then carried on
PROBLEM_SEED = 0
SPLITS = {"1H": 512, "2H": 512, "validation": 200, "test": 320}

# The tokens, in the order of their ids
PAD, USER, ASSISTANT, EOS = "<pad>", "<|user|>", "<|assistant|>", "<|im_end|>"
TOKENS = [PAD, USER, ASSISTANT, EOS, "\n", ",", "\\boxed", "{", "}", "+", "-", "*", "=", *map(str, range(TOTAL_LIMIT))]
TOKEN_PATTERN = r"\\boxed|1[0-9]|[0-9]|[\s\S]"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('only user and assistant messages') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPT_TOKENS = 14  # <|user|>, six digits, five operators, =, <|assistant|>: 1 + 6 + 5 + 1 + 1
MAX_RESPONSE_TOKENS = 16  # a careful solution: five times = and a total, newline, \boxed { 4 }, end

# Pre-training
STYLES = {"direct": "\\boxed", "terse": ",", "careful": "="}  # style: its first token
DRAWN = {"direct": 0.10, "terse": 0.15, "careful": 0.75}
WANTED = {"direct": 0.45, "terse": 0.40, "careful": 0.15}
BATCH_SIZE = 64
WARMUP_STEPS = 50
DECAY_STEPS = 100
CHECK_EVERY = 25  # steps between two measurements of the careful accuracy
CHECK_SAMPLES = 4  # per validation problem


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models.

    The careful accuracy says when: a fixed number of steps gives another skill with each seed.
    Reaching `decay_at` starts the decay of the learning rate, reaching `stop_at` ends it early.
    """

    hidden_size: int
    learning_rate: float
    decay_at: float
    stop_at: float


RECIPES = {
    "teacher": Recipe(hidden_size=64, learning_rate=4e-3, decay_at=0.75, stop_at=1.0),
    "student": Recipe(hidden_size=32, learning_rate=5e-3, decay_at=0.32, stop_at=0.45),
}


# Problems and solutions


def running_totals(problem: str, noise: random.Random | None = None) -> list[int]:
    """Return the five running totals of a problem such as `7-1-5-6+4-5=`; the last is its answer.

    With `noise` a total is now and then off, and the next ones follow from the wrong one.
    """
    total, totals = int(problem[0]), []
    for operator, digit in zip(problem[1:-1:2], problem[2:-1:2], strict=True):
        total = total + int(digit) if operator == "+" else abs(total - int(digit))
        if noise and noise.random() < NOISE_RATE:
            total += noise.randint(-NOISE_RANGE, NOISE_RANGE)
        if noise:
            total = min(max(total, 0), TOTAL_LIMIT - 1)
        totals.append(total)
    return totals


def draw_problem(rng: random.Random) -> str:
    while True:
        digits = [str(rng.randint(1, 9)) for _ in range(NUM_DIGITS)]
        operators = [rng.choice(OPERATORS) for _ in range(NUM_DIGITS - 1)]
        problem = digits[0] + "".join(o + d for o, d in zip(operators, digits[1:], strict=True)) + "="
        if max(running_totals(problem)) < TOTAL_LIMIT:
            return problem


def write_solution(totals: list[int], style: str) -> str:
    """Return the text of a solution, without the end token."""
    shown = {"direct": [], "terse": [*totals[1:-1:2], totals[-1]], "careful": totals}[style]
    steps = "".join(f"{STYLES[style]}{total}" for total in shown)
    return f"{steps}\n\\boxed{{{totals[-1]}}}" if steps else f"\\boxed{{{totals[-1]}}}"


def make_splits() -> dict[str, list[Problem]]:
    """Return the four splits, cut from one seeded stream in which no problem comes twice."""
    rng = random.Random(PROBLEM_SEED)
    stream = iter(dict.fromkeys(draw_problem(rng) for _ in range(2 * sum(SPLITS.values()))))
    splits = {}
    for split, size in SPLITS.items():
        splits[split] = [
            Problem(
                id=f"{split}-{index:03d}",
                prompt=[{"role": "user", "content": text}],
                answer=str(running_totals(text)[-1]),
                problem_sha256=problem_sha256(text),
                source={"dataset": "toy-arithmetic", "split": split, "index": index},
            )
            for index, text in enumerate(itertools.islice(stream, size))
        ]
    return splits


# Tokenizer and models


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one id per symbol or number, text that it cannot split is an error."""
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    backend.decoder = decoders.Fuse()  # tokens are joined as they are, with no blanks between
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def make_model(hidden_size: int) -> Qwen3ForCausalLM:
    ids = {"pad_token_id": TOKENS.index(PAD), "eos_token_id": TOKENS.index(EOS), "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU kernels take
        max_position_embeddings=64,
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
    response = [inputs[:, PROMPT_TOKENS:]]  # parts of [B, <= 16]
    for _ in range(MAX_RESPONSE_TOKENS - response[0].shape[1]):
        logits_BV = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        inputs = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)  # [B, 1]
        response.append(inputs)
    texts = tokenizer.batch_decode(torch.cat(response, 1))
    solutions = (text.partition(EOS)[0] for text in texts)
    right = sum(solution.endswith(f"\\boxed{{{problem.answer}}}") for solution, problem in zip(solutions, problems, strict=True))
    return right / len(problems)


def draw_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast, held_out: set[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [B, T] and the weight of each token's loss [B, T]: 0 on prompt and padding."""
    styles = rng.choices(list(DRAWN), DRAWN.values(), k=BATCH_SIZE)
    texts = []
    for style in styles:
        while (problem := draw_problem(rng)) in held_out:
            pass
        solution = write_solution(running_totals(problem, noise=rng), style)
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    weights = (ids != tokenizer.pad_token_id).float()
    weights[:, :PROMPT_TOKENS] = 0.0
    weights[:, PROMPT_TOKENS] = torch.tensor([WANTED[style] / DRAWN[style] for style in styles])
    return ids, weights


def pretrain(name: str, seed: int, tokenizer: PreTrainedTokenizerFast, splits: dict[str, list[Problem]]) -> Qwen3ForCausalLM:
    """Train one model until it is careful enough, then let the learning rate decay to zero."""
    recipe, validation = RECIPES[name], splits["validation"]
    held_out = {problem.prompt[0]["content"] for split in splits.values() for problem in split}
    torch.manual_seed(seed)
    rng = random.Random(f"{name} {seed}")
    model = make_model(recipe.hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    decay_start = None
    started = time.monotonic()
    for step in itertools.count(1):
        decay = 0 if decay_start is None else (step - 1 - decay_start) / DECAY_STEPS
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(step / WARMUP_STEPS, 1.0 - decay)

        ids_BT, weights_BT = draw_batch(rng, tokenizer, held_out)
        logits_BTV = model(input_ids=ids_BT).logits  # padding is on the right: a causal model needs no mask
        losses_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), ids_BT[:, 1:], reduction="none")
        loss = (losses_BT * weights_BT[:, 1:]).sum() / (weights_BT > 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if step % CHECK_EVERY == 0:
            accuracy = sample_accuracy(model, tokenizer, validation, STYLES["careful"], seed=step)
            print(f"{name}: step {step}, loss {loss.item():.3f}, careful accuracy {accuracy:.1%}", flush=True)
            if decay_start is None and accuracy >= recipe.decay_at:
                decay_start = step
            elif decay_start is not None and (accuracy >= recipe.stop_at or step == decay_start + DECAY_STEPS):
                break
    print(f"{name}: {model.num_parameters():,} parameters, {step} steps, {time.monotonic() - started:.0f} s")
    for style, first_token in {**STYLES, "own choice": None}.items():
        accuracy = sample_accuracy(model, tokenizer, validation, first_token, seed=0, num_samples=16)
        print(f"{name}: validation accuracy at temperature 1, {style}: {accuracy:.1%}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the toy family: problems, tokenizer, teacher and student.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for problems/, teacher/ and student/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pre-training (default 0)")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    torch.set_num_threads(1)  # sums in one order, so that a rerun gives the same bytes

    splits = make_splits()
    for split, problems in splits.items():
        with jsonl.open_output(options.out / "problems" / f"{split}.jsonl") as writer:
            for problem in problems:
                writer.write(problem.to_record())
    tokenizer = make_tokenizer()
    for name in RECIPES:
        model = pretrain(name, options.seed, tokenizer, splits)
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)


if __name__ == "__main__":
    main()
