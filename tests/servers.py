"""Our server in this process, on a free port of loopback, and requests to it as bytes or JSON."""

import functools
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from engines import until
from mlx_mtp import Engine, load
from mlx_mtp.pair import Pair
from mlx_mtp.round import Rounds
from mlx_mtp.server.app import Service
from mlx_mtp.server.guards import make_guard
from mlx_mtp.server.running import Server, listen

WITHIN_S = 30.0
HOST = "127.0.0.1"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is MLX?"}]


@functools.cache
def demo_pair(max_context: int = 2048, compiled: bool = True) -> Pair:
    pair = replace(load("demo"), max_context=max_context)
    if not compiled:
        pair = replace(pair, rounds=Rounds(pair.target, pair.drafter, compiled=False))
    return pair


def chat_of(words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": words}]


def chat_with(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 4, **fields}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has exactly OpenAI's fields and no word of Python's insides."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in error["message"] and 'File "' not in error["message"]
        return error

    @property
    def events(self) -> list[Any]:
        """Server-sent events, the last one [DONE], which is left out."""
        lines = [line for line in self.body.decode().split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def streamed(self, name: str = "content", at: int = 0) -> str:
        """One choice's text, put together."""
        choices = [choice for event in self.events for choice in event["choices"] if choice["index"] == at]
        return "".join(choice.get("delta", choice).get(name) or "" for choice in choices)


@dataclass(slots=True)
class Running:
    """A server that runs."""

    server: Server
    engine: Engine
    port: int

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=WITHIN_S)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, value: Any, **headers: str) -> Reply:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.request("POST", path, body, {"Content-Type": "application/json", **headers})

    def chat(self, **fields: Any) -> Reply:
        return self.post(CHAT, {"messages": HELLO, "max_tokens": 8, "temperature": 0, **fields})

    def text(self, **fields: Any) -> Reply:
        return self.post(TEXT, {"prompt": "def f", "max_tokens": 8, "temperature": 0, **fields})

    def raw(self, data: bytes) -> socket.socket:
        """A connection to which `data` was sent."""
        own = socket.create_connection((HOST, self.port), timeout=WITHIN_S)
        own.sendall(data)
        return own

    def open_stream(self, **fields: Any) -> socket.socket:
        """A streamed reply whose first bytes have come."""
        value = {"prompt": "def f", "max_tokens": 1500, "stream": True, "logit_bias": no_ends(), **fields}
        body = json.dumps(value).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        own = self.raw(head.encode() + b"\r\n\r\n" + body)
        while b"data:" not in own.recv(65536):
            pass
        return own


def no_ends() -> dict[str, float]:
    """A bias with which the demo pair writes on."""
    return {str(id): -100.0 for id in demo_pair().prompt_format.eos_ids}


def read_all(own: socket.socket) -> bytes:
    """Until the server closes."""
    parts = []
    with own:
        while part := own.recv(65536):
            parts.append(part)
    return b"".join(parts)


@contextmanager
def serving(
    engine: Engine, *, model: str = "demo", grace_s: float = 5.0, **service: Any
) -> Iterator[Running]:
    """The server on a thread of its own; `hosts`, `origins` and `keys` are the guard's."""
    guard = make_guard(
        HOST,
        keys=service.pop("keys", ()),
        allowed_hosts=service.pop("hosts", ()),
        origins=service.pop("origins", ()),
    )
    own = listen(HOST, 0)
    server = Server(Service(engine, model, guard, **service), grace_s=grace_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(server, engine, own.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(WITHIN_S)
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def serving_demo(*, max_context: int = 2048, compiled: bool = True, **options: Any) -> Iterator[Running]:
    """The demo pair, served; options of the engine and of `serving`."""
    names = ("max_batch", "max_queue", "memory_budget", "prefix_budget")
    engine_options = {name: options.pop(name) for name in names if name in options}
    with Engine(demo_pair(max_context, compiled), **engine_options) as engine:
        with serving(engine, **options) as running:
            yield running


def one_server() -> Any:
    """A fixture: one server for all tests of a module."""

    @pytest.fixture(scope="module")
    def server() -> Iterator[Running]:
        with serving_demo(max_batch=4, max_queue=8) as running:
            yield running

    return server


def still_answering() -> Any:
    """A fixture for every test of a module: one bad request never harms the next."""

    @pytest.fixture(autouse=True)
    def still_answers(server: Running) -> Iterator[None]:
        yield
        assert server.chat(max_tokens=3).status == 200

    return still_answers
