"""Memory of the losses over a large vocabulary, and what forming their gradients in the forward pass is worth.

    python tests/bench/bench_loss.py memory --hidden 64      Qwen3's vocabulary, on the CPU
    python tests/bench/bench_loss.py speed
    python tests/bench/bench_loss.py memory --device cuda --hidden 2048 --dtype bfloat16
    python tests/bench/bench_loss.py chunks --device cuda --hidden 2048 --dtype bfloat16 --tokens 16384

`memory` is the peak beyond hidden states, head and the head's gradient, at 1k, 4k and 16k tokens. `speed`
compares three ways to the same gradients, in one run: `fused` is what s2d does; `recompute`
cuts the same chunks, and lets torch compute a chunk's logits again in the backward pass; `dense` lets
autograd keep the logits of all tokens. `chunks` gives the losses chunks of several sizes, and tells what share of the
machine's peak (bench_peak.py) their products reach: 6 V D operations a token, 8 V D with a teacher's logits; "own" is the size that
s2d takes. Its seconds are CPU seconds on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from bench_peak import Clock, peak  # noqa: E402 - after the path
from memory import peak_bytes  # noqa: E402 - after the path

from s2dcli.models import readers  # noqa: E402
from s2dcli.models.forward import Head  # noqa: E402
from s2dcli.train import vocab  # noqa: E402
from s2dcli.train.targets import ExactTargets, TopKTargets  # noqa: E402

VOCABULARY = 151_936
TOKENS = (1024, 4096, 16384)
SPEED_TOKENS = 1024
TOP_K = 128
CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens
REPEATS = 3  # of a timing; the least counts


class Case:
    """Inputs of all losses, for N tokens."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        self.hidden_ND = draw(tokens, hidden).requires_grad_()
        self.weight_VD = (draw(VOCABULARY, hidden) * hidden**-0.5).requires_grad_()
        self.gradient_VD = torch.zeros(VOCABULARY, hidden, device=device)
        self.head = Head(self.weight_VD, None, gradient_VD=self.gradient_VD)
        self.teacher_ND, self.teacher = draw(tokens, hidden), Head(draw(VOCABULARY, hidden) * hidden**-0.5, None)
        self.targets_N = torch.randint(VOCABULARY, (tokens,), generator=generator).to(device)
        self.weights_N = torch.full((tokens,), 1 / tokens, device=device)

    def losses(self) -> dict:
        """Name -> loss, to be run backward."""
        both = (self.hidden_ND, self.head, ExactTargets(self.teacher_ND, self.teacher), self.weights_N)
        return {
            "token log-probs": lambda: self.fused_cross_entropy(),
            "KL(student || teacher)": lambda: vocab.divergence_loss(*both, vocab.reverse_kl)[0],
            "KL(teacher || student)": lambda: vocab.divergence_loss(*both, vocab.forward_kl)[0],
            "JSD(student, teacher)": lambda: vocab.divergence_loss(*both, partial(vocab.jsd, beta=0.5))[0],
            f"KL over the top {TOP_K}": lambda: vocab.top_k_divergence_loss(
                self.hidden_ND, self.head, self.top_k_targets(), self.weights_N, vocab.reverse_kl
            )[0],
        }

    def top_k_targets(self) -> TopKTargets:
        return TopKTargets(*readers.top_k_logprobs(self.teacher_ND, self.teacher, TOP_K))

    def fused_cross_entropy(self) -> torch.Tensor:
        per_token = lambda logprobs_C, rows: (-(self.weights_N[rows] * logprobs_C).sum(), {})  # noqa: E731
        return vocab.token_loss(self.hidden_ND, self.head, self.targets_N, per_token)[0]

    def dense_cross_entropy(self, rows: slice = slice(None)) -> torch.Tensor:
        logprobs_CV = linear(self.hidden_ND[rows], self.weight_VD).float().log_softmax(-1)
        return -(self.weights_N[rows] * logprobs_CV.gather(1, self.targets_N[rows, None])[:, 0]).sum()

    def dense_kl(self, rows: slice = slice(None)) -> torch.Tensor:
        ours_CV = linear(self.hidden_ND[rows], self.weight_VD).float().log_softmax(-1)
        theirs_CV = linear(self.teacher_ND[rows], self.teacher.weight_VD).float().log_softmax(-1)
        return (self.weights_N[rows, None] * ours_CV.exp() * (ours_CV - theirs_CV)).sum()

    def recomputed(self, dense) -> torch.Tensor:
        size = readers.chunk_tokens(VOCABULARY, self.hidden_ND.device)
        starts = range(0, len(self.hidden_ND), size)
        return torch.stack([checkpoint(dense, slice(start, start + size), use_reentrant=False) for start in starts]).sum()


def peak_of(work, device: str) -> int:
    if device == "cpu":
        return peak_bytes(lambda: None, work)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def seconds_of(work, device: str) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def memory(hidden: int, dtype: torch.dtype, device: str) -> None:
    print("| loss | " + " | ".join(f"{tokens // 1024}k tokens, MB" for tokens in TOKENS) + " |\n|" + "---|" * (1 + len(TOKENS)))
    peaks: dict[str, list[str]] = {}
    for tokens in TOKENS:
        case = Case(tokens, hidden, dtype, device)
        states = case.hidden_ND.numel() * case.hidden_ND.element_size()  # their gradient is no part of the loss's own memory
        for name, loss in case.losses().items():
            peak = peak_of(lambda loss=loss: loss().backward(), device) - states
            peaks.setdefault(name, []).append(f"{peak / 1e6:.0f}")
    for name, row in peaks.items():
        print(f"| {name} | " + " | ".join(row) + " |")


def speed(hidden: int, dtype: torch.dtype, device: str) -> None:
    case = Case(SPEED_TOKENS, hidden, dtype, device)
    print(f"{SPEED_TOKENS} tokens, forward and backward\n\n| loss | way | seconds | peak, MB |\n|---|---|---|---|")
    ways = {
        "token log-probs": (case.fused_cross_entropy, case.dense_cross_entropy),
        "KL(student || teacher)": (case.losses()["KL(student || teacher)"], case.dense_kl),
    }
    for name, (fused, dense) in ways.items():
        for way, loss in {"fused": fused, "recompute": lambda dense=dense: case.recomputed(dense), "dense": dense}.items():
            work = lambda loss=loss: loss().backward()  # noqa: E731
            seconds = seconds_of(work, device)
            case.hidden_ND.grad = case.weight_VD.grad = None
            print(f"| {name} | {way} | {seconds:.2f} | {peak_of(work, device) / 1e6:,.0f} |", flush=True)


def chunk_sizes(hidden: int, dtype: torch.dtype, device: str, tokens: int) -> None:
    case, clock = Case(tokens, hidden, dtype, device), Clock(device != "cpu")
    chunk_tokens, most = readers.chunk_tokens, peak(dtype, device, clock)
    print(f"{tokens} tokens, forward and backward; peak {most / 1e9:,.0f} GFLOP/s\n")
    print("| loss | tokens of a chunk | seconds | share of the peak |\n|---|---|---|---|")
    for models, (name, operations) in enumerate({"token log-probs": 6, "KL(student || teacher)": 8}.items(), start=1):
        loss, own = case.losses()[name], chunk_tokens(VOCABULARY, case.hidden_ND.device, models)
        for size in sorted({own, *(size for size in CHUNKS if size <= tokens)}):
            readers.chunk_tokens = lambda *_, size=size: size
            seconds = []
            for _ in range(REPEATS):
                start = clock.now()
                loss().backward()
                seconds.append(clock.now() - start)
                case.hidden_ND.grad = None
            share = operations * VOCABULARY * hidden * tokens / min(seconds) / most
            print(f"| {name} | {size}{' (own)' if size == own else ''} | {min(seconds):.3f} | {share:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["memory", "speed", "chunks"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=256, help="hidden width")
    parser.add_argument("--tokens", type=int, default=SPEED_TOKENS, help="of `chunks`")
    options = parser.parse_args()
    case = options.hidden, getattr(torch, options.dtype), options.device
    if options.table == "chunks":
        chunk_sizes(*case, options.tokens)
    else:
        {"memory": memory, "speed": speed}[options.table](*case)


if __name__ == "__main__":
    main()
