"""Write the golden pairs: `python make_goldens.py [VARIANT ...]`, into this folder or `--out`.

Needs torch and transformers 5.23 (see README.md); the tests themselves need neither. Runs in a minute on one
core and gives the same files again.
"""

import argparse
import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Gemma4Config, Gemma4UnifiedConfig, GenerationConfig
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator as Drafting

from fit_drafter import fit
from tiny_pairs import (
    DRAFTS,
    VARIANTS,
    WINDOW,
    build,
    drafter_settings,
    prompts,
    restore_kv_sharing_modes,
    target_settings,
)

HERE = Path(__file__).parent
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
REPETITION_PENALTY = 2.0


@dataclass
class Round:
    """What one round of transformers' assisted decoding started from, and what it drafted."""

    position: int
    last_token: int
    hidden: torch.Tensor  # [H], the post-norm row that produced last_token
    shared_kv: dict
    literal_tokens: list[int]


@contextlib.contextmanager
def recorded_rounds() -> Iterator[list[Round]]:
    """Collect every round that transformers drafts inside the block; its results are not altered."""
    rounds: list[Round] = []
    original = Drafting.get_candidates

    def get_candidates(self, input_ids, **kwargs):
        row = -1 if self.is_main_model_prefill else int(kwargs["n_last_matches"])
        outputs = kwargs.get("model_outputs")
        candidates = original(self, input_ids, **kwargs)
        length = input_ids.shape[1]
        drafted = candidates[0][0, length:].tolist()
        if drafted:
            rounds.append(
                Round(
                    position=length - 1,
                    last_token=int(input_ids[0, -1]),
                    hidden=outputs.hidden_states[-1][0, row].clone(),
                    shared_kv=copy.deepcopy(outputs.shared_kv_states),
                    literal_tokens=drafted,
                )
            )
        return candidates

    Drafting.get_candidates = get_candidates
    try:
        yield rounds
    finally:
        Drafting.get_candidates = original


def committed_rows(shared: dict, position: int) -> dict:
    """The strict view of a round's K/V: without the rejected rows that transformers leaves at the end."""
    rejected = shared["full_attention"][0].shape[2] - position
    cut = {kind: tuple(rows[:, :, : rows.shape[2] - rejected] for rows in kv) for kind, kv in shared.items()}
    return cut | {"sliding_attention": tuple(rows[:, :, -WINDOW:] for rows in cut["sliding_attention"])}


def strict_drafts(target, drafter, played: Round) -> tuple[list[int], torch.Tensor]:
    """The round's drafts when the drafter sees committed rows only: tokens, and logits [drafts, V]."""
    kv = committed_rows(played.shared_kv, played.position)
    token, hidden = torch.tensor([[played.last_token]]), played.hidden[None, None]
    tokens, logits = [], []
    for _ in played.literal_tokens:
        out = drafter(
            inputs_embeds=torch.cat([target.get_input_embeddings()(token), hidden], -1),
            attention_mask=None,
            position_ids=torch.tensor([[played.position]]),
            shared_kv_states=kv,
            use_cache=False,
        )
        token, hidden = out.logits.argmax(-1), out.last_hidden_state
        tokens.append(int(token))
        logits.append(out.logits[0, 0])
    return tokens, torch.stack(logits)


def prompt_goldens(target, drafter, ids: torch.Tensor, new_tokens: int) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of one prompt, and one line about acceptance and how close the closest choices were."""
    full = target(ids, use_cache=False)
    greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new_tokens}
    greedy |= {"eos_token_id": None, "pad_token_id": 0}
    plain = target.generate(ids, **greedy, return_dict_in_generate=True, output_logits=True)
    text = plain.sequences[0]
    with recorded_rounds() as rounds:
        assisted = target.generate(ids, assistant_model=drafter, **greedy)
    if not torch.equal(assisted[0], text):
        raise SystemExit("transformers' assisted and plain text differ: these goldens would be wrong")
    strict = [strict_drafts(target, drafter, played) for played in rounds]
    penalised = target.generate(ids, **greedy, repetition_penalty=REPETITION_PENALTY)
    greedy_logits = torch.stack([row[0] for row in plain.logits])
    padded = [tokens + [-1] * (DRAFTS - len(tokens)) for tokens, _ in strict]
    accepted = [accepted_drafts(text.tolist(), played.position, played.literal_tokens) for played in rounds]
    arrays = {
        "ids": ids[0].int(),
        "logits": full.logits[0],
        "greedy": text.int(),
        "greedy_logits": greedy_logits,
        "penalised": penalised[0].int(),
        "position": np.array([played.position for played in rounds], np.int32),
        "last_token": np.array([played.last_token for played in rounds], np.int32),
        "hidden_in": torch.stack([played.hidden for played in rounds]),
        "strict_tokens": np.array(padded, np.int32),
        "strict_logits": torch.stack([logits[0] for _, logits in strict]),
        "accepted": np.array(accepted, np.int32),
    }
    drafted = sum(len(played.literal_tokens) for played in rounds)
    gaps = [closest_choice(rows) for rows in (greedy_logits, torch.cat([logits for _, logits in strict]))]
    note = f"{sum(accepted)}/{drafted} drafts accepted in {len(rounds)} rounds, "
    note += f"closest choice of the target {gaps[0]:.1e}, of the drafter {gaps[1]:.1e}"
    return {key: np.asarray(value) for key, value in arrays.items()}, note


def accepted_drafts(text: list[int], position: int, drafts: list[int]) -> int:
    following = text[position + 1 : position + 1 + len(drafts)]
    matches = [draft == token for draft, token in zip(drafts, following, strict=False)]
    return ([*matches, False]).index(False)


def closest_choice(logits: torch.Tensor) -> float:
    """Smallest gap between the best and second best logit: how much rounding an equality test can bear."""
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())


def write_folder(folder: Path, model, config: dict, generation: GenerationConfig, prefix: str) -> None:
    """A checkpoint in the published form, which leaves the tied head out."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation.to_diff_dict())


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def flat_config(config, architecture: str, settings: dict) -> dict:
    """The published flat form: 5.23 saves `per_layer_config` in the place of two plain keys."""
    saved = config.to_diff_dict() | {"architectures": [architecture], "dtype": "float32"}
    text = saved.get("text_config", saved)
    text.pop("per_layer_config", None)
    text["global_head_dim"] = settings["global_head_dim"]
    text["num_global_key_value_heads"] = settings["num_global_key_value_heads"]
    return saved | {"vocab_size": settings["vocab_size"]}


def multimodal_config(name: str, target) -> dict:
    """config.json of the class that the published checkpoint names, around the same text part."""
    unified = VARIANTS[name].unified
    config_class = Gemma4UnifiedConfig if unified else Gemma4Config
    text = copy.deepcopy(target.config)
    config = config_class(text_config=text, vision_config=None, audio_config=None)
    kind = "Gemma4UnifiedForConditionalGeneration" if unified else "Gemma4ForConditionalGeneration"
    return flat_config(config, kind, target_settings(name))


def write_checkpoints(name: str, folder: Path, target, drafter) -> None:
    """Both folders in the published form; of 12B and a4b also the other form of the target's config.json."""
    unified = VARIANTS[name].unified
    text = flat_config(target.config, type(target).__name__, target_settings(name))
    multimodal = multimodal_config(name, target)
    prefix = "model.language_model." if unified else "model."
    write_folder(folder / "target", target, multimodal if unified else text, target.generation_config, prefix)
    config = flat_config(drafter.config, type(drafter).__name__, drafter_settings(name))
    write_folder(folder / "drafter", drafter, config, drafter.generation_config, "model.")
    if unified:
        write_json(folder / "config_text.json", text)
    if name == "a4b":
        write_json(folder / "config_multimodal.json", multimodal)


@torch.no_grad()
def write_variant(name: str, folder: Path) -> None:
    with torch.enable_grad():
        target, drafter = build(name)
        loss = fit(target, drafter, VARIANTS[name].fit_steps)
    print(f"{name}: drafter fitted, loss {loss:.3f}")
    drafting = {"num_assistant_tokens": DRAFTS, "num_assistant_tokens_schedule": "heuristic"}
    target.generation_config = GenerationConfig(**SPECIAL)
    drafter.generation_config = GenerationConfig(**SPECIAL, **drafting)
    write_checkpoints(name, folder, target, drafter)
    arrays = {}
    for prompt, ids, new_tokens in prompts():
        found, note = prompt_goldens(target, drafter, ids, new_tokens)
        arrays |= {f"{prompt}.{key}": value for key, value in found.items()}
        print(f"  {prompt}: {note}")
    np.savez_compressed(folder / "golden.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}; default: all")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    restore_kv_sharing_modes()
    for name in options.variants or VARIANTS:
        write_variant(name, options.out / name)


if __name__ == "__main__":
    main()
