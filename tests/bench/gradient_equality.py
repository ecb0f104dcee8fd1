"""How equal gradients are that should be: a table over every loss, in float32.

    python tests/bench/gradient_equality.py

`dense` is the largest relative difference from an independent float64 formula over the whole vocabulary,
with respect to states, head and bias, over heads with and without bias, scale and soft cap, at two
temperatures. `split` is that between one micro-batch and any split into smaller ones, over model families,
denominators, and prompts shared or not. Relative difference: the norm of it by the norm of the gradient.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(folder) for folder in (TESTS, TESTS / "train", TESTS / "models", TESTS.parent)]

import test_batching as batching  # noqa: E402 - after the path
import test_vocab as dense  # noqa: E402

from s2dcli.models import readers  # noqa: E402
from s2dcli.models.policy import Policy  # noqa: E402
from s2dcli.options import Aggregate  # noqa: E402
from s2dcli.train import vocab  # noqa: E402
from s2dcli.train.targets import ExactTargets, TopKTargets  # noqa: E402


def from_dense() -> dict[str, float]:
    """Largest relative difference of any gradient from the float64 formula, by loss."""
    worst: dict[str, float] = defaultdict(float)
    readers.LOGITS_BYTES = 5 * dense.V * 4  # several ragged chunks

    def compare(name: str, loss: torch.Tensor, formula: torch.Tensor, hidden: torch.Tensor, head) -> None:
        pairs = zip(dense.gradients(loss, hidden, head), dense.gradients(formula, hidden, head), strict=True)
        worst[name] = max(worst[name], *(float((got - want).norm() / want.norm()) for got, want in pairs))

    weights = dense.WEIGHTS.double()
    for bias, scale, cap in dense.HEADS:
        for temperature in (1.0, 0.7):
            hidden, head = dense.make(dense.D, 0, bias=bias, scale=scale, cap=cap)
            states, teacher = dense.make(dense.E, 5, scale=0.5)
            log_p_of = lambda: (dense.dense_logits(hidden, head) / temperature).log_softmax(-1)  # noqa: B023,E731 - a graph for each
            log_q = (dense.dense_logits(states, teacher) / temperature).log_softmax(-1).detach()
            chosen = log_p_of()[torch.arange(dense.N), dense.TARGETS]
            loss = vocab.token_loss(hidden, head, dense.TARGETS, dense.weighted, temperature)[0]
            compare("of token log-probs", loss, dense.weighted(chosen, slice(None))[0], hidden, head)
            targets = ExactTargets(states, teacher, temperature)
            for form, divergence in dense.FORMS.items():
                value = dense.dense_divergence(form, log_p_of().exp(), log_q.exp())
                loss = vocab.divergence_loss(hidden, head, targets, dense.WEIGHTS, divergence, temperature=temperature)[0]
                compare(form, loss, (weights * value).sum(), hidden, head)
            top_k = TopKTargets(*readers.top_k_logprobs(states, teacher, 5, temperature))
            for form, divergence in dense.FORMS.items():
                ours, theirs = (dense.in_buckets(log_probs.exp(), top_k.ids_NK) for log_probs in (log_p_of(), log_q))
                loss = vocab.top_k_divergence_loss(hidden, head, top_k, dense.WEIGHTS, divergence, temperature=temperature)[0]
                compare(
                    f"{form} over the top 5 and a tail", loss, (weights * dense.dense_divergence(form, ours, theirs)).sum(), hidden, head
                )
    return worst


def over_splits() -> dict[str, float]:
    """Largest relative difference between one micro-batch and several, by objective."""
    worst: dict[str, float] = defaultdict(float)
    for family in batching.FAMILIES:
        policy = Policy(batching.tiny(family), batching.VOCABULARY)
        for group in (1, 4):
            rows = batching.ragged_rows(group=group)
            for aggregate in Aggregate:
                for name, objective in batching.objectives(rows, aggregate).items():
                    whole = batching.gradient(policy, rows, objective, 10_000)
                    parts = [batching.gradient(policy, rows, objective, budget) for budget in (60, 1)]
                    worst[name] = max(worst[name], *(float((whole - part).norm() / whole.norm()) for part in parts))
    return worst


def main() -> None:
    torch.set_num_threads(1)
    logits_bytes = readers.LOGITS_BYTES
    print("| gradient | against | largest relative difference |\n|---|---|---|")
    for name, difference in from_dense().items():
        print(f"| {name} | dense float64 | {difference:.1e} |")
    readers.LOGITS_BYTES = logits_bytes
    for name, difference in over_splits().items():
        print(f"| {name} | other splits | {difference:.1e} |")


if __name__ == "__main__":
    main()
