"""mlx-vlm's MTP loop on one golden pair; started by mlx_vlm_round.py with the interpreter that has mlx-vlm.

Prints one line of JSON: tokens, and the seconds, rounds and accepted drafts of every timed run.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_vlm.models.base import InputEmbeddingsFeatures
from mlx_vlm.models.gemma4.config import TextConfig
from mlx_vlm.models.gemma4.language import LanguageModel
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.mtp import _mtp_rounds


class TextOnly(nn.Module):
    """mlx-vlm's gemma4 language model with the surface that its MTP loop asks of a whole model."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.model_type = "gemma4"
        self.language_model = LanguageModel(config)

    def get_input_embeddings(self, input_ids: Any = None, pixel_values: Any = None, **_: Any) -> Any:
        return InputEmbeddingsFeatures(inputs_embeds=None)

    def __call__(self, input_ids: mx.array, cache: Any = None, **options: Any) -> Any:
        options.pop("inputs_embeds", None)
        return self.language_model(input_ids, cache=cache, **options)

    @property
    def layers(self) -> Any:
        return self.language_model.layers

    def make_cache(self) -> Any:
        return self.language_model.make_cache()


def load_target(folder: Path) -> TextOnly:
    """The target of a golden pair, refused if any of the model's weights is missing."""
    raw = json.loads((folder / "config.json").read_text())
    text = raw.get("text_config", raw)
    # Sizes without per-layer embeddings leave the field out; mlx-vlm's default is E2B's.
    model = TextOnly(TextConfig.from_dict({"hidden_size_per_layer_input": 0, **text}))
    weights = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        name = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        weights[f"language_model.model.{name}"] = value
    model.load_weights(list(model.language_model.sanitize(weights).items()), strict=False)
    mx.eval(model.parameters())
    return model


def greedy(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def generate(
    model: TextOnly, drafter: Any, ids: list[int], tokens: int, drafts: int
) -> tuple[list[int], float]:
    """One run -> its tokens and the seconds after the first of them."""
    cache = model.make_cache()
    out = model(mx.array(ids)[None], cache=cache, return_hidden=True, return_shared_kv=True)
    text = [greedy(out.logits[:, -1]).item()]
    mx.synchronize()
    started = time.perf_counter()
    rounds = _mtp_rounds(
        model,
        drafter,
        cache,
        out.hidden_states[-1],
        out.shared_kv_states,
        first_bonus=text[0],
        max_tokens=tokens,
        sampler=greedy,
        draft_block_size=drafts + 1,
        greedy_sampling=True,
    )
    text.extend(int(token) for token, _ in rounds)
    mx.synchronize()
    return text, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--drafts", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--warm-ups", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = load_target(args.pair / "target")
    loaded = load_drafter(str(args.pair / "drafter"), kind="mtp")
    drafter = loaded[0] if isinstance(loaded, tuple) else loaded
    ids = np.load(args.pair / "golden.npz")["short.ids"].tolist()
    runs = []
    for _ in range(args.warm_ups + args.runs):
        text, seconds = generate(model, drafter, ids, args.tokens, args.drafts)
        lengths = [int(n) for n in drafter.accept_lens]
        runs.append({"tokens": text, "seconds": seconds, "rounds": len(lengths), "accepted": sum(lengths)})
    print(json.dumps(runs[args.warm_ups :]))


if __name__ == "__main__":
    main()
