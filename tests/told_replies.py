"""Chats whose answers are given in words, control tokens among them: calls, thoughts and their ends."""

from typing import Any

from mlx_mtp.prompt import prompt_ids
from scripted_replies import ScriptedChoice
from servers import demo_pair

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
MULTIPLY = {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}
Q = '<|"|>'


class Teller:
    """Makes the model answer a chat with a text in which control tokens count."""

    def __init__(self, choice: ScriptedChoice):
        self._choice = choice

    def tell(
        self, seed: int, messages: list[dict[str, Any]], text: str, *, begun: str = "", **options: Any
    ) -> None:
        """`begun`: what the answer has to begin with, and is not the model's."""
        format = demo_pair().prompt_format
        asked = prompt_ids(format, messages, **options)
        self._choice.say(seed, len(asked.ids) + len(encode(begun)), encode(text))


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
