"""What clients get: OpenAI's own client and plain requests, whole and streamed, against the library's own texts."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from mlx_mtp import Sampling, generate, generate_batch
from mlx_mtp.prompt import prompt_ids
from mlx_mtp.server.templates import template_of
from scripted_replies import ScriptedChoice, scripted
from servers import CHAT, HELLO, Running, demo_pair, no_ends, read_all, serving_demo, until

WORDS = ["What is MLX?", "What is MTP?", "def f(x):", "What is Gemma?"]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
Q = '<|"|>'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving_demo(max_batch=4, max_queue=16) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)


def chat_of(words: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": words}]


def alone(prompt: Any, **options: Any) -> str:
    """What the library writes by itself, without drafts."""
    sampling = Sampling(temperature=options.pop("temperature", 0.0), seed=options.pop("seed", None))
    return generate(demo_pair(), prompt, sampling=sampling, num_draft_tokens=0, **options).text


def test_a_chat_through_openais_client(client):
    reply = client.chat.completions.create(model="demo", messages=HELLO, max_tokens=24, temperature=0)
    [choice] = reply.choices
    assert choice.message.content == alone(HELLO, max_tokens=24)
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert reply.object == "chat.completion" and reply.model == "demo" and reply.id.startswith("chatcmpl-")
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens == len(prompt_ids(demo_pair().prompt_format, HELLO).ids)


def test_a_stream_is_the_same_text_with_usage_at_the_end(client):
    asked = {"model": "demo", "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[
        0
    ].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_completions_of_several_prompts_and_answers(client, server):
    asked = {"model": "demo", "max_tokens": 12, "seed": 7, "temperature": 1.0}
    reply = client.completions.create(prompt=["def f", "class A"], n=2, **asked)
    sampling = Sampling(temperature=1.0, seed=7)
    base = replace(demo_pair().sampling, temperature=1.0, seed=7)
    outs = generate_batch(demo_pair(), ["def f", "class A"], n=2, sampling=base, max_tokens=12)
    assert sampling.seed == reply.usage.mtp["seed"]
    assert [choice.text for choice in reply.choices] == [out.text for out in outs]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    ids = demo_pair().prompt_format.tokenizer.encode("def f")
    one = server.text(prompt=[2, *ids], max_tokens=4).json["choices"][0]["text"]
    assert one == server.text(prompt="def f", max_tokens=4).json["choices"][0]["text"]
    assert server.text(max_tokens=None).json["usage"]["completion_tokens"] <= 16


def test_requests_together_give_the_texts_of_solo_runs(server):
    """Drafts or none, streamed or whole, sampled or greedy: all at once."""
    asked = [
        {
            "prompt": words,
            "max_tokens": 20,
            "mtp": mtp,
            "stream": stream,
            "temperature": temperature,
            "seed": 5,
        }
        for words in WORDS
        for mtp, stream, temperature in (("auto", False, 0), ("off", True, 1.0), (3, True, 0))
    ]
    texts: list[str | None] = [None] * len(asked)

    def ask(at: int) -> None:
        reply = server.text(**asked[at])
        assert reply.status == 200
        texts[at] = reply.streamed("text") if asked[at]["stream"] else reply.json["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    base = demo_pair().sampling
    for request, text in zip(asked, texts, strict=True):
        sampling = replace(base, temperature=request["temperature"], seed=5)
        own = generate(demo_pair(), request["prompt"], sampling=sampling, max_tokens=20, num_draft_tokens=0)
        assert text == own.text


def test_stops_across_tokens_and_seeds(server):
    whole = alone(HELLO, max_tokens=40)
    stop = whole[10:19]
    for stream in (False, True):
        reply = server.chat(max_tokens=40, stop=[stop, "never"], stream=stream)
        text = reply.streamed() if stream else reply.json["choices"][0]["message"]["content"]
        assert text == whole[: whole.index(stop)]
    assert reply.events[-1]["choices"][0]["finish_reason"] == "stop"
    a, b = (server.chat(temperature=1.5, seed=seed, max_tokens=20).json for seed in (-1, -1))
    assert a["choices"] == b["choices"]
    drawn = server.chat(temperature=1.5, max_tokens=20).json
    again = server.chat(temperature=1.5, max_tokens=20, seed=drawn["usage"]["mtp"]["seed"]).json
    assert again["choices"] == drawn["choices"]


def test_what_drafting_did_is_told_and_history_is_reused(server):
    messages = chat_of("Tell me about prefixes and reuse of earlier tokens, please.")
    first = server.chat(messages=messages, max_tokens=12, mtp=3).json
    mtp = first["usage"]["mtp"]
    assert mtp["drafted"] >= mtp["accepted"] and mtp["drafted"] > 0 and mtp["parked"] is False
    assert server.chat(max_tokens=12, mtp="off").json["usage"]["mtp"]["drafted"] == 0
    answer = first["choices"][0]["message"]
    longer = [*messages, answer, {"role": "user", "content": "Go on."}]
    usage = server.chat(messages=longer).json["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_models_health_and_the_interface_itself(server, client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").model_extra["context_length"] == 2048
    assert server.get("/health").json["status"] == "ok"
    document = server.get("/openapi.json").json
    routes = {route.path.replace(":path", "") for route in server.server.config.app._app.routes}
    assert routes == set(document["paths"])
    assert server.get("/v1/models/other").error["code"] == "model_not_found"


def test_fields_that_nobody_reads_are_named(server):
    reply = server.chat(temprature=0.5, user="me")
    assert reply.status == 200 and reply.headers["x-mlx-mtp-ignored"] == "temprature"
    assert "x-mlx-mtp-ignored" not in server.chat(user="me").headers


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Running]:
    """Not compiled, so that choices can be scripted."""
    with serving_demo(compiled=False, max_batch=4, prefix_budget=0) as running:
        yield running


@pytest.fixture
def told(slow_server) -> Iterator[tuple[Running, "Teller"]]:
    with scripted(after=demo_pair().prompt_format.eos_ids[0]) as choice:
        yield slow_server, Teller(choice)


class Teller:
    """Makes the model answer a chat with a text in which control tokens count."""

    def __init__(self, choice: ScriptedChoice):
        self._choice = choice

    def tell(self, seed: int, messages: list[dict[str, Any]], text: str, **options: Any) -> None:
        format = demo_pair().prompt_format
        asked = prompt_ids(format, messages, **options)
        self._choice.say(seed, len(asked.ids), encode(text))


def encode(text: str) -> list[int]:
    tokenizer = demo_pair().prompt_format.tokenizer
    marks = ("<|tool_call>", "<tool_call|>", Q, "<|channel>", "<channel|>", "<|tool_response>")
    ids: list[int] = []
    while text:
        at, mark = min(((text.find(mark), mark) for mark in marks if mark in text), default=(len(text), ""))
        ids += tokenizer.encode(text[:at])
        if mark:
            ids.append(tokenizer.token_id(mark))
        text = text[at + len(mark) :]
    return ids


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


def test_a_reader_who_leaves_ends_the_reply_within_a_round(server):
    """Streamed or whole; while it waits for its turn, too."""
    running = [server.open_stream() for _ in range(4)]
    until(lambda: server.engine.status.running == 4)
    waiting = server.raw(whole_request())
    until(lambda: server.engine.status.waiting == 1)
    waiting.close()
    until(lambda: server.engine.status.waiting == 0)
    running.pop().close()
    assert until(lambda: server.engine.status.running == 3) < 5
    whole = server.raw(whole_request())
    until(lambda: server.engine.status.running == 4)
    whole.close()
    until(lambda: server.engine.status.running == 3)
    for own in running:
        own.close()
    until(lambda: server.engine.status.running == 0)


def whole_request() -> bytes:
    body = json.dumps({"messages": HELLO, "max_tokens": 1500, "logit_bias": no_ends()}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def test_a_reader_who_reads_nothing_holds_nobody_up(server):
    lazy = server.open_stream()
    assert server.chat().status == 200
    lazy.close()
    until(lambda: server.engine.status.running == 0)


def test_an_end_asked_for_lets_replies_finish_or_cuts_them():
    with serving_demo(grace_s=30) as running:
        own = running.open_stream(max_tokens=60)
        running.server.should_exit = True
        rest = read_all(own)
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and b'"finish_reason":"length"' in rest
    with serving_demo(grace_s=0.3) as running:
        own = running.open_stream()
        running.server.should_exit = True
        rest = read_all(own)
    assert b"shutting_down" in rest and rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
