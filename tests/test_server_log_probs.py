"""log_probs over HTTP in OpenAI's words: the library's own numbers, an entry for each token whose text is sent."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from mlx_mtp import Sampling, generate
from mlx_mtp.log_probs import TokenLogProbs
from mlx_mtp.reply import Written
from mlx_mtp.server.log_probs import LogProbsAsked, ShownTokens
from mlx_mtp.stream import TextStream
from scripted_replies import scripted
from servers import HELLO, Reply, Running, demo_pair, serving_demo
from told_replies import ADD, Teller


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving_demo(max_batch=4) as running:
        yield running


def of_stream(reply: Reply) -> tuple[str, list[dict[str, Any]]]:
    """A streamed chat's text, and its entries; none comes before the text that it is part of."""
    text, entries = "", []
    for event in reply.events:
        choice = event["choices"][0]
        text += choice["delta"].get("content") or ""
        entries += (choice["logprobs"] or {"content": []})["content"]
        sent = "".join(bytes(one["bytes"]).decode(errors="ignore") for one in entries[:-1])
        assert len(sent) <= len(text)
    return text, entries


@pytest.mark.parametrize("mtp", ["off", 3])
def test_a_chat_has_the_librarys_numbers(server, mtp):
    sampling = replace(demo_pair().sampling, temperature=1.2, seed=5)
    own = generate(demo_pair(), HELLO, sampling=sampling, num_draft_tokens=0, max_tokens=16, log_probs=4)
    asked = {"temperature": 1.2, "seed": 5, "max_tokens": 16, "mtp": mtp}
    whole = server.chat(logprobs=True, top_logprobs=4, **asked).json["choices"][0]
    text, entries = of_stream(server.chat(logprobs=True, top_logprobs=4, stream=True, **asked))
    assert text == whole["message"]["content"] == own.text
    assert entries == whole["logprobs"]["content"] and whole["logprobs"]["refusal"] is None
    tokenizer = demo_pair().prompt_format.tokenizer
    for entry, id, found in zip(entries, own.tokens, own.log_probs, strict=False):
        assert bytes(entry["bytes"]) == tokenizer.token_bytes(id)
        assert abs(entry["logprob"] - found.log_prob) < 1e-4
        assert len(entry["top_logprobs"]) == 4
        assert abs(entry["top_logprobs"][0]["logprob"] - found.best[0][1]) < 1e-4
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    assert server.chat(**asked).json["choices"][0]["logprobs"] is None


def test_openais_client_reads_them(server):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0)
    asked = {"model": "demo", "max_tokens": 6, "temperature": 0}
    chat = client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=2, **asked)
    [first, *_] = chat.choices[0].logprobs.content
    assert first.token == first.top_logprobs[0].token and first.logprob == first.top_logprobs[0].logprob
    text = client.completions.create(prompt="def f", logprobs=3, **asked)
    found = text.choices[0].logprobs
    assert "".join(found.tokens) == text.choices[0].text
    assert found.text_offset == [sum(map(len, found.tokens[:at])) for at in range(len(found.tokens))]
    assert all(len(likeliest) in (3, 4) for likeliest in found.top_logprobs)
    streamed = list(client.completions.create(prompt="def f", logprobs=3, stream=True, **asked))
    parts = [event.choices[0].logprobs for event in streamed if event.choices[0].logprobs is not None]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset


def test_a_stop_cuts_entries_with_the_text(server):
    whole = generate(demo_pair(), HELLO, sampling=Sampling(temperature=0.0), max_tokens=40).text
    stop = whole[10:19]
    for stream in (False, True):
        reply = server.chat(max_tokens=40, stop=stop, logprobs=True, stream=stream)
        choice = None if stream else reply.json["choices"][0]
        text, entries = (
            of_stream(reply) if stream else (choice["message"]["content"], choice["logprobs"]["content"])
        )
        tokens = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
        assert text == whole[: whole.index(stop)] and tokens.startswith(text)
        assert len(tokens) - len(text) < len(bytes(entries[-1]["bytes"])), "no token of the stop alone"


def test_others_in_the_batch_are_as_they_are_without(server):
    """One asks for log_probs, three do not: whoever comes together, all texts are those of solo runs."""
    texts: list[Any] = [None] * 4

    def ask(at: int) -> None:
        fields = {"logprobs": True, "top_logprobs": 20} if at % 4 == 0 else {}
        texts[at] = server.chat(seed=at, temperature=1, max_tokens=12, **fields).json["choices"][0]

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, choice in enumerate(texts):
        sampling = replace(demo_pair().sampling, temperature=1.0, seed=at)
        own = generate(demo_pair(), HELLO, sampling=sampling, num_draft_tokens=0, max_tokens=12)
        assert choice["message"]["content"] == own.text
        assert (choice["logprobs"] is not None) == (at % 4 == 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
    ],
)
def test_what_cannot_be_is_refused(server, fields, param):
    reply = server.chat(**fields)
    assert reply.status == 400 and reply.error["param"] == param
    for count in (True, 21, -1, "3"):
        refused = server.text(logprobs=count)
        assert refused.status == 400 and refused.error["param"] == "logprobs"


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_and_calls_have_none(stream):
    with serving_demo(compiled=False, prefix_budget=0) as running:
        with scripted(after=demo_pair().prompt_format.eos_ids[0]) as choice:
            text = (
                "<|channel>thought\nHm.<channel|>Yes é.<|tool_call>call:add{a:1}<tool_call|><|tool_response>"
            )
            Teller(choice).tell(31, HELLO, text, tools=[ADD])
            reply = running.chat(tools=[ADD], seed=31, max_tokens=90, logprobs=True, stream=stream)
    if stream:
        shown, entries = of_stream(reply)
    else:
        own = reply.json["choices"][0]
        shown, entries = own["message"]["content"], own["logprobs"]["content"]
    assert shown == "Yes é."
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == shown


def test_entries_follow_the_text_however_it_is_cut():
    """Parts of characters, control tokens between them, a stop that is held back and comes to nothing."""
    tokenizer = demo_pair().prompt_format.tokenizer
    smile = tokenizer.encode("\N{GRINNING FACE}")
    assert len(smile) == 4, "a token for each byte"
    mark = tokenizer.token_id("<|channel>")
    ids = [
        *tokenizer.encode("ab STO"),
        *smile,
        smile[0],
        mark,
        *tokenizer.encode("x\n hidden"),
        tokenizer.token_id("<channel|>"),
        *tokenizer.encode("end"),
    ]
    stream = TextStream(tokenizer, stop=("STOP",), eos_ids=(1,))
    tokens, text, entries = ShownTokens(tokenizer, frozenset({"answer"})), "", []
    for id in ids:
        pieces = stream.push((id,)).pieces
        tokens.wrote((Written(id, "plain", pieces, stream.token_channel, TokenLogProbs(-1.0)),))
        more = "".join(piece.text for piece in pieces if piece.channel == "answer")
        text += more
        entries += tokens.sent(more)
    assert text == "ab STO\N{GRINNING FACE}end"
    assert [entry.start for entry in entries] == sorted(entry.start for entry in entries)
    answer = [*tokenizer.encode("ab STO"), *smile, *tokenizer.encode("end")]
    assert [entry.id for entry in entries] == answer


def test_numbers_that_json_has_not_and_parts_of_characters():
    tokenizer = demo_pair().prompt_format.tokenizer
    asked = LogProbsAsked(1, True, tokenizer, frozenset({"answer"}))
    tokens, nothing = asked.shown_tokens(), -float("inf")
    parts = tokenizer.encode("\N{GRINNING FACE}")
    for id in parts:
        tokens.wrote((Written(id, "plain", (), "answer", TokenLogProbs(nothing, ((id, nothing),))),))
    first, *rest = asked.field(tokens.sent("\N{GRINNING FACE}"))["content"]
    assert first["logprob"] == first["top_logprobs"][0]["logprob"] == -9999.0 and len(rest) == 3
    assert (first["token"], first["bytes"]) == ("bytes:\\xf0", [0xF0])
