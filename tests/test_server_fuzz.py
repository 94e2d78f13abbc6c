"""Anything at all sent to the server: an answer comes, in time, in JSON, without Python's insides, and it goes on.

The longer fuzzing, schemathesis on the file of the interface, needs packages of its own: docs/server.md.
"""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servers import CHAT, HELLO, HOST, TEXT, Running, read_all, serving_demo

LATE_S = 20.0
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = [
    *("model", "messages", "prompt", "stream", "stream_options", "n", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias"),
    *("mtp", "tools", "tool_choice", "parallel_tool_calls", "response_format", "thinking", "logprobs"),
    *("max_completion_tokens", "chat_template_kwargs", "reasoning_effort", "modalities", "echo", "best_of"),
]
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "developer", "model"])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES | JUNK, "content": st.text(max_size=30) | JUNK},
    optional={"tool_calls": JUNK, "name": JUNK, "tool_call_id": JUNK},
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 2**64, 5e-324, 1e308, 1e-45])
USUAL = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 3), "messages": st.just(HELLO), "prompt": st.just("x")},
)
ODD = st.dictionaries(st.sampled_from(NAMES), NUMBERS | JUNK, max_size=3) | st.fixed_dictionaries(
    {}, optional={"messages": st.lists(MESSAGE, max_size=3), "prompt": st.text(max_size=20)}
)
BODY = st.builds(lambda usual, odd: usual | odd, USUAL, ODD)
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving_demo(max_context=128, max_tokens=3) as running:
        yield running


def check(status: int, body: bytes, content_type: str) -> None:
    assert status in (200, 400, 404), (status, body)
    assert b"Traceback" not in body and b"site-packages" not in body
    if "event-stream" in content_type:
        assert body.rstrip().endswith(b"data: [DONE]")
    elif status == 200:
        assert json.loads(body)["choices"]
    else:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(body=BODY, path=st.sampled_from([CHAT, TEXT]))
def test_json_of_any_kind(server, body: dict[str, Any], path: str):
    began = time.monotonic()
    reply = server.post(path, body)
    check(reply.status, reply.body, reply.headers["content-type"])
    assert time.monotonic() - began < LATE_S


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@given(body=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_for_a_body(server, body: bytes):
    reply = server.post(CHAT, body)
    check(reply.status, reply.body, reply.headers["content-type"])


PIECES = st.sampled_from(
    [
        *(
            b"GET ",
            b"POST ",
            b"HEAD ",
            b"OPTIONS ",
            b"/health",
            CHAT.encode(),
            b"/v1/models/",
            b"*",
            b"//",
            b"%00",
        ),
        *(
            b" HTTP/1.1\r\n",
            b" HTTP/1.0\r\n",
            b" HTTP/9.9\r\n",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"Host: localhost\r\n",
        ),
        *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n"),
        *(
            b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
            b"0\r\n\r\n",
            b"{}",
            b"\x00\xff",
            b"\x16\x03\x01",
        ),
        b"Content-Type: application/json\r\n",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(pieces=st.lists(PIECES, max_size=12))
def test_bytes_for_a_connection(server, pieces: list[bytes]):
    """Whatever comes, the connection ends once the client has said all, and the next request is answered."""
    own = server.raw(b"".join(pieces))
    own.settimeout(LATE_S)
    own.shutdown(socket.SHUT_WR)
    answer = read_all(own)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert b"Traceback" not in answer
    assert server.get("/health", Host=HOST).status == 200
