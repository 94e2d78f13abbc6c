"""Chats for tests, and what the plain template and tokenizer make of them."""

from pathlib import Path
from typing import Any

import jinja2
import tokenizers

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What it is like outside",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 3, "wind": True}}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def reference_ids(folder: Path, messages: list[dict[str, Any]], **variables: Any) -> list[int]:
    """The template by plain Jinja, the whole text at once by the plain tokenizer: for ordinary text only."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    variables = {"tools": None, "add_generation_prompt": True, "bos_token": "<bos>", **variables}
    text = environment.from_string((folder / "chat_template.jinja").read_text()).render(
        messages=messages, **variables
    )
    ids: list[int] = plain_tokenizer(folder).encode(text, add_special_tokens=False).ids
    return ids


def plain_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [user("What is the capital of France?")],
    "blanks": [user("  two  words \n")],
    "only blanks": [user(" \n ")],
    "system": [{"role": "system", "content": " Be brief. "}, user("hi")],
    "several turns": [user("a"), assistant("b"), user("c"), assistant(" d "), user("e")],
    "ends with the assistant": [user("a"), assistant("The answer")],
    "code": [user("if a < b and c > d: print('<p>|x|</p>')\n\n\n<h1>")],
    "unicode": [user("naïve 🐢 \u202e 中文 \x00 \U0001d300 \uf8ff")],
    "symbols that could be stand-ins": [
        user("\U0001d302\U0001d303 \\ud834\\udf00 \\ud834\\udf01 <> \U000f0000")
    ],
    "thoughts": [user("a"), assistant("<|channel>thought\nhm\n<channel|>yes"), user("b")],
    "open thought": [user("a"), assistant("yes<|channel>thought\nhm"), user("b")],
    "items": [user([{"type": "text", "text": " a "}, {"type": "text", "text": "b"}])],  # type: ignore[arg-type]
    "tool": [
        user("Weather?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "weather", "content": {"sky": "blue < grey", "temp": [1, 2.5]}},
        assistant("Fine."),
        user("Thanks"),
    ],
    "tool answers": [
        user("Weather?"),
        assistant("", tool_calls=[CALL, CALL]),
        {"role": "tool", "name": "weather", "content": "rain"},
    ],
}
