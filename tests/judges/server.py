"""A stand-in on loopback for an endpoint that speaks OpenAI's protocol, with faults on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """Replies to each request with what `verdict(question)` gives; `faults` are statuses given before that.

    A fault of 0 is an answer that breaks off; one of 3xx leads to `location`.
    """

    def __init__(self, verdict: Callable[[str], str]) -> None:
        self.verdict = verdict
        self.faults: list[int] = []
        self.location = ""
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append({"path": self.path, **body})
                    endpoint.keys.add(self.headers.get("Authorization"))
                    status = endpoint.faults.pop(0) if endpoint.faults else 200
                content = endpoint.verdict(body["messages"][0]["content"])
                reply = {
                    "choices": [{"message": {"role": "assistant", "content": content}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 2},
                }
                data = json.dumps(reply if status == 200 else {"error": "no"}).encode()
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(data) + 10 * (status == 0)))
                if 300 <= status < 400:
                    self.send_header("Location", endpoint.location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler
