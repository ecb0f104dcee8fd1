"""A stand-in for `vllm serve` that answers what a test wants: malformed completions, failures, nothing at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EOS = 3
COMPLETION = [13, EOS]  # ids of the toy tokenizer


def completion(body: dict, **changes: Any) -> dict:
    """A well-formed answer to a completion request, but for `changes` of its only choice."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": COMPLETION,
        "prompt_token_ids": body["prompt"],
        "logprobs": {"token_logprobs": [-0.5, -0.25]},
    }
    return {"choices": [{**choice, **changes}]}


class FakeVllm:
    """Serves on a free port of this machine from entering to leaving it.

    `answer(body of a completion request)` returns JSON content, or bytes to be sent as they are, with the status if
    it is not 200. `seen` lists (path, headers, body) of all requests.
    """

    def __init__(self, answer: Callable[[dict], Any] = completion, model: str = "student") -> None:
        self.answer, self.model = answer, model
        self.seen: list[tuple[str, dict, dict]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply({"data": [{"id": fake.model, "root": fake.model, "max_model_len": 64}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
                fake.seen.append((self.path, dict(self.headers), body))
                if self.path == "/v1/completions":
                    self.reply(fake.answer(body))
                else:
                    self.reply(fake.command(self.path, body))

            def reply(self, content: Any) -> None:
                status, content = content if isinstance(content, tuple) else (200, content)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"127.0.0.1:{self.http.server_port}"
        self.url = f"http://{self.address}"

    def command(self, path: str, body: dict) -> Any:
        """Return the answer to a request for something else than a completion."""
        return {"success": True}

    def __enter__(self) -> FakeVllm:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
