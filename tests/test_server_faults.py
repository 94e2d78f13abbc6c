"""What a server must refuse or survive, by the numbers of the list of faults; after each it still answers."""

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mlx_mtp.server.answering
import mlx_mtp.server.body
import mlx_mtp.server.protocol
from mlx_mtp import Engine, MemoryRefusal, ParameterError
from mlx_mtp.pressure import Guard
from mlx_mtp.server.guards import host_name, is_loopback, make_guard
from mlx_mtp.server.running import listen
from servers import (
    CHAT,
    HELLO,
    HOST,
    TEXT,
    Reply,
    Running,
    demo_pair,
    no_ends,
    read_all,
    serving,
    serving_demo,
    until,
)

KEY = "a-key-for-tests"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving_demo(max_batch=4, max_queue=8) as running:
        yield running


@pytest.fixture(autouse=True)
def still_answers(server) -> Iterator[None]:
    """One bad request never harms the next."""
    yield
    assert server.chat(max_tokens=3).status == 200


def chat_with(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": 4, **fields}


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/never-fetched.png"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
BAD_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    # 31 to 33, 37 to 39, 41: what is asked
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "half \ud800"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL]}]}, "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": "f"}]}, "messages"),
    # 43 to 50: how it is to be written
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": "4"}, "max_completion_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),
    ({"presence_penalty": 1e9}, "presence_penalty"),
    ({"frequency_penalty": -1e9}, "frequency_penalty"),
    ({"logit_bias": {"99999999": 1}}, None),
    ({"logit_bias": {"4096": 1}}, None),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1e9}}, "logit_bias"),
    ({"logit_bias": {"1": None}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"mtp": 100}, "mtp"),
    ({"mtp": "fast"}, "mtp"),
    ({"mtp": 1.5}, "mtp"),
    ({"mtp": False}, "mtp"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 3}, "stream_options"),
    ({"model": 3}, "model"),
    # What cannot be honoured is never left out in silence.
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"functions": [{}]}, "functions"),
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b{"}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
        "tools[0].function.parameters",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
    ({"chat_template_kwargs": {"enable_thinking": 3}}, "enable_thinking"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"modalities": ["audio"]}, "modalities"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:60])
def test_a_field_that_is_wrong_is_named(server, fields, param):
    reply = server.post(CHAT, chat_with(**fields))
    assert reply.status == 400, reply.body
    error = reply.error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [""]},
        {"prompt": {"a": 1}},
        {"prompt": ["a", 1]},
        {"prompt": [99999999]},
        {"prompt": [-1]},
        {"prompt": [True]},
        {"prompt": ["a"] * 17},
        {"prompt": ["a"] * 9, "n": 2},
        {"prompt": "half \ud800"},
        {"suffix": "x"},
        {"echo": True},
        {"best_of": 2},
        {"logprobs": 0},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_text_completion_that_cannot_be(server, fields):
    assert (
        server.post(TEXT, {"prompt": "x", "max_tokens": 2, **fields}).error["type"] == "invalid_request_error"
    )


def test_what_is_odd_and_allowed(server):
    """32, 38, 45, 50: blanks, typed control tokens, a top_k beyond the vocabulary, any seed, null for nothing."""
    for fields in (
        {"messages": [{"role": "user", "content": "  \n"}]},
        {"messages": [{"role": "user", "content": "<|turn>model\n<turn|>\0"}]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *HELLO]},
        {"top_k": 10**9},
        {"seed": -5},
        {"seed": 2**63},
        {"temperature": 1e-45},
        {"temperature": 1e-300},
        {"top_p": 5e-324},
        {"max_tokens": 10**12, "stop": ["a", "e", "i", "L"], "temperature": 0},
        dict.fromkeys(("model", "stop", "n", "temperature", "tools", "stream", "seed", "mtp", "logit_bias")),
    ):
        assert server.post(CHAT, chat_with(**fields)).status == 200, fields


def test_a_prompt_beyond_the_context_has_the_code_that_clients_know(server):
    error = server.post(CHAT, chat_with(messages=[{"role": "user", "content": "word " * 5000}])).error
    assert error["code"] == "context_length_exceeded" and "maximum context length" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_76_bodies_that_are_no_json_object(server, body):
    reply = server.post(CHAT, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")


def test_numbers_that_overflow_are_refused(server):
    assert (
        server.post(CHAT, b'{"messages": [{"role":"user","content":"x"}], "temperature": 1e999}').status
        == 400
    )


def status_line(data: bytes) -> bytes:
    return data.split(b"\r\n", 1)[0]


def ask_raw(server: Running, head: str, body: bytes = b"") -> bytes:
    return status_line(read_all(server.raw(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)))


def test_77_lengths(server, monkeypatch):
    head = f"POST {CHAT} HTTP/1.1\nHost: {HOST}\nContent-Type: application/json\nConnection: close"
    assert b" 411 " in ask_raw(server, head)
    assert b" 400 " in ask_raw(server, head + "\nContent-Length: -1")
    assert b" 400 " in ask_raw(server, head + "\nContent-Length: x")
    assert b" 400 " in ask_raw(server, head + "\nContent-Length: 5\nContent-Length: 6", b"{}")
    assert b" 413 " in ask_raw(server, head + f"\nContent-Length: {10**18}")
    monkeypatch.setattr(mlx_mtp.server.body, "LARGEST_BODY", 1000)
    chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"
    assert b" 413 " in ask_raw(server, head + "\nTransfer-Encoding: chunked", chunk)
    small = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":2}'
    chunked = b"%x\r\n" % len(small) + small + b"\r\n0\r\n\r\n"
    assert b" 200 " in ask_raw(server, head + "\nTransfer-Encoding: chunked", chunked)
    assert b" 431 " in ask_raw(server, head + "\nX: " + "x" * 40_000)
    unfinished = server.raw(f"GET /health HTTP/1.1\r\nHost: {HOST}\r\nX: ".encode() + b"x" * 66_000)
    assert b" 400 " in status_line(read_all(unfinished))
    assert b" 400 " in ask_raw(server, "".join(["nonsense"] * 3))


def test_40_a_paste_of_100_mb_is_refused_at_once(server):
    began = time.monotonic()
    reply = server.post(CHAT, b" " * (100 << 20))
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    assert time.monotonic() - began < 10


def test_78_who_is_slow_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(mlx_mtp.server.body, "BODY_WITHIN_S", 0.3)
    monkeypatch.setattr(mlx_mtp.server.protocol, "HEADERS_WITHIN_S", 0.3)
    head = f"POST {CHAT} HTTP/1.1\nHost: {HOST}\nContent-Type: application/json\nContent-Length: 100"
    assert b" 408 " in ask_raw(server, head, b'{"mess')
    assert read_all(server.raw(b"")) == b""
    assert read_all(server.raw(b"POST / HTTP/1.1\r\nHos")) == b""
    kept = server.raw(f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n\r\nGET /hea".encode())
    assert read_all(kept).count(b"HTTP/1.1 200") == 1
    # A reply that takes longer than this is not cut.
    long = server.chat(max_tokens=60, logit_bias=no_ends(), stream=True)
    assert long.events[-1]["choices"][0]["finish_reason"] == "length"


def test_80_hosts_and_origins(server):
    for host in (f"{HOST}:{server.port}", "localhost", "LOCALHOST:1", "[::1]:80"):
        assert server.get("/health", Host=host).status == 200
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.",
        "",
        "[::2]",
        "10.0.0.1",
        "evil@localhost",
    ):
        assert server.get("/health", Host=host).error["code"] == "host", host
    for origin in ("http://evil.example", "null", f"http://{HOST}:{server.port}", ""):
        reply = server.post(CHAT, chat_with(), Origin=origin)
        assert (reply.status, reply.error["code"]) == (403, "origin")
        assert "access-control-allow-origin" not in reply.headers
    assert server.request("OPTIONS", CHAT, headers={"Origin": "http://evil.example"}).status == 403
    assert server.request("OPTIONS", CHAT).status == 405


def test_80_what_was_allowed():
    with serving_demo(hosts=["my.box"], origins=["http://app.example"], keys=[KEY]) as running:
        assert running.get("/health", Host="my.box:99").status == 200
        asks = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
        before = running.request(
            "OPTIONS", CHAT, headers=asks | {"Access-Control-Request-Headers": "authorization"}
        )
        assert (before.status, before.headers["access-control-allow-origin"]) == (200, "http://app.example")
        reply = running.post(CHAT, chat_with(), Origin="http://app.example", Authorization=f"Bearer {KEY}")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "http://app.example")
        assert (
            running.request("OPTIONS", CHAT, headers=asks | {"Origin": "http://evil.example"}).status == 403
        )
        assert running.post(CHAT, chat_with(), Origin="http://app.example").status == 401


def test_81_keys():
    with serving_demo(keys=[KEY, "another-key-here"]) as running:
        for headers in (
            {},
            {"Authorization": "Bearer wrong-key-wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": "Bearer"},
            {"X-Api-Key": "ÿ"},
        ):
            reply = running.get("/v1/models", **headers)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert KEY not in reply.body.decode() and reply.headers["www-authenticate"] == "Bearer"
        for headers in (
            {"Authorization": f"bearer {KEY}"},
            {"X-Api-Key": KEY},
            {"Authorization": "Bearer another-key-here"},
        ):
            assert running.get("/v1/models", **headers).status == 200
        assert running.get("/health").status == 200
        assert running.get("/openapi.json").status == running.get("/nothing").status == 401


def test_only_loopback_is_open_without_a_key():
    assert not is_loopback("0.0.0.0") and not is_loopback("::") and not is_loopback("my.box")
    assert is_loopback("127.8.9.1") and is_loopback("::1") and is_loopback("localhost")
    for host in ("0.0.0.0", "192.168.1.2", "my.box", "::"):
        with pytest.raises(ParameterError, match="--key-file"):
            make_guard(host)
        assert make_guard(host, keys=[KEY]).keys
    for key in ("short", "with blank inside", "ключ-ключ-ключ"):
        with pytest.raises(ParameterError):
            make_guard(HOST, keys=[key])
    assert host_name("[::1]:80") == "::1" and host_name("a:1") == "a" and host_name("") == ""


@pytest.mark.parametrize(
    "model", ["other", "../demo", "/etc", "./demo", "demo/../demo", "org/name", "DEMO", "", "\ud800"]
)
def test_82_other_models_are_not_looked_for(server, model, monkeypatch):
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr("mlx_mtp.pair.load", never)
    reply = server.post(CHAT, chat_with(model=model))
    assert (reply.status, reply.error["code"]) == (404, "model_not_found")


def test_83_a_port_that_is_taken(server):
    with pytest.raises(ParameterError, match="cannot be used"):
        listen(HOST, server.port)
    with pytest.raises(ParameterError, match="no address"):
        listen("no.such.host.invalid", 0)


def test_61_and_84_a_full_queue_says_when_to_come_back(server):
    """200 at once: 4 run, 8 wait, the others are told so; nobody gets nothing."""
    replies: list[Reply | None] = [None] * 200

    def ask(at: int) -> None:
        replies[at] = server.text(max_tokens=3)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(replies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = {reply.status for reply in replies}
    assert statuses <= {200, 429} and 429 in statuses and 200 in statuses
    text = server.text(max_tokens=3).json["choices"][0]["text"]
    for reply in replies:
        if reply.status == 429:
            assert reply.error["type"] == "rate_limit_error" and int(reply.headers["retry-after"]) > 0
        else:
            assert reply.json["choices"][0]["text"] == text


def test_some_answers_of_a_full_queue_are_all_taken_back():
    with serving_demo(max_batch=1, max_queue=2) as running:
        own = running.open_stream()
        assert running.chat(n=5).status == 429
        until(lambda: running.engine.status.waiting == 0)
        own.close()


def test_62_memory_that_gets_short(server, monkeypatch):
    asked = {"max_tokens": 200, "logit_bias": no_ends()}
    monkeypatch.setattr(Guard, "relief", lambda self: "stop")
    reply = server.chat(**asked)
    assert (reply.status, reply.error["code"]) == (500, "generation") and "memory" in reply.error["message"]
    streamed = server.chat(**asked, stream=True)
    assert streamed.status in (200, 500, 503) and "error" in streamed.body.decode()

    def refused(self: Guard, needed: int) -> None:
        raise MemoryRefusal("this prompt does not fit; shorten it")

    monkeypatch.setattr(Guard, "relief", lambda self: "none")
    monkeypatch.setattr(Guard, "admit", refused)
    for stream in (False, True):
        reply = server.chat(messages=[{"role": "user", "content": "something new " * 9}], stream=stream)
        assert (reply.status, reply.error["code"]) == (503, "memory")
    monkeypatch.undo()


def test_63_out_of_memory_and_whatever_else_breaks(server, monkeypatch, caplog):
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes which is greater than ...")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_mtp.batch_slots.decode", broken)
        reply = server.chat()
        assert reply.status in (500, 503) and reply.error["code"] in ("memory", "generation")
        events = server.chat(stream=True)
        assert "error" in events.body.decode() and "Traceback" not in events.body.decode()
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(mlx_mtp.server.app, "answer", broken)
        reply = server.chat()
        assert (reply.status, reply.error["code"]) == (
            500,
            "internal",
        ) and "malloc" not in reply.body.decode()


def test_85_a_model_that_is_loaded_or_has_failed(monkeypatch, tmp_path):
    may_load = threading.Event()

    def waits(*args: Any, **options: Any) -> Any:
        may_load.wait(30)
        return demo_pair()

    monkeypatch.setattr("mlx_mtp.engine.load", waits)
    with Engine("demo", wait=False) as engine, serving(engine) as running:
        health, chat = running.get("/health"), running.chat()
        assert (health.status, chat.status, chat.error["code"]) == (503, 503, "loading")
        assert running.get("/v1/models").status == 200 and "retry-after" in chat.headers
        may_load.set()
        engine.wait_ready()
        assert running.get("/health").status == 200 and running.chat().status == 200

    def dies(self: Any, *args: Any) -> None:
        raise SystemExit("somebody ended the thread")

    with Engine(demo_pair()) as engine, serving(engine) as running:
        monkeypatch.setattr("mlx_mtp.batch.Batch.run", dies)
        assert running.chat().status == 503
        until(lambda: not running.server.started or running.server.service.is_closing)
        monkeypatch.undo()


def _ours(caplog):
    """What the program and its HTTP library logged so far."""
    records = list(caplog.records)
    return [record.getMessage() for record in records if record.name.startswith(("mlx_mtp", "uvicorn"))]


def test_nothing_of_a_prompt_is_logged(server, caplog):
    secret = "xyzzy-a-secret"
    with caplog.at_level(logging.DEBUG):
        server.chat(messages=[{"role": "user", "content": secret}])
        server.chat(messages=[{"role": "user", "content": secret}], temperature=-1)
        server.get(f"/nothing?{secret}\x1b[2J".replace("\x1b", "%1b"))
        # A line is written after its answer was sent.
        end = time.monotonic() + 10
        while len(mine := _ours(caplog)) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(mine) >= 3 and not any(secret in line or "\x1b" in line for line in mine)


def test_a_client_that_reads_headers_only_gets_them_before_the_text(server):
    """A slow prefill must not look like a dead server."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=30)
    body = json.dumps({"prompt": "def f", "stream": True, "max_tokens": 1500, "logit_bias": no_ends()})
    connection.request("POST", TEXT, body, JSON)
    assert connection.getresponse().getheader("content-type").startswith("text/event-stream")
    assert isinstance(connection.sock, socket.socket)
    connection.close()
    until(lambda: server.engine.status.running == 0)


def test_a_stream_with_nothing_to_say_says_that_it_lives(server, monkeypatch):
    monkeypatch.setattr(mlx_mtp.server.answering, "HEADERS_WITHIN_S", 0.05)
    monkeypatch.setattr(mlx_mtp.server.answering, "ALIVE_EVERY_S", 0.05)
    others = [server.open_stream() for _ in range(4)]
    body = json.dumps({"prompt": "def g", "stream": True, "max_tokens": 2}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    waiting = server.raw(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    data = b""
    while b": alive" not in data:
        data += waiting.recv(65536)
    for other in others:
        other.close()
    assert b"[DONE]" in data + read_all(waiting)
