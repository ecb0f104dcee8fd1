"""The memory that `--dry-run` plans against what an update takes, on the CPU: one process, and two with FSDP2 over gloo.

    python tests/bench/bench_plan.py [SHAPE/VARIANT ...]

`measured` is what the process that takes most takes at the peak of two updates of MICRO_BATCHES full micro-batches, beyond what it
had before the model was loaded; the plan is of the same options. Resident memory is what is measured, with glibc giving freed
memory back at once, so it is what tensors occupy, and gloo's buffers. Loading, where the main process has a whole model, is not
part of it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import memory  # noqa: E402 - after the path
import processes  # noqa: E402
import torch  # noqa: E402
from tiny import training_row  # noqa: E402

from s2dcli.assembly.loading import load_frozen, load_trained  # noqa: E402
from s2dcli.assembly.plan import Processes, memory_plan  # noqa: E402
from s2dcli.models.batching import micro_batches  # noqa: E402
from s2dcli.models.checkpoints import resolve  # noqa: E402
from s2dcli.options import Aggregate, Dtype, ModelOptions, TrainingOptions, Weights  # noqa: E402
from s2dcli.train.objectives import CrossEntropy, Distillation  # noqa: E402
from s2dcli.train.optimizer import MasterOptimizer  # noqa: E402
from s2dcli.train.rows import set_weights  # noqa: E402
from s2dcli.train.teachers import LiveTeacher  # noqa: E402
from s2dcli.train.vocab import forward_kl  # noqa: E402

PROMPT, COMPLETION = 16, 48  # tokens of a row
MICRO_BATCHES = 2  # of an update: the gradients of the first are there when the second's logits are
# Shape of Qwen3's family: vocabulary, width, layers, tied head
SHAPES = {"1M": (512, 128, 4, True), "25M": (512, 512, 8, True), "79M": (32_000, 640, 8, False)}
# Tokens of a micro-batch, options. Products in bfloat16 take a hundred times as long on a CPU without it: fewer tokens
VARIANTS = {
    "float32": (512, {}, {}),
    "checkpointing": (512, {"gradient_checkpointing": True}, {}),
    "LoRA": (512, {"lora_rank": 8}, {}),
    "teacher": (512, {}, {}),
    "bfloat16": (64, {"weights": Weights.bfloat16}, {}),
    "autocast": (64, {}, {"dtype": Dtype.bfloat16}),
    "autocast, checkpointing": (64, {"gradient_checkpointing": True}, {"dtype": Dtype.bfloat16}),
}


def make(folder: Path, vocabulary: int, width: int, layers: int, tied: bool) -> None:
    """Make a random model and a tokenizer of so many words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        tie_word_embeddings=tied,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{index}" for index in range(vocabulary - 2))])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)


def measured(small: Path, folder: Path, training: TrainingOptions, loading: ModelOptions, taught: bool) -> int:
    """Return the bytes that this process takes; what the libraries keep of a `small` model's updates was there before."""
    ctypes.CDLL(None).mallopt(memory.M_MMAP_THRESHOLD, 65536)
    for model in (small, folder):
        gc.collect()
        before = memory.status_bytes("VmRSS")
        _update(model, training, loading, taught)
    return memory.status_bytes("VmHWM") - before


def _update(folder: Path, training: TrainingOptions, loading: ModelOptions, taught: bool) -> None:
    checkpoint = resolve(str(folder))
    loaded, policy = load_trained(checkpoint, loading, training)
    objective = CrossEntropy()
    if taught:
        teacher = LiveTeacher(policy=load_frozen(checkpoint, loaded, loading, training))
        objective = Distillation(teacher=teacher, divergence=forward_kl, temperature=1.0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    optimizer = MasterOptimizer(policy, training)
    policy.collect_gradients(optimizer.gradient_of)
    rows = [training_row([5] * PROMPT, [6] * COMPLETION)] * (MICRO_BATCHES * training.tokens_per_batch // (PROMPT + COMPLETION))
    set_weights(rows, Aggregate.token, COMPLETION)
    for _ in range(2):
        for batch in micro_batches(rows, training.tokens_per_batch, 0, torch.device("cpu"), share_prompts=False):
            policy(batch, objective)[0].backward()
            optimizer.end_micro_batch()
        for other in objective.others:
            if other.sharded:
                other.reshard()
        optimizer.sum_gradients()
        optimizer.clip()
        optimizer.step(1e-6)


def main(words: list[str]) -> None:
    everything = [f"{shape}/{variant}" for shape in SHAPES for variant in VARIANTS]
    print(f"{'shape':<6} {'variant':<24} {'processes':<9} {'planned MB':>11} {'measured MB':>12} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small"
        make(small, *SHAPES["1M"])
        for shape, variant in (word.split("/") for word in words or everything):
            folder = Path(name) / shape
            if not folder.exists():
                make(folder, *SHAPES[shape])
            tokens, changed, how = VARIANTS[variant]
            training, loading, taught = TrainingOptions(tokens_per_batch=tokens, **changed), ModelOptions(**how), variant == "teacher"
            checkpoint = resolve(str(folder))
            for count in (1, 2):
                kind = Processes(count, sharded=count > 1)
                plan = memory_plan(checkpoint, [checkpoint] * taught, loading, training, sample_tokens=0, processes=kind)
                took = max(processes.in_each(count, measured, small, folder, training, loading, taught, sharded=True))
                planned = plan["total_bytes"]
                print(f"{shape:<6} {variant:<24} {count:<9} {planned / 1e6:11.1f} {took / 1e6:12.1f} {planned / took:6.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
