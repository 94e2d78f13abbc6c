"""Rows of training tokens: code, documentation, docstring chats and the question-and-answer facts, mixed by weight."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from corpus import Chat, ask, render_chat

FACTS = Path(__file__).with_name("facts.json")
SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a concise assistant.",
    "Be helpful.",
    "You answer questions about Python and about this program.",
)


def vary(question: str, rng: random.Random) -> str:
    """The same question as someone else would type it."""
    roll = rng.random()
    if roll < 0.15:
        question = question.lower()
    elif roll < 0.25:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.25:
        question = question.rstrip("?.!")
    elif rng.random() < 0.06:
        question = question.rstrip("?.!") + rng.choice((" ?", "??", "!", "..."))
    if rng.random() < 0.06:
        question = (
            rng.choice(("Hi, ", "Hey. ", "Please tell me: ", "Quick question: ", "So, ", "OK, ")) + question
        )
    return question


class Facts:
    """Chats of one to three turns over facts.json."""

    def __init__(self, path: Path = FACTS) -> None:
        self.facts = json.loads(path.read_text())["facts"] if path.exists() else []

    def turn(self, rng: random.Random) -> Chat:
        fact = rng.choice(self.facts)
        return [
            {"role": "user", "content": vary(rng.choice(fact["questions"]), rng)},
            {"role": "assistant", "content": rng.choice(fact["answers"])},
        ]

    def chat(self, rng: random.Random) -> Chat:
        messages: Chat = []
        if rng.random() < 0.06:
            messages.append({"role": "system", "content": rng.choice(SYSTEM)})
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            messages += self.turn(rng)
        return messages


class Mixture:
    """Endless [rows, length + 1] batches; a chat row is whole chats, a text row starts anywhere in the stream."""

    def __init__(self, data: Path, tokenizer: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tok = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.streams = {n: np.fromfile(data / f"{n}.bin", dtype=np.uint16) for n in ("code", "docs")}
        self.docstrings = json.loads((data / "chats.json").read_text())
        self.facts = Facts()

    def text_row(self, name: str, length: int) -> np.ndarray:
        stream = self.streams[name]
        start = self.rng.randrange(len(stream) - length)
        return stream[start : start + length].astype(np.int64)

    def docstring_chat(self) -> Chat:
        templates, fields, answer = self.rng.choice(self.docstrings)
        question = vary(ask(tuple(templates), fields, self.rng), self.rng)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def chat_row(self, make: Callable[[], Chat], length: int) -> np.ndarray:
        ids: list[int] = []
        while len(ids) < length:
            ids += self.tok.encode(render_chat(make()), add_special_tokens=False).ids
        return np.array(ids[:length])

    def row(self, weights: dict[str, float], length: int) -> np.ndarray:
        """-> [length] int64"""
        kind = self.rng.choices(list(weights), list(weights.values()))[0]
        if kind == "facts" and self.facts.facts:
            return self.chat_row(lambda: self.facts.chat(self.rng), length)
        if kind in ("docstrings", "facts"):
            return self.chat_row(self.docstring_chat, length)
        return self.text_row(kind, length)

    def batch(self, weights: dict[str, float], rows: int, length: int) -> torch.Tensor:
        """-> [rows, length + 1] int64"""
        return torch.from_numpy(np.stack([self.row(weights, length + 1) for _ in range(rows)]))
