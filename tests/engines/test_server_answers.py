"""Every answer of a server is checked: none is taken as it is, none makes a command hang, and no error or file shows a password."""

import base64
import json
import shutil
import threading
import time

import pytest
from conftest import read_jsonl
from fake_vllm import COMPLETION, EOS, FakeVllm, completion

from s2dcli.engines.base import Request, Sample, SamplingParams
from s2dcli.engines.server import ServerEngine
from s2dcli.errors import EngineError, UsageError

PARAMS = SamplingParams(1.0, 1.0, 0, 4)
SAMPLING = ["-n", 2, "--max-tokens", 16]


def engine_of(*urls, **options):
    return ServerEngine(urls, names=["student"], eos_ids=[EOS], vocabulary=33, model_vocabulary=40, **options)


def sample(engine, count=3, params=PARAMS):
    return dict(engine.generate([Request([5, 6], seed) for seed in range(count)], params))


def test_a_well_formed_answer_is_a_sample():
    with FakeVllm() as fake:
        assert sample(engine_of(fake.url)) == dict.fromkeys(range(3), Sample(COMPLETION, [-0.5, -0.25], "stop"))


def with_choice(**changes):
    return lambda body: completion(body, **changes)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda body: b"hello", "an answer that is not JSON: 'hello'"),
        (lambda body: b"", "an answer that is not JSON: ''"),
        (lambda body: b"\xff\xfe\x00", "an answer that is not JSON"),
        (lambda body: b"[" * 100_000, "an answer that is not JSON: '\\["),
        (lambda body: None, "an answer without a completion: None"),
        (lambda body: [1], "an answer without a completion"),
        (lambda body: {}, "an answer without a completion: {}"),
        (lambda body: {"choices": []}, "an answer without a completion"),
        (lambda body: {"choices": ["text"]}, "an answer without a completion"),
        (lambda body: {"choices": [{"text": "3"}]}, "an answer without a completion"),
        (with_choice(token_ids=None), "without token ids or log-probs"),
        (with_choice(logprobs=None), "without token ids or log-probs"),
        (with_choice(logprobs=[-0.5]), "an answer without a completion"),
        (with_choice(prompt_token_ids="5 6"), "changed the prompt's token ids"),
        (with_choice(token_ids="13 3"), "token ids that are not a list of integers: '13 3'"),
        (with_choice(token_ids=["13", "3"]), "token ids that are not a list of integers"),
        (with_choice(token_ids=[True, 3]), "token ids that are not a list of integers"),
        (with_choice(token_ids=[34, 3]), "sampled id 34, which the tokenizer does not know"),
        (with_choice(token_ids=[-1, 3]), "sampled id -1, which the tokenizer does not know"),
        (with_choice(token_ids=[13] * 4999 + [3]), "sampled 5000 tokens; --max-tokens is 4"),
        (with_choice(token_ids=[13, 14]), "ended a request with 'stop', but without an EOS at the end"),
        (with_choice(token_ids=[], logprobs={"token_logprobs": []}), "ended a request with 'stop', but without an EOS at the end"),
        (with_choice(finish_reason="length"), "ended a request with 'length', but with an EOS at the end"),
        (with_choice(finish_reason="length", token_ids=[13, 14]), "ended a request with 'length' after 2 of 4 tokens"),
        (with_choice(finish_reason="abort"), "ended a request with 'abort'"),
        (with_choice(finish_reason=["stop"]), "ended a request with"),
        (with_choice(logprobs={"token_logprobs": [-0.5]}), "other than 2 log-probs for 2 tokens"),
        (with_choice(logprobs={"token_logprobs": "-0.5"}), "other than 2 log-probs for 2 tokens"),
        (with_choice(logprobs={"token_logprobs": [-0.5, None]}), "gave None as a log-prob"),
        (with_choice(logprobs={"token_logprobs": ["-0.5", -0.25]}), "gave '-0.5' as a log-prob"),
        (with_choice(logprobs={"token_logprobs": [float("nan"), -0.25]}), "gave nan as a log-prob"),
        (with_choice(logprobs={"token_logprobs": [float("-inf"), -0.25]}), "gave -inf as a log-prob"),
        (with_choice(logprobs={"token_logprobs": [0.5, -0.25]}), "gave 0.5 as a log-prob"),
        (lambda body: (404, {"detail": "Not Found"}), "refused a request: 404 Not Found"),
        (lambda body: (302, b""), "refused a request: 302"),
    ],
)
def test_a_malformed_answer_ends_sampling_with_the_server_and_what_is_wrong(answer, message):
    with FakeVllm(answer) as fake:
        engine = engine_of(fake.url)
        with pytest.raises(EngineError, match=message) as caught:
            sample(engine)
    assert str(caught.value).startswith(f"{fake.url}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("models", [b"hello", b"null", b'{"data": []}', b'{"data": [1]}', b'{"data": [{"id": "m", "root": "m"}]}'])
def test_a_server_of_something_else_is_refused_at_once(models):
    class Other(FakeVllm):
        def __init__(self):
            super().__init__()
            self.http.RequestHandlerClass.do_GET = lambda handler: handler.reply(models)

    with Other() as other, pytest.raises(EngineError, match=f"{other.url}: .*(not JSON|does not answer /v1/models as vLLM does)"):
        engine_of(other.url)


@pytest.mark.parametrize("answer", [b"hello", None, {"choices": [{"logprobs": {"top_logprobs": [{"a": "x", "b": "y"}]}}]}])
def test_the_probe_of_log_probs_refuses_malformed_answers(answer):
    with FakeVllm(lambda body: answer) as fake, pytest.raises(EngineError, match=f"{fake.url}: gave an answer"):
        sample(engine_of(fake.url), params=SamplingParams(0.5, 1.0, 0, 4))


@pytest.mark.parametrize("answer", [b"hello", b"null", b"[]", b'{"success": false}'])
def test_a_prefix_cache_counts_as_dropped_only_if_the_server_says_so(answer, tmp_path):
    with FakeVllm() as fake:
        engine = engine_of(fake.url)
        reply = fake.http.RequestHandlerClass.reply
        fake.http.RequestHandlerClass.reply = lambda handler, content: reply(handler, answer if "reset" in handler.path else content)
        with pytest.raises(EngineError, match=f"{fake.url}: .*(not JSON|did not drop its prefix cache)"):
            engine.load_weights(tmp_path)


def test_no_answer_from_any_server_ends_with_an_error_after_the_timeout():
    release = threading.Event()

    def hang(body):
        release.wait(30)
        return completion(body)

    with FakeVllm(hang) as one, FakeVllm(hang) as other:
        engine = engine_of(one.url, other.url, timeout=1)
        started = time.monotonic()
        with pytest.raises(EngineError, match="no completion in 1 s") as caught:
            sample(engine)
        assert 1 <= time.monotonic() - started < 5
        release.set()
    assert one.url in str(caught.value)
    assert other.url in str(caught.value)


def test_the_timeout_counts_from_the_last_answer_of_any_server():
    turns = iter(range(100))

    def slow(body):
        time.sleep(0.4 * (1 + next(turns)))  # each request waits for the one before, as in a queue
        return completion(body)

    with FakeVllm(slow) as fake:
        assert len(sample(engine_of(fake.url, timeout=1), count=5)) == 5  # 2 seconds in all


def test_a_server_that_keeps_failing_is_given_up_after_the_timeout_with_its_last_message(capfd):
    with FakeVllm(lambda body: (500, {"error": {"message": "out of\nmemory"}})) as fake:
        engine = engine_of(fake.url, timeout=1)
        with pytest.raises(EngineError, match="no completion in 1 s; the last attempt failed: 500 out of memory"):
            sample(engine)
    assert engine.interruptions
    assert f"{fake.url}: 500 out of memory; trying again for 1 s" in capfd.readouterr().err


def test_ids_that_no_token_has_are_masked_and_refused():
    with FakeVllm() as fake:
        sample(engine_of(fake.url, unused=[7, 9]), count=1)
        assert fake.seen[-1][2]["logit_bias"] == {str(index): -100.0 for index in [7, 9, *range(33, 40)]}
        with pytest.raises(EngineError, match="sampled id 13, which the tokenizer does not know"):
            sample(engine_of(fake.url, unused=[13]), count=1)


def test_ids_that_no_token_has_come_from_the_tokenizer(s2d, toy, few, tmp_path):
    """The tokenizer loses a token in the middle of its vocabulary."""
    shutil.copytree(toy / "student", tmp_path / "holes")
    path = tmp_path / "holes" / "tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["18"]  # id 31 is left without a token
    path.write_text(json.dumps(content))
    with FakeVllm(model=str(tmp_path / "holes")) as fake:
        result = s2d("rollout", "-m", tmp_path / "holes", few, *SAMPLING, "--engine", fake.url)
        assert result.code == 0, result.err
        assert [body["logit_bias"] for _, _, body in fake.seen] == [{"31": -100.0}] * 16


def test_a_command_ends_with_one_line_for_a_malformed_answer_and_for_none(s2d, toy, few):
    command = ["rollout", "-m", toy / "student", few, *SAMPLING]
    with FakeVllm(lambda body: None, model=str(toy / "student")) as fake:
        result = s2d(*command, "--engine", fake.url)
    assert (result.code, result.out) == (1, b"")
    assert result.err == f"error: {fake.url}: gave an answer without a completion: None\n"
    with FakeVllm(lambda body: time.sleep(30), model=str(toy / "student")) as fake:
        result = s2d(*command, "--engine", fake.url, "--server-timeout", 1)
    assert (result.code, result.out) == (1, b"")
    assert result.err == f"error: {fake.url}: no completion in 1 s; read the server's log; --server-timeout SECONDS allows more time\n"


def test_a_password_in_a_url_is_sent_and_recorded_nowhere(s2d, toy, few, tmp_path):
    """Neither in rows, manifests of them and of what is made from them, nor on standard error."""
    secrets = ("pa%2Fss", "pa/ss", "someone")
    with FakeVllm(model=str(toy / "student")) as fake:
        engine = ["--engine", f"http://someone:pa%2Fss@{fake.address}/v1,http://someone:pa%2Fss@{fake.address}"]
        results = [
            s2d("rollout", "-m", toy / "student", few, *SAMPLING, *engine, "-v", "-o", tmp_path / "rollouts.jsonl"),
            s2d("verify", tmp_path / "rollouts.jsonl", "-o", tmp_path / "graded.jsonl", "-v"),
            s2d(
                *("opd", "--teacher", toy / "teacher", "--student", toy / "student", few, *SAMPLING, *engine, "-v", "--keep-rollouts"),
                *("--parity-tolerance", 100, "--problems-per-step", 2, "--steps", 1, "-o", tmp_path / "run"),
            ),
            s2d("eval", "-m", tmp_path / "run", few, *SAMPLING[2:], "-k", 2, *engine, "-v", "-o", tmp_path / "eval"),
            s2d("lineage", tmp_path / "run"),
        ]
        sent = {headers["Authorization"] for _, headers, _ in fake.seen}
    assert sent == {"Basic " + base64.b64encode(b"someone:pa/ss").decode()}
    assert [result.code for result in results] == [0] * 5, [result.err for result in results]
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl")}
    assert {path.name for path in written} >= {"rollouts.jsonl.s2d.json", "graded.jsonl.s2d.json", "s2d.json", "metrics.jsonl"}
    manifest = json.loads((tmp_path / "rollouts.jsonl.s2d.json").read_bytes())
    assert manifest["options"]["engine"] == f"{fake.url}/v1,{fake.url}"
    for secret in secrets:
        assert not [path for path, content in written.items() if secret.encode() in content]
        assert not [result for result in results if secret in result.err or secret.encode() in result.out]
    assert read_jsonl(tmp_path / "rollouts.jsonl")[0]["sampler"]["engine"] == "server"


@pytest.mark.parametrize(
    "url",
    [
        "http://bob:hunter2@127.0.0.1:9",  # nobody answers
        "http://bob:hunter/2@127.0.0.1:9",
        "http://bob:1/hunter2@127.0.0.1:9",
        "http://bob:hunter#2@127.0.0.1:9",
        "http://bob:hunter 2@127.0.0.1:9",
        "http://bob:hunter,2@127.0.0.1:9",
        "http://bob:hunter2@127.0.0.1",
        "http://bob:hunter2@127.0.0.1:port",
        "ftp://bob:hunter2@127.0.0.1:9",
        "bob:hunter2@127.0.0.1:9",
        "http://127.0.0.1:9,bob:hunter2@127.0.0.1:9",
    ],
)
def test_no_error_shows_a_password(s2d, toy, few, url):
    result = s2d("rollout", "-m", toy / "student", few, *SAMPLING, "--engine", url, "-v")
    assert result.code in (1, 2)
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert not any(part in result.err for part in ("bob", "hunter", "2@"))


def test_the_api_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "key\n")
    with FakeVllm() as fake:
        sample(engine_of(fake.url), count=1)
        assert fake.seen[-1][1]["Authorization"] == "Bearer key"
        monkeypatch.setenv("VLLM_API_KEY", "one\ntwo")
        with pytest.raises(UsageError, match=r"VLLM_API_KEY holds characters that cannot be sent") as caught:
            engine_of(fake.url)
    assert "two" not in str(caught.value)
