"""`--engine` and the options of engines are checked before anything is loaded."""

import subprocess
import sys

import pytest

from s2dcli.engines import opening
from s2dcli.engines.opening import check_engine
from s2dcli.errors import UsageError
from s2dcli.options import EngineOptions


@pytest.mark.parametrize(
    "engine",
    [
        "auto",
        "transformers",
        "http://gpu1:8000",
        "http://gpu1:8000/",
        "http://gpu1:8000/v1,https://gpu.example.org/team",
        "http://[::1]:8000",
    ],
)
def test_engines_that_exist_pass(engine):
    check_engine(EngineOptions(engine=engine))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vlm"}, r"no such engine: 'vlm' \(did you mean 'vllm'\?\)"),
        ({"engine": ""}, "no such engine: ''"),
        ({"engine": "ftp://gpu1:8000"}, "'ftp://gpu1:8000': URL must begin with http:// or https://"),
        ({"engine": "gpu1:8000"}, "must begin with http://"),
        ({"engine": "http://gpu1:8000, http://gpu2:8000"}, "URL 2 holds a space"),
        ({"engine": "http://gpu1:8000 "}, "holds a space"),
        ({"engine": "http://gpu1:8000,,http://gpu2:8000"}, "URL 2 is empty"),
        ({"engine": "http://gpu1:8000,"}, "URL 2 is empty"),
        ({"engine": "http://gpu1:8000,gpu2:8000"}, "URL 2 must begin with http://"),
        ({"engine": "http://gpu1"}, "names no port; vllm serve listens on 8000 by default"),
        ({"engine": "http://gpu1:0"}, "names no port"),
        ({"engine": "http://gpu1:port"}, "invalid host or port"),
        ({"engine": "http://gpu1:99999"}, "invalid host or port"),
        ({"engine": "http://[::1:8000"}, "invalid host or port"),
        ({"engine": "http://:8000"}, "names no host"),
        ({"engine": "http://gpu1:8000/?key=1"}, "ends in a query or fragment"),
        ({"engine": "transformers", "parity_rows": 2}, "the transformers engine has no --parity-rows"),
        ({"engine": "transformers", "server_timeout": 5}, "the transformers engine has no --server-timeout"),
        ({"engine": "auto", "max_in_flight": 2}, "engine has no --max-in-flight"),
        ({"engine": "http://gpu1:8000", "max_model_len": 64}, "the server engine has no --max-model-len"),
    ],
)
def test_what_no_engine_is_and_what_it_would_ignore_are_usage_errors(options, message):
    with pytest.raises(UsageError, match=message):
        check_engine(EngineOptions(**options))


def test_vllm_must_be_installed(monkeypatch):
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="vLLM, which is not installed; on a GPU host: pip install"):
        check_engine(EngineOptions(engine="vllm"))
    with pytest.raises(UsageError, match="the transformers engine has no --max-model-len"):
        check_engine(EngineOptions(engine="auto", max_model_len=64))


def test_a_trainer_may_not_turn_off_the_parity_gate():
    options = EngineOptions(engine="http://gpu1:8000", parity_rows=0)
    check_engine(options)
    with pytest.raises(UsageError, match="--parity-rows 0"):
        check_engine(options, training=True)


def test_checking_imports_nothing_heavy():
    code = (
        "import sys; from s2dcli.engines.opening import check_engine; from s2dcli.options import EngineOptions; "
        "check_engine(EngineOptions(engine='http://a:1')); "
        "print(sorted({'torch', 'transformers', 'vllm', 'httpx2', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
