"""What happens around a server's requests: full queues, short memory, models that fail, readers who wait or leave."""

import http.client
import json
import logging
import socket
import threading
from typing import Any

import mlx_mtp.server.answering
import mlx_mtp.server.app
from engines import until
from mlx_mtp import Engine, MemoryRefusal
from mlx_mtp.pressure import Guard
from servers import (
    HOST,
    TEXT,
    Reply,
    demo_pair,
    no_ends,
    one_server,
    read_all,
    serving,
    serving_demo,
    still_answering,
)

JSON = {"Content-Type": "application/json"}


server, still_answers = one_server(), still_answering()


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
