"""What clients get: OpenAI's own client and plain requests, whole and streamed, against the library's own texts."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from engines import until
from mlx_mtp import Sampling, generate, generate_batch
from mlx_mtp.prompt import prompt_ids
from servers import CHAT, HELLO, Running, chat_of, demo_pair, no_ends, read_all, serving_demo

WORDS = ["What is MLX?", "What is MTP?", "def f(x):", "What is Gemma?"]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving_demo(max_batch=4, max_queue=16) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)


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
