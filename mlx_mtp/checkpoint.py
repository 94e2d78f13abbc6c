"""Files -> validated config and weights; every refusal about a model's files is raised from here.

Headers, names, shapes and quantisation are checked before a weight is read; the arrays returned are lazy.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.config_fields import Fields, shown_name
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import CheckpointError
from mlx_mtp.finite import scan_finite
from mlx_mtp.headers import read_headers, weight_files
from mlx_mtp.inventory import Inventory, Part, take_inventory
from mlx_mtp.model_files import Seen, own_file, read_json, see
from mlx_mtp.pair_check import check_pair
from mlx_mtp.quantization import parse_quantization
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

__all__ = [
    "DrafterCheckpoint",
    "TargetCheckpoint",
    "check_pair",
    "read_drafter",
    "read_drafter_config",
    "read_target",
    "read_target_config",
]

Tensors = dict[str, Weight | mx.array]
Files = dict[Path, dict[str, mx.array]]
TOKEN_ORDERING = "masked_embedding.token_ordering"


@dataclass(frozen=True, slots=True)
class TargetCheckpoint:
    """A target ready to run; `tensors` has the keys of `expected_tensors`; matrices are weights."""

    config: TargetConfig
    tensors: Tensors
    generation: dict[str, Any]  # generation_config.json as it is, or empty
    folder: Path
    quantized: str | None  # the most common format in words
    warnings: tuple[str, ...]
    seen: tuple[Seen, ...]  # for `check_unchanged`, once the arrays are evaluated


@dataclass(frozen=True, slots=True)
class DrafterCheckpoint:
    """A drafter ready to run; the token ordering is uint32."""

    config: DrafterConfig
    tensors: Tensors
    folder: Path
    quantized: str | None
    warnings: tuple[str, ...]
    seen: tuple[Seen, ...]


def read_target(folder: Path, *, dtype: mx.Dtype | None = None, scan: bool = True) -> TargetCheckpoint:
    """Read a Gemma 4 target as published or as mlx-lm and mlx-vlm convert it.

    `dtype` casts floats (None keeps the file's); `scan` looks for NaN and Inf as `scan_finite` says. EOS ids
    are those of config.json and generation_config.json together. Raises CheckpointError, or PairError for
    a drafter.
    """
    config = read_target_config(folder)
    inventory = check_files(folder, config, scan)
    tensors, quantized = load_tensors(inventory, dtype), inventory.usual_format()
    generation = read_generation(folder)
    return TargetCheckpoint(
        config, tensors, generation, folder, quantized, inventory.warnings, inventory.seen
    )


def read_drafter(folder: Path, *, dtype: mx.Dtype | None = None, scan: bool = True) -> DrafterCheckpoint:
    """Read a Gemma 4 assistant as published or quantised by MLX; arguments as `read_target`."""
    config = read_drafter_config(folder)
    inventory = check_files(folder, config, scan)
    tensors = load_tensors(inventory, dtype)
    if config.num_centroids:
        tensors[TOKEN_ORDERING] = checked_ordering(tensors[TOKEN_ORDERING], config.text.vocab_size, folder)
    return DrafterCheckpoint(
        config, tensors, folder, inventory.usual_format(), inventory.warnings, inventory.seen
    )


def read_target_config(folder: Path) -> TargetConfig:
    """Only the configuration: enough to check a pair or estimate memory before any weight file is touched."""
    config = parse_target_config(read_config(folder), str(folder / "config.json"))
    generation = Fields(read_generation(folder), str(folder / "generation_config.json"))
    eos = config.eos_token_ids + generation.token_ids("eos_token_id", config.text.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(eos)))


def read_drafter_config(folder: Path) -> DrafterConfig:
    """As `read_target_config`, for a drafter."""
    return parse_drafter_config(read_config(folder), str(folder / "config.json"))


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give the folder that holds config.json")
    return cast(dict[str, Any], read_json(folder / "config.json"))  # the parsers refuse anything else


def read_generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    generation = read_json(path) if own_file(folder, path.name) is not None else {}
    if not isinstance(generation, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; download it again")
    return generation


def check_files(folder: Path, config: TargetConfig | DrafterConfig, scan: bool) -> Inventory:
    """All that can be known from config and headers, and the scan for NaN."""
    claims = parse_quantization(read_config(folder), str(folder / "config.json"))
    seen = tuple(see(file) for file in weight_files(folder)[0])
    headers, warnings = read_headers(folder)
    inventory = take_inventory(headers, config, claims, folder, warnings)
    if scan:
        scan_finite(inventory.infos())
    return replace(inventory, seen=seen)


def load_tensors(inventory: Inventory, dtype: mx.Dtype | None) -> Tensors:
    """Lazy arrays under canonical names; only evaluating them reads the files."""
    files = {file: open_lazily(file) for file in sorted({info.file for info in inventory.infos()})}
    tensors: Tensors = {}
    for path, shape in inventory.shapes.items():
        parts = {name: lazy_part(files, name, part, dtype) for name, part in inventory.parts[path].items()}
        form = inventory.formats.get(path)
        if len(shape) == 1:
            tensors[path] = parts["weight"]
        elif form is None:
            tensors[path] = DenseWeight(parts["weight"])
        else:
            like = (
                parts["scales"]
                if form.mode == "affine"
                else lazy_part(files, "weight", inventory.parts["norm"]["weight"], dtype)
            )
            tensors[path] = QuantizedWeight(
                weight=parts["weight"],
                scales=parts["scales"],
                biases=parts.get("biases"),
                group_size=form.group_size,
                bits=form.bits,
                mode=form.mode,
                dtype=like.dtype,
                global_scale=parts.get("global_scale"),
            )
    return tensors


def lazy_part(files: Files, name: str, part: Part, dtype: mx.Dtype | None) -> mx.array:
    """One stored array, or half of it, cast where it is a float; a tensor scale is always float32."""
    value = files[part.info.file][part.info.name]
    if part.half is not None:
        rows = value.shape[-2] // 2
        value = mx.contiguous(value[..., part.half * rows : (part.half + 1) * rows, :])
    if dtype is None or name == "global_scale" or not mx.issubdtype(value.dtype, mx.floating):
        return value
    return value.astype(dtype)


def open_lazily(file: Path) -> dict[str, mx.array]:
    """The file's arrays, unread; its header is sound, but MLX may not know a type that other towers use."""
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: MLX cannot open it ({shown_name(str(error)[:120])}); use a bfloat16 or MLX-quantised version"
        ) from None


def checked_ordering(ordering: Weight | mx.array, vocab_size: int, folder: Path) -> mx.array:
    """The centroid head's table of token ids as uint32, refused unless it names every id exactly once."""
    assert isinstance(ordering, mx.array)
    expected = mx.arange(vocab_size, dtype=mx.int64)
    if not mx.array_equal(mx.sort(ordering.astype(mx.int64)), expected).item():
        raise CheckpointError(
            f"{folder}: {TOKEN_ORDERING} must name each of the {vocab_size} token ids once, and does not; "
            "download the drafter again"
        )
    return ordering.astype(mx.uint32)
