"""The prompts that `prove` plays: varied, in the model's chat template, half of them longer than its window."""

import json
from importlib.resources import files
from typing import TYPE_CHECKING

from mlx_mtp.errors import ParameterError

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

MIN_TOKENS = 2  # the first token is prefill's and so never drafted


def proof_prompts(pair: "Pair", count: int, tokens: int) -> list[list[int]]:
    """-> token ids of `count` prompts, each with room for `tokens` more.

    Every second one is preceded by filler until prompt and reply together wrap the sliding window, where that fits.
    """
    data = json.loads((files("mlx_mtp.cli") / "prove_prompts.json").read_text(encoding="utf-8"))
    texts = [prompt["text"] for prompt in data["prompts"]]
    if not 1 <= count <= len(texts):
        raise ParameterError(
            f"--prompts must be 1 .. {len(texts)}, got {count}; choose a number in that range"
        )
    if tokens < MIN_TOKENS:
        raise ParameterError(
            f"--tokens must be at least {MIN_TOKENS}, got {tokens}; the first is never drafted"
        )
    past_window = pair.target.text.sliding_window + pair.target.text.sliding_window // 4
    chosen = []
    for i, text in enumerate(texts[:count]):
        ids = _ids(pair, text)
        while i % 2 and len(ids) + tokens < past_window:
            text = f"{data['filler']}\n\n{text}"
            longer = _ids(pair, text)
            if len(longer) + tokens > pair.max_context:
                break
            ids = longer
        chosen.append(ids)
    return chosen


def _ids(pair: "Pair", text: str) -> list[int]:
    from mlx_mtp.prompt import prompt_ids

    chat = pair.prompt_format.template is not None
    return prompt_ids(pair.prompt_format, [{"role": "user", "content": text}] if chat else text).ids
