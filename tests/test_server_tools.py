"""Tools over HTTP: calls and thoughts told apart, one at a time, forced, and a client that runs them."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mlx_mtp.prompt import prompt_ids
from mlx_mtp.server.templates import template_of
from scripted_replies import scripted
from servers import HELLO, Running, chat_of, demo_pair, serving_demo
from told_replies import ADD, MULTIPLY, Q, Teller


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Running]:
    """Not compiled, so that choices can be scripted."""
    with serving_demo(compiled=False, max_batch=4, prefix_budget=0) as running:
        yield running


@pytest.fixture
def told(slow_server) -> Iterator[tuple[Running, "Teller"]]:
    with scripted(after=demo_pair().prompt_format.eos_ids[0]) as choice:
        yield slow_server, Teller(choice)


CALLS = (
    f"<|channel>thought\nI add.<channel|>Let me see.<|tool_call>call:add{{a:2,b:{Q}3 é{Q}}}<tool_call|>"
    f"<|tool_call>call:add{{a:[1,{{}}]}}<tool_call|><|tool_response>"
)


@pytest.mark.parametrize("mtp", ["off", 3])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_thoughts_are_told_apart(told, stream, mtp):
    server, teller = told
    teller.tell(11, HELLO, CALLS, tools=[ADD])
    reply = server.chat(tools=[ADD], seed=11, max_tokens=200, stream=stream, mtp=mtp)
    if stream:
        message = {"content": reply.streamed(), "reasoning_content": reply.streamed("reasoning_content")}
        calls: dict[int, dict[str, Any]] = {}
        pieces = 0
        for event in reply.events:
            for delta in event["choices"][0]["delta"].get("tool_calls", ()):
                if "id" in delta:
                    calls[delta["index"]] = {
                        "id": delta["id"],
                        "type": delta["type"],
                        "function": delta["function"],
                    }
                else:
                    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
                    pieces += 1
        message["tool_calls"] = list(calls.values())
        assert pieces > 4, "arguments come as they are written"
        reason = reply.events[-1]["choices"][0]["finish_reason"]
    else:
        message, reason = reply.json["choices"][0]["message"], reply.json["choices"][0]["finish_reason"]
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "I add.")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add", "add"]
    arguments = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
    assert arguments == [{"a": 2, "b": "3 é"}, {"a": [1, {}]}]
    assert len({call["id"] for call in message["tool_calls"]}) == 2 and reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_if_asked(told, stream):
    server, teller = told
    teller.tell(12, HELLO, CALLS, tools=[ADD])
    reply = server.chat(tools=[ADD], seed=12, max_tokens=200, stream=stream, parallel_tool_calls=False)
    text = reply.body.decode()
    assert text.count('"name":"add"') == 1 and '"finish_reason":"tool_calls"' in text


def test_without_tools_a_call_is_text(told):
    server, teller = told
    teller.tell(13, HELLO, CALLS)
    for fields in ({}, {"tools": [ADD], "tool_choice": "none"}):
        message = server.chat(seed=13, max_tokens=200, **fields).json["choices"][0]["message"]
        assert "tool_calls" not in message and "<|tool_call>call:add{a:2" in message["content"]


def test_a_client_that_runs_tools(told):
    """OpenAI's client, its streaming helper included: it calls, is called, runs the function and asks again."""
    server, teller = told
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)
    messages: list[Any] = chat_of("What is 2 + 3?")
    teller.tell(14, messages, "<|tool_call>call:add{a:2,b:3}<tool_call|><|tool_response>", tools=[ADD])
    asked = {"model": "demo", "tools": [ADD], "seed": 14, "max_tokens": 200}
    with client.chat.completions.stream(messages=messages, **asked) as stream:
        for _ in stream:
            pass
        first = stream.get_final_completion().choices[0].message
    [call] = first.tool_calls
    result = sum(json.loads(call.function.arguments).values())
    messages += [
        {
            "role": "assistant",
            "content": first.content,
            "tool_calls": [call.model_dump(include={"id", "type", "function"})],
        },
        {"role": "tool", "tool_call_id": call.id, "content": str(result)},
    ]
    plain = json.loads(json.dumps(messages))
    plain[-1]["name"] = "add"
    rendered = demo_pair().prompt_format.tokenizer
    ids = prompt_ids(demo_pair().prompt_format, plain, tools=[ADD]).ids
    mark = ids.index(rendered.token_id("<|tool_response>"))
    assert rendered.decode(ids[mark:]).startswith("response:add{value:5")
    teller.tell(14, plain, "It is 5.", tools=[ADD])
    second = client.chat.completions.create(messages=messages, **asked)
    assert second.choices[0].message.content == "It is 5." and second.choices[0].finish_reason == "stop"
    assert template_of(demo_pair().prompt_format).takes_tool_role


NAMED = {"type": "function", "function": {"name": "add"}}
CLOSED = "<tool_call|><|tool_response>"


def calls_of(reply: Any) -> list[tuple[str, Any]]:
    """Name and arguments of each call, whole or streamed."""
    if reply.body.startswith(b"{"):
        calls = reply.json["choices"][0]["message"].get("tool_calls", [])
        return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    deltas = [call for event in reply.events for call in event["choices"][0]["delta"].get("tool_calls", ())]
    names = [call["function"]["name"] for call in deltas if "id" in call]
    return [
        (name, json.loads("".join(one["function"]["arguments"] for one in deltas if one["index"] == at)))
        for at, name in enumerate(names)
    ]


@pytest.mark.parametrize("mtp", ["off", 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_once(told, stream, mtp):
    server, teller = told
    begun = "<|tool_call>call:add{"
    teller.tell(
        21,
        HELLO,
        f"a:2,b:3}}<tool_call|><|tool_call>call:multiply{{a:1}}{CLOSED}",
        begun=begun,
        tools=[ADD, MULTIPLY],
    )
    asked = {"tools": [ADD, MULTIPLY], "seed": 21, "max_tokens": 200, "stream": stream, "mtp": mtp}
    reply = server.chat(tool_choice=NAMED, **asked)
    assert calls_of(reply) == [("add", {"a": 2, "b": 3})]
    assert '"finish_reason":"tool_calls"' in reply.body.decode()


@pytest.mark.parametrize("stream", [False, True])
def test_some_function_is_called_where_one_is_required(told, stream):
    server, teller = told
    tools, asked = (
        [ADD, MULTIPLY],
        {"seed": 22, "max_tokens": 200, "stream": stream, "tool_choice": "required"},
    )
    teller.tell(
        22,
        HELLO,
        f"multiply{{a:2}}<tool_call|><|tool_call>call:add{{}}{CLOSED}",
        begun="<|tool_call>call:",
        tools=tools,
    )
    assert calls_of(server.chat(tools=tools, **asked)) == [("multiply", {"a": 2}), ("add", {})]
    assert calls_of(server.chat(tools=tools, parallel_tool_calls=False, **asked)) == [("multiply", {"a": 2})]
    teller.tell(22, HELLO, f"a:2}}{CLOSED}", begun="<|tool_call>call:add{", tools=[ADD])
    reply = server.chat(tools=[ADD], **asked)
    assert calls_of(reply) == [("add", {"a": 2})], "where there is one it is named at once"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_is_all_where_one_round_gives_several_and_the_end(told, stream):
    """Whatever round the first call ends in: in some of these both calls and the end come at once."""
    server, teller = told
    two, broken = (
        "<|tool_call>call:add{}<tool_call|>" * 2,
        "<|tool_call>call:add{}<tool_call|><|tool_call>call:x",
    )
    for drafts, text in itertools.product((0, 5, 8, 11, 15), (two, broken)):
        teller.tell(24, HELLO, f"{text}<|tool_response>", tools=[ADD])
        asked = {"seed": 24, "max_tokens": 200, "stream": stream, "mtp": drafts or "off"}
        both, one = (server.chat(tools=[ADD], parallel_tool_calls=many, **asked) for many in (True, False))
        assert len(calls_of(both)) == (2 if text == two else 1) and calls_of(one) == [("add", {})], drafts
        assert "call:x" not in one.body.decode(), drafts
        assert '"finish_reason":"tool_calls"' in one.body.decode().replace(": ", ":"), drafts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text", ["add<|channel>", "divide{a:1}" + CLOSED, "add{a:1", "add{a:1<|tool_response>", "I'd rather not."]
)
def test_a_forced_call_that_does_not_come_is_an_error(told, text, stream):
    server, teller = told
    teller.tell(23, HELLO, text, begun="<|tool_call>call:", tools=[ADD, MULTIPLY])
    reply = server.chat(tools=[ADD, MULTIPLY], tool_choice="required", seed=23, max_tokens=200, stream=stream)
    error = next(event for event in reply.events if "error" in event)["error"] if stream else reply.error
    assert error["code"] == "no_tool_call" and error["type"] == "server_error"
    assert stream or reply.status == 500
    assert server.chat(seed=24).status == 200


def test_a_forced_call_that_is_cut_off_says_so(told):
    server, teller = told
    teller.tell(25, HELLO, "a:22222222222222", begun="<|tool_call>call:add{", tools=[ADD])
    choice = server.chat(tools=[ADD], tool_choice=NAMED, seed=25, max_tokens=6).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"a":')


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": NAMED},
        {"tool_choice": "sometimes", "tools": [ADD]},
        {"tool_choice": {"type": "function"}, "tools": [ADD]},
        {"tool_choice": {"type": "allowed_tools"}, "tools": [ADD]},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": [ADD]},
    ],
)
def test_a_choice_that_cannot_be_is_refused(told, fields):
    server, _ = told
    reply = server.chat(**fields)
    assert reply.status == 400 and reply.error["param"] == "tool_choice"


def test_openais_client_forces_a_call(told):
    server, teller = told
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)
    teller.tell(26, HELLO, f"a:4,b:{Q}x{Q}}}{CLOSED}", begun="<|tool_call>call:add{", tools=[ADD])
    reply = client.chat.completions.create(
        model="demo", messages=HELLO, tools=[ADD], tool_choice=NAMED, seed=26, max_tokens=50
    )
    [call] = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"a": 4, "b": "x"}
    assert reply.usage.prompt_tokens > 0 and reply.choices[0].finish_reason == "tool_calls"
