"""Who may ask a server and how: hosts, origins, keys, lengths and times; after each refusal it still answers."""

import logging
import time
from typing import Any

import pytest

import mlx_mtp.server.body
import mlx_mtp.server.protocol
from mlx_mtp import ParameterError
from mlx_mtp.server.guards import host_name, is_loopback, make_guard
from mlx_mtp.server.running import listen
from servers import (
    CHAT,
    HOST,
    Running,
    chat_with,
    no_ends,
    one_server,
    read_all,
    serving_demo,
    still_answering,
)

KEY = "a-key-for-tests"


server, still_answers = one_server(), still_answering()


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
