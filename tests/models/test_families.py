"""Every family: sampling and training agree with plain forward passes of one row, on the paths that the self-test leaves it."""

import random

import pytest
import torch
from families import FAMILIES, HEAD, MAX_POSITIONS, TABLE, family, line
from tiny import VOCABULARY

from s2dcli.engines.base import Request, SamplingParams
from s2dcli.engines.transformers import TransformersEngine
from s2dcli.errors import ModelError
from s2dcli.models.batching import Row, micro_batches
from s2dcli.models.policy import Policy
from s2dcli.models.selftest import fast_paths, packs, self_test

REFUSED = {"modernbert-decoder"}
# A prompt of its own, two short ones and the first again; with their completions longer than all windows and chunks.
PROMPT_LENGTHS = (11, 4, 7)
MAX_TOKENS = 14


@pytest.fixture(scope="module")
def table():
    return TABLE.read_text()


def test_the_table_has_all_families_and_no_others(table):
    assert table.startswith(HEAD)
    assert [row.split("|")[1].strip() for row in table.removeprefix(HEAD).splitlines()] == sorted(FAMILIES)


def gradient(policy: Policy, rows: list[Row], **layout: bool) -> torch.Tensor:
    policy.zero_grad()
    for batch in micro_batches(rows, MAX_POSITIONS, 0, torch.device("cpu"), **layout):
        states_ND = policy.states(batch)
        policy.head().logits(states_ND).log_softmax(-1).gather(1, batch.targets_N[:, None]).sum().backward()
    return torch.cat([(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten() for weight in policy.parameters()])


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - REFUSED))
def test_a_family_samples_and_trains_as_plain_forward_passes_say(table, name):
    model = family(name)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in PROMPT_LENGTHS]
    requests = [Request(prompts[index % 3], index) for index in range(9)]
    engine = TransformersEngine(model, eos_ids=[2], pad_id=0, vocabulary=VOCABULARY, batch_tokens=10_000)
    samples = dict(engine.generate(requests, SamplingParams(1.0, 1.0, 0, MAX_TOKENS)))
    assert sorted(samples) == list(range(9))
    rows = [Row(requests[index].prompt_ids, samples[index].completion_ids) for index in range(9)]
    assert max(map(len, rows)) > 16
    for index, row in enumerate(rows):
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        with torch.no_grad():
            logprobs_TV = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].float().log_softmax(-1)
        assert samples[index].logprobs == pytest.approx(logprobs_TV.gather(1, ids[0, len(row.prompt_ids) :, None])[:, 0].tolist(), abs=1e-4)

    policy, paths = Policy(model, VOCABULARY), fast_paths(model)
    total = sum(gradient(policy, [row]) for row in rows)
    scale = total.norm()
    assert (gradient(policy, rows, share_prompts=paths.share_prompts) - total).norm() <= 1e-4 * scale
    if packs(model, VOCABULARY):
        assert (gradient(policy, rows, share_prompts=False, pack=True) - total).norm() <= 1e-4 * scale
    assert line(name) in table, "stale: python tests/families.py"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_family_that_is_wrong_on_every_path_is_refused(table, name):
    with pytest.raises(ModelError, match="transforms its logits in a way s2d does not know"):
        self_test(family(name), VOCABULARY, name)
    assert line(name) in table, "stale: python tests/families.py"
