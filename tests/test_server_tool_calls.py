"""Gemma's tool calls -> OpenAI's: every value comes through, pieces make no difference, and what comes out is JSON."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.prompt import render_chat
from mlx_mtp.server.templates import KNOWN, OLD, template_of, with_tool_responses
from mlx_mtp.server.tool_calls import Argued, Begun, Ended, NoCall, ToolCallReader
from mlx_mtp.stream import TextStream
from servers import demo_pair

Q = '<|"|>'
SYMBOLS = [
    "<|tool_call>",
    "<tool_call|>",
    Q,
    "call:a{",
    *'{}[],:"\\ x1é😀<|\n',
    "true",
    "null",
    "-1.5e3",
    "NaN",
]


def read(pieces: list[str], *, is_whole: bool = True) -> tuple[list[tuple[str, str, bool]], str]:
    """-> calls (name, arguments, whether it ended) and what was no call."""
    reader = ToolCallReader()
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish(is_whole=is_whole)
    names: list[str] = []
    arguments: list[str] = []
    ended: set[int] = set()
    text = ""
    for part in parts:
        if isinstance(part, Begun):
            assert part.index == len(names) and part.id.startswith("call_")
            names.append(part.name)
            arguments.append("")
        elif isinstance(part, Argued):
            arguments[part.index] += part.text
        elif isinstance(part, Ended):
            ended.add(part.index)
        else:
            assert isinstance(part, NoCall)
            text += part.text
    return [(name, arguments[at], at in ended) for at, name in enumerate(names)], text


def arguments_of(text: str) -> Any:
    [(_, arguments, ended)], rest = read([text])
    assert ended and not rest
    return json.loads(arguments)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (f"{{city:{Q}Paris{Q}}}", {"city": "Paris"}),
        ("{}", {}),
        (
            f"{{n:3,x:-1.5e3,on:true,off:false,no:null,s:{Q}{Q}}}",
            {"n": 3, "x": -1500, "on": True, "off": False, "no": None, "s": ""},
        ),
        (
            f"{{a:[1,{Q}b{Q},[],{{}}],o:{{p:{{q:[null]}}}}}}",
            {"a": [1, "b", [], {}], "o": {"p": {"q": [None]}}},
        ),
        (f'{{s:{Q}say "hi"\n\\n {{x:[1]}}, 2{Q}}}', {"s": 'say "hi"\n\\n {x:[1]}, 2'}),
        (f"{{{Q}odd key{Q}:1}}", {"odd key": 1}),
        ('{"city": "Paris \\"x\\"", "n": 2}', {"city": 'Paris "x"', "n": 2}),
        ("{city:Paris on Seine}", {"city": "Paris on Seine"}),
        ("{a:,b:1}", {"a": None, "b": 1}),
        ("{a}", {"a": None}),
        ("{a:NaN,b:Infinity,c:01}", {"a": "NaN", "b": "Infinity", "c": "01"}),
        ("{a:[1,[2,{b:3", {"a": [1, [2, {"b": 3}]]}),
        ("{a:[1}", {"a": [1]}),
        (
            f"{{code:{Q}print('<tool_call|>') # <|tool_call>{Q}}}",
            {"code": "print('<tool_call|>') # <|tool_call>"},
        ),
        (f"{{code:{Q}never closed", {"code": "never closed"}),
    ],
)
def test_arguments(written, meant):
    assert arguments_of(f"<|tool_call>call:f{written}<tool_call|>") == meant


def test_several_calls_and_what_is_none():
    text = (
        "<|tool_call>call:a{x:1}<tool_call|><|tool_call>call:b.c-d{}<tool_call|><|tool_call>hm{}<tool_call|>"
    )
    calls, rest = read([text])
    assert calls == [("a", '{"x":1}', True), ("b.c-d", "{}", True)]
    assert rest == "<|tool_call>hm{}<tool_call|>"
    assert read(["<|tool_call>no brace<tool_call|>"]) == ([], "<|tool_call>no brace<tool_call|>")
    assert read(["<|tool_call>" + "x" * 500]) == ([], "<|tool_call>" + "x" * 500)


def test_a_call_that_was_cut_stays_cut_and_one_that_the_model_left_open_is_closed():
    text = f"<|tool_call>call:f{{s:{Q}abc"
    assert read([text], is_whole=False) == ([("f", '{"s":"abc', False)], "")
    assert read([text], is_whole=True) == ([("f", '{"s":"abc"}', True)], "")


@given(st.lists(st.sampled_from(SYMBOLS), max_size=24), st.data())
@settings(max_examples=400, deadline=None)
def test_whatever_is_written_gives_json_however_it_is_cut(symbols, data):
    text = "<|tool_call>call:a{" + "".join(symbols)
    calls, rest = read([text])
    for _, arguments, ended in calls:
        assert ended and isinstance(json.loads(arguments), dict)
    pieces, at = [], 0
    while at < len(text):
        size = data.draw(st.integers(1, 7))
        pieces.append(text[at : at + size])
        at += size
    assert read(pieces) == (calls, rest)


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "▁" not in text)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_the_template_writes_is_read_back(arguments):
    """A call rendered by a chat template, encoded, and streamed as if the model had written it."""
    format = demo_pair().prompt_format
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = render_chat(format, messages, add_generation_prompt=False).ids
    begin = ids.index(format.tokenizer.token_id("<|tool_call>"))
    stream = TextStream(format.tokenizer, eos_ids=format.eos_ids)
    pieces = [
        piece.text for id in ids[begin:] for piece in stream.push([id]).pieces if piece.channel == "tool"
    ]
    [(name, read_back, ended)], rest = read(pieces)
    assert (name, ended, rest) == ("f", True, "")
    assert same(json.loads(read_back), arguments)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, float) and isinstance(a, int | float):
        return math.isclose(a, b, rel_tol=1e-12)
    return type(a) is type(b) and a == b


def test_a_template_is_known_by_its_hash_and_its_way_with_tools_is_tried(monkeypatch):
    from dataclasses import replace
    from hashlib import sha256

    format = demo_pair().prompt_format
    own = template_of(format)
    assert own.takes_tool_role and own.takes_tools and own.name is None and own.warning is None
    old = replace(format, template=format.template.replace("message.role == 'tool'", "false"))
    assert not template_of(old).takes_tool_role
    monkeypatch.setitem(KNOWN, sha256(old.template.strip().encode()).hexdigest(), next(iter(OLD)))
    assert "first release" in (template_of(old).warning or "")
    none = replace(format, template="{{ messages[0]['content'] }}")
    assert not template_of(none).takes_tools and "no tools" in (template_of(none).warning or "")
    assert "no chat template" in (template_of(replace(format, template=None)).warning or "")


def test_tools_answers_move_into_the_assistants_message_for_old_templates():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "1", "name": "f", "content": "7"}
    user = {"role": "user", "content": "x"}
    changed = with_tool_responses([user, asked, answer, answer, user])
    response = {"name": "f", "response": "7"}
    assert changed == [user, asked | {"tool_responses": [response, response]}, user]
