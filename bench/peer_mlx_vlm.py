"""mlx-vlm's arm of peers.py: its MTP loop on a text-only target and Gemma's assistant."""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_vlm.models.base import InputEmbeddingsFeatures
from mlx_vlm.models.gemma4.config import TextConfig
from mlx_vlm.models.gemma4.language import LanguageModel
from mlx_vlm.models.switch_layers import move_expert_projection, split_expert_projection
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.mtp import _mtp_rounds
from peer_arm import Clock, Job, Play, Reply, run_arm
from peer_watch import watching


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
    """The text model of a folder; ends with exit code 1 if any of its weights is missing."""
    raw = json.loads((folder / "config.json").read_text())
    text = raw.get("text_config", raw)
    # Sizes without per-layer embeddings leave the field out; mlx-vlm's default is E2B's.
    model = TextOnly(TextConfig.from_dict({"hidden_size_per_layer_input": 0, **text}))
    weights = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        name = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
        weights[f"language_model.model.{name}"] = value
    for name in [name for name in weights if name.endswith(".experts.gate_up_proj")]:
        experts = name.removesuffix(".gate_up_proj")
        gate, up = f"{experts}.switch_glu.gate_proj", f"{experts}.switch_glu.up_proj"
        split_expert_projection(weights, name, [gate, up])
        move_expert_projection(weights, f"{experts}.down_proj", f"{experts}.switch_glu.down_proj")
    loaded = dict(model.language_model.sanitize(weights))
    if missing := {name for name, _ in tree_flatten(model.parameters())} - set(loaded):
        sys.exit(
            f"{folder}: mlx-vlm finds no weights for {', '.join(sorted(missing)[:5])}: nothing is reported"
        )
    model.load_weights(list(loaded.items()), strict=True)
    mx.eval(model.parameters())
    return model


def greedy(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def open_arm(job: Job) -> Play:
    model = load_target(Path(job.target))
    loaded = load_drafter(job.drafter, kind="mtp")
    drafter = loaded[0] if isinstance(loaded, tuple) else loaded
    if job.float32:
        model.set_dtype(mx.float32)
        drafter.set_dtype(mx.float32)
    mx.eval(model.parameters(), drafter.parameters())

    def play(ids: list[int], clock: Clock) -> Reply:
        cache = model.make_cache()
        out = model(mx.array(ids)[None], cache=cache, return_hidden=True, return_shared_kv=True)
        text = [int(greedy(out.logits[:, -1]).item())]
        mx.synchronize()
        clock.start()
        rounds = _mtp_rounds(
            model,
            drafter,
            cache,
            out.hidden_states[-1],
            out.shared_kv_states,
            first_bonus=text[0],
            max_tokens=job.tokens,
            sampler=greedy,
            draft_block_size=job.drafts + 1,
            greedy_sampling=True,
        )
        text.extend(int(token) for token, _ in rounds)
        mx.synchronize()
        clock.stop()
        kept = [int(n) for n in drafter.accept_lens]
        return Reply(text, len(kept), sum(kept))

    return play


if __name__ == "__main__":
    run_arm(open_arm, ("mlx-vlm", "mlx"), watching)
