"""A teacher on servers: malformed scores, another tokenizer, rows that are asked for ahead."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_vllm import EOS, FakeVllm, completion
from tiny import LiveAround, close, learn, ragged_rows, tiny, training_row

from s2dcli.assembly.served import ServedTeacher
from s2dcli.engines.server import ServerEngine
from s2dcli.errors import EngineError, ModelError
from s2dcli.models.batching import micro_batches
from s2dcli.models.policy import Policy, freeze
from s2dcli.models.rows import Row
from s2dcli.train.objectives import SampledDistillation
from s2dcli.train.teachers import LiveTeacher

VOCABULARY = 33
LIMITED = "Requested prompt logprobs of 3, which is greater than max allowed"
NAMES = [f"t{index}" for index in range(VOCABULARY)]
TOKENIZER = SimpleNamespace(
    get_vocab=lambda: {name: index for index, name in enumerate(NAMES)}, decode=lambda ids: "".join(map(NAMES.__getitem__, ids))
)
ROWS = [training_row([4, 5], [6, 7 + index], group_id=f"g{index}") for index in range(4)]


def entry(value):
    return {"logprob": value, "rank": 1, "decoded_token": None}


def scores(body, **changes):
    """At each token half of the mass on itself, a quarter on the next id, an eighth on the one behind."""
    positions = [None] + [
        {str((token + step) % VOCABULARY): entry(-math.log(2) * (step + 1)) for step in range(3)} for token in body["prompt"][1:]
    ]
    return completion(body, **{"prompt_logprobs": positions, **changes})


class Fake(FakeVllm):
    """With a tokenizer whose texts `texts` gives; None: it has none."""

    def __init__(self, answer=scores, texts=NAMES):
        super().__init__(answer)
        reply, fake = self.http.RequestHandlerClass.reply, self

        def detokenizing(handler, content):
            if handler.path == "/detokenize":
                ids = fake.seen[-1][2]["tokens"]
                content = {"prompt": "".join(texts[index] for index in ids)} if texts else (404, {"detail": "Not Found"})
            reply(handler, content)

        self.http.RequestHandlerClass.reply = detokenizing


def engine_of(url):
    return ServerEngine([url], names=[], eos_ids=[EOS], vocabulary=VOCABULARY, model_vocabulary=40, timeout=5)


def test_scores_are_read_whole_and_in_order():
    with FakeVllm(scores) as fake:
        found = dict(engine_of(fake.url).score(ROWS, 3))
        bodies = [body for path, _, body in fake.seen if path == "/v1/completions"]
    assert sorted(found) == [0, 1, 2, 3]
    assert found[1].sampled_T.tolist() == pytest.approx([-math.log(2)] * 2)
    assert found[1].ids_TK.tolist() == [[6, 7, 8], [8, 9, 10]]
    assert found[1].logprobs_TK[0].tolist() == pytest.approx([-math.log(2) * step for step in (1, 2, 3)])
    assert all(body["prompt_logprobs"] == 3 and body["max_tokens"] == 1 for body in bodies)
    assert len({body["cache_salt"] for body in bodies}) == len(bodies)  # so that no prefix is shared


def test_a_token_beyond_the_top_k_is_told_beside_it():
    def answer(body):
        positions = [None] + [{"9": entry(-5.0), "1": entry(-0.5), "2": entry(-1.0)} for _ in body["prompt"][1:]]
        return completion(body, prompt_logprobs=positions)

    with FakeVllm(answer) as fake:
        (found,) = dict(engine_of(fake.url).score([Row([4], [9, 9])], 2)).values()
    assert found.sampled_T.tolist() == [-5.0, -5.0]
    assert found.ids_TK.tolist() == [[1, 2], [1, 2]]


def with_positions(change):
    def answer(body):
        content = scores(body)
        content["choices"][0]["prompt_logprobs"] = change(content["choices"][0]["prompt_logprobs"])
        return content

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: {"choices": []}, "an answer without a choice"),
        (lambda body: completion(body), "without prompt token ids or log-probs"),
        (lambda body: scores(body, prompt_token_ids=[1, *body["prompt"]]), "changed the token ids, e.g. by a second BOS"),
        (with_positions(lambda found: found[:-1]), "log-probs of other than 4 tokens"),
        (with_positions(lambda found: [*found[:-1], None]), "other than 3 log-probs for token 3"),
        (with_positions(lambda found: [*found[:-1], {"6": entry(-1.0)}]), "other than 3 log-probs for token 3"),
        (with_positions(lambda found: [*found[:-1], {**found[-1], "7": {"rank": 1}}]), "other than 3 log-probs for token 3"),
        (with_positions(lambda found: [*found[:-1], {**found[-1], "7": entry(0.5)}]), "numbers that are no log-probs"),
        (with_positions(lambda found: [*found[:-1], {"7": entry(-1), "36": entry(-2), "8": entry(-3)}]), "counts id 36 among"),
        (lambda body: (400, {"error": {"message": f"{LIMITED}: 1"}}), "gives at most 1 log-probs a token, 3 are needed; start it with"),
    ],
)  # fmt: skip
def test_malformed_scores_end_with_the_server_and_what_is_wrong(answer, message):
    with FakeVllm(answer) as fake, pytest.raises(EngineError, match=message) as caught:
        list(engine_of(fake.url).score(ROWS[:1], 3))
    assert str(caught.value).startswith(f"{fake.url}: ") or "counts id" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused_naming_the_first_token(tmp_path):
    other = [*NAMES[:9], NAMES[10], NAMES[9], *NAMES[11:]]
    with Fake(texts=other) as fake, pytest.raises(ModelError, match="id 9 is 't10' in the teacher and 't9' in the student"):
        ServedTeacher(engine_of(fake.url), TOKENIZER, 3, tmp_path)


def test_a_server_without_a_tokenizer_is_judged_by_its_log_probs(tmp_path):
    unlikely = with_positions(lambda found: [None, *({index: entry(-9.0) for index in position} for position in found[1:])])
    with Fake(unlikely, texts=None) as fake:
        teacher = ServedTeacher(engine_of(fake.url), TOKENIZER, 3, tmp_path)
        teacher.begin(ROWS)
        with pytest.raises(ModelError, match="finds the rollouts less likely than chance"):
            teacher.targets(next(micro_batches(ROWS, 1000, 0, torch.device("cpu"))))


def test_targets_are_there_for_every_micro_batch_and_forgotten(tmp_path):
    with Fake() as fake:
        teacher = ServedTeacher(engine_of(fake.url), TOKENIZER, 3, tmp_path)
        for _ in range(2):
            teacher.begin(ROWS)
            for batch in micro_batches(ROWS, 8, 0, torch.device("cpu"), share_prompts=False):
                targets = teacher.targets(batch)
                assert targets.ids_NK[:, 0].tolist() == batch.targets_N.tolist()
                assert np.allclose(targets.tails_N.exp(), 1 / 8, atol=1e-6)
            assert not teacher._found
        assert (tmp_path / "teacher.json").is_file()


def test_a_model_that_is_exchanged_ends_the_run_also_after_a_restart(tmp_path):
    with Fake() as fake:
        teacher = ServedTeacher(engine_of(fake.url), TOKENIZER, 3, tmp_path)
        teacher.begin(ROWS)
        teacher.targets(next(micro_batches(ROWS, 1000, 0, torch.device("cpu"))))
        fake.answer = with_positions(lambda found: [None, *({index: entry(-2.0) for index in position} for position in found[1:])])
        for again in (teacher, ServedTeacher(engine_of(fake.url), TOKENIZER, 3, tmp_path)):
            again.begin(ROWS)
            with pytest.raises(EngineError, match="another model than at the beginning of the run"):
                again.targets(next(micro_batches(ROWS, 1000, 0, torch.device("cpu"))))


WIDE = 40  # ids of the tiny models


@pytest.mark.parametrize(("k", "exact"), [(WIDE, True), (5, False)])
def test_a_baseline_by_a_server_is_that_of_the_model_in_memory(tmp_path, k, exact):
    """With all ids it is the exact KL; with fewer that over k ids and a bucket, and still one number for each position."""
    teacher, student = freeze(Policy(tiny("llama", seed=7), WIDE)), Policy(tiny("qwen3"), WIDE)
    rows = ragged_rows(8)
    for row in rows:
        row.logprobs = np.full(len(row.completion_ids), -1.0, np.float32)

    def answer(body):
        ids = body["prompt"]
        with torch.no_grad():
            logprobs_TV = teacher.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        positions = [None]
        for token, row in zip(ids[1:], logprobs_TV, strict=True):
            positions.append({str(index): entry(float(row[index])) for index in {token, *row.topk(k).indices.tolist()}})
        return completion(body, prompt_logprobs=positions)

    names = [f"t{index}" for index in range(WIDE)]
    decode = lambda ids: "".join(map(names.__getitem__, ids))  # noqa: E731
    tokenizer = SimpleNamespace(get_vocab=lambda: {name: index for index, name in enumerate(names)}, decode=decode)
    with Fake(answer, texts=names) as fake:
        engine = ServerEngine([fake.url], names=[], eos_ids=[2], vocabulary=WIDE, model_vocabulary=WIDE, timeout=5)
        served = ServedTeacher(engine, tokenizer, k, tmp_path, baseline=True)
        live = LiveTeacher(policy=teacher, sampled=True, baseline=True) if exact else LiveAround(teacher, k)
        found, expected = (
            learn(student, rows, SampledDistillation(teacher=source, temperature=1.0, baseline=True)) for source in (served, live)
        )
        assert {body["prompt_logprobs"] for path, _, body in fake.seen if path == "/v1/completions"} == {k}
    close(found, expected, 5e-5)
    assert served.waited > 0


def test_only_what_a_server_takes_beyond_other_work_is_waited_for(tmp_path):
    delay = 0.3  # seconds

    def slow(body):
        time.sleep(delay)
        return scores(body)

    with Fake(slow) as fake:
        teacher = ServedTeacher(engine_of(fake.url), TOKENIZER, 3, tmp_path)
        teacher.begin(ROWS)
        [batch] = micro_batches(ROWS, 1000, 0, torch.device("cpu"))
        teacher.targets(batch)
        assert delay / 2 < teacher.waited < 10 * delay
        before = teacher.waited
        teacher.begin(ROWS)
        time.sleep(4 * delay)  # the student is updated on other rows
        teacher.targets(batch)
        assert teacher.waited - before < delay / 2
