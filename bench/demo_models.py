"""The demo pair as this project and as mlx-lm load it, both float32, and held-out prompts for it."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_mtp
from mlx_mtp.against_mlx_lm import file_limits_kept
from mlx_mtp.hub import parse_name
from mlx_mtp.pair import Pair
from mlx_mtp.prompt import prompt_ids


def load_ours(target: str) -> Pair:
    """The pair in float32, its tokenizer's end-of-turn ids ignored so that every run has the same length."""
    pair = mlx_mtp.load(target, dtype=mx.float32)
    if pair.drafter is None:
        sys.exit(f"{target}: no drafter beside it; give the target folder of a pair")
    return replace(pair, prompt_format=replace(pair.prompt_format, eos_ids=()))


def folder_of(target: str) -> Path:
    """Where the files of "demo" or of a folder lie; models of the hub have no held-out prompts beside them."""
    folder = parse_name(target).folder
    if folder is None:
        sys.exit(f"{target}: give demo or a folder")
    return folder


def load_mlx_lm(target: str) -> Any:
    """mlx-lm's own model of the same folder in float32, evaluated."""
    with file_limits_kept():
        from mlx_lm.utils import load_model
    model, _ = load_model(folder_of(target))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def held_out_code(target: str, count: int) -> list[list[int]]:
    """Token ids of the first `count` held-out code prompts, from held_out.json beside the target folder."""
    path = folder_of(target).parent / "held_out.json"
    if not path.is_file():
        sys.exit(f"{path}: not found; examples/train_demo_pair/held_out.py writes it")
    prompts = json.loads(Path(path).read_text())["code"]
    return [list(prompt["ids"]) for prompt in prompts[:count]]


def held_out_chat(pair: Pair, target: str, count: int) -> list[list[int]]:
    """Token ids of the first `count` held-out questions, in the pair's chat template."""
    questions = json.loads((folder_of(target).parent / "held_out.json").read_text())["chat"][:count]
    chats = [[{"role": "user", "content": question["question"]}] for question in questions]
    return [prompt_ids(pair.prompt_format, chat).ids for chat in chats]


def long_prompt(target: str, tokens: int) -> list[int]:
    """`tokens` ids of held-out code, one function after another, from the start again where they run out."""
    first, *others = held_out_code(target, 10_000)
    ids = first + [token for prompt in others for token in prompt[1:]]
    while len(ids) < tokens:
        ids += ids[1 : 1 + tokens - len(ids)]
    return ids[:tokens]
