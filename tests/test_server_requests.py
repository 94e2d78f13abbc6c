"""What a server must refuse in a request, by the numbers of the list of faults; after each it still answers."""

from typing import Any

import pytest

from servers import CHAT, HELLO, TEXT, chat_with, one_server, still_answering

server, still_answers = one_server(), still_answering()


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
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"functions": [{}]}, "functions"),
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b{"}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
        "tools[0].function.parameters",
    ),
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
        {"logprobs": 21},
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
        {"response_format": {"type": "text"}, "tool_choice": "auto", "logprobs": False},
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
