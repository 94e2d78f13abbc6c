"""A pair with the demo pair's texts and more weights to read: what is added contributes exactly zero.

    python bench/enlarge.py FOLDER                       # 0.8 GB, dense
    python bench/enlarge.py FOLDER --experts 32          # the same size, two thirds of it in experts

The target's MLPs are widened by random rows of gate and up, whose columns of down are zero. With experts, each layer
gets a random router and random experts whose down is zero; layers with experts norm the dense MLP once more, so that
such a pair computes the same up to the epsilon of a norm. Target and drafter are written in float32, with the held-out
prompts beside them. Acceptance is the demo pair's own; the time of a pass is that of reading the weights.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_mtp.demo

SOURCE = Path(mlx_mtp.demo.__file__).parent
SEED = 20
SPREAD = 0.02  # of added weights: finite whatever they are multiplied with
IN_EXPERTS = 2 / 3  # of the bytes, where there are experts
TOP_K = 4
GROUP = 64  # widths are multiples of it

Tensors = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Size:
    """Widths of the enlarged layers; no experts where `experts` is 0."""

    mlp: int
    experts: int = 0
    expert: int = 0  # width of each
    top_k: int = 0


def size_for(config: dict[str, Any], gigabytes: float, experts: int = 0, top_k: int = TOP_K) -> Size:
    """Widths with which the MLPs (and experts) of a target take so many GB in float32."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    doubled = config["num_kv_shared_layers"] if config["use_double_wide_mlp"] else 0
    total = gigabytes * 1e9 / 4 / (3 * hidden)
    dense = total * (1 - IN_EXPERTS) if experts else total
    mlp = max(_rounded(dense / (layers + doubled)), config["intermediate_size"])
    if not experts:
        return Size(mlp)
    return Size(mlp, experts, _rounded(total * IN_EXPERTS / (layers * experts)), min(top_k, experts))


def _rounded(width: float) -> int:
    return max(GROUP, round(width / GROUP) * GROUP)


def enlarge(folder: Path, size: Size, source: Path = SOURCE) -> Path:
    """Write the enlarged pair of `source` into `folder` -> the target's folder, which `load` takes."""
    target = folder / "target"
    target.mkdir(parents=True, exist_ok=True)
    for path in (source / "target").iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "target" / "config.json").read_text())
    tensors = _in_float32(source / "target" / "model.safetensors")
    key = mx.random.key(SEED)
    for layer in range(config["num_hidden_layers"]):
        key, own = mx.random.split(key)
        _widen(tensors, f"model.layers.{layer}.", size.mlp / config["intermediate_size"], own)
        if size.experts:
            _add_experts(tensors, f"model.layers.{layer}.", config["hidden_size"], size, own)
    config |= {"intermediate_size": size.mlp, "dtype": "float32"}
    if size.experts:
        config |= {
            "enable_moe_block": True,
            "num_experts": size.experts,
            "top_k_experts": size.top_k,
            "moe_intermediate_size": size.expert,
        }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mx.save_safetensors(str(target / "model.safetensors"), tensors, {"format": "pt"})
    shutil.copytree(source / "drafter", folder / "drafter", dirs_exist_ok=True)
    shutil.copyfile(source / "held_out.json", folder / "held_out.json")
    return target


def _in_float32(path: Path) -> Tensors:
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return {name: value.astype(mx.float32) for name, value in loaded.items()}


def _widen(tensors: Tensors, prefix: str, times: float, key: mx.array) -> None:
    """Random rows behind those of gate and up [N, hidden], zero columns behind those of down [hidden, N]."""
    keys = dict(zip(("gate_proj", "up_proj"), mx.random.split(key), strict=True))
    for name, own in keys.items():
        weight = tensors[f"{prefix}mlp.{name}.weight"]
        wide = round(times * weight.shape[0])
        added = SPREAD * mx.random.normal((wide - weight.shape[0], weight.shape[1]), key=own)
        tensors[f"{prefix}mlp.{name}.weight"] = mx.concatenate([weight, added])
    down = tensors[f"{prefix}mlp.down_proj.weight"]
    wide = round(times * down.shape[1])
    tensors[f"{prefix}mlp.down_proj.weight"] = mx.pad(down, [(0, 0), (0, wide - down.shape[1])])


def _add_experts(tensors: Tensors, prefix: str, hidden: int, size: Size, key: mx.array) -> None:
    """A router that sends rows anywhere, experts that give zero, and norms without a gain around them."""
    keys = mx.random.split(key, 3)
    shape = (size.experts, size.expert, hidden)
    experts = f"{prefix}experts.switch_glu."
    tensors |= {
        f"{prefix}router.proj.weight": mx.random.normal((size.experts, hidden), key=keys[0]),
        f"{prefix}router.scale": mx.ones((hidden,)),
        f"{prefix}router.per_expert_scale": mx.ones((size.experts,)),
        f"{experts}gate_proj.weight": SPREAD * mx.random.normal(shape, key=keys[1]),
        f"{experts}up_proj.weight": SPREAD * mx.random.normal(shape, key=keys[2]),
        f"{experts}down_proj.weight": mx.zeros((size.experts, hidden, size.expert)),
    }
    for norm in (
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
    ):
        tensors[f"{prefix}{norm}.weight"] = mx.ones((hidden,))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the pair is written")
    parser.add_argument("--gigabytes", type=float, default=0.8, help="of the MLPs and experts, in float32")
    parser.add_argument("--experts", type=int, default=0, help="in each layer; 0: dense")
    parser.add_argument("--top-k", type=int, default=TOP_K, help="experts that a row is sent to")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    config = json.loads((SOURCE / "target" / "config.json").read_text())
    size = size_for(config, args.gigabytes, args.experts, args.top_k)
    target = enlarge(args.folder, size)
    gigabytes = (target / "model.safetensors").stat().st_size / 1e9
    print(f"{target}: {gigabytes:.2f} GB, {size}")


if __name__ == "__main__":
    sys.exit(main())
