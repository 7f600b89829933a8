"""HTTP for the stand-in: which request is which, who may ask, and faults on the way."""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/models/{_REPO}"
ROUTES = [
    (method, name, re.compile(path))
    for method, name, path in (
        ("GET", "whoami", r"/api/whoami-v2"),
        ("POST", "create", r"/api/repos/create"),
        ("POST", "yaml", r"/api/validate-yaml"),
        ("POST", "branch", rf"{_API}/branch/(?P<revision>[^/]+)"),
        ("GET", "tree", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?"),
        ("POST", "preupload", rf"{_API}/preupload/(?P<revision>[^/]+)"),
        ("POST", "commit", rf"{_API}/commit/(?P<revision>[^/]+)"),
        ("GET", "info", rf"{_API}(/revision/(?P<revision>[^/]+))?"),
        ("POST", "batch", rf"/{_REPO}\.git/info/lfs/objects/batch"),
        ("PUT", "upload", r"/lfs/(?P<oid>[0-9a-f]{64})"),
        ("GET", "resolve", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    )
]
CHANGES = ("create", "branch", "preupload", "commit", "batch")


class Refusal(Exception):
    """An answer other than 200: its status and message."""

    def __init__(self, status: int, message: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Request:
    """One request as it came in."""

    route: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def handler(hub: Any) -> type[BaseHTTPRequestHandler]:
    """Gives each request to the method of `hub` that has the name of its route."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer is one packet

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            path = urlsplit(self.path).path
            method = "GET" if self.command == "HEAD" else self.command
            found = (
                (name, match) for asked, name, route in ROUTES if asked == method and (match := route.fullmatch(path))
            )
            route, match = next(found, ("unknown", None))
            fault = next(hub.faults[route]) if route in hub.faults else None
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "cut":
                self.rfile.read(length // 2)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            body = self.rfile.read(length)
            hub.requests.append(Request(route, self.command, self.path, dict(self.headers), body))
            if isinstance(fault, tuple):
                time.sleep(fault[1])
            try:
                if isinstance(fault, int):
                    raise Refusal(fault, "a fault")
                if match is None:
                    raise Refusal(404, "no such route")
                self.check(route)
                parts = {name: value and unquote(value) for name, value in match.groupdict().items()}
                self.give(getattr(hub, route)(**parts, body=body[:-1] if fault == "hash" else body))
            except Refusal as refusal:
                self.reply(refusal.status, refusal.message.encode(), message=refusal.message, code=refusal.code)

        def do(self) -> None:
            with suppress(ConnectionError):  # the client is gone
                self.answer()

        do_GET = do_HEAD = do_POST = do_PUT = do

        def check(self, route: str) -> None:
            if route in ("upload", "resolve"):
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token not in hub.tokens:
                raise Refusal(401, "Invalid credentials in Authorization header")
            if route in CHANGES and not hub.may_write:
                raise Refusal(403, "You do not have the rights")

        def give(self, answer: Any) -> None:
            if isinstance(answer, tuple):
                file, headers = answer
                self.reply(200, file.read_bytes(), **headers)
            else:
                self.reply(200, json.dumps(answer).encode())

        def reply(self, status: int, body: bytes, message: str = "", code: str = "", **headers: str) -> None:
            self.send_response(status)
            if code:
                headers["X-Error-Code"] = code
            if message and not message.startswith("{"):
                headers["X-Error-Message"] = message
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
