"""Which matrices are quantised and how, and what the new files will hold: all of it known before a weight is read."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoint import check_files, read_config, read_drafter_config, read_target_config
from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.config_parse import DRAFTERS
from mlx_mtp.errors import CheckpointError, ParameterError
from mlx_mtp.headers import TensorInfo
from mlx_mtp.inventory import Inventory, Part
from mlx_mtp.quantization import AFFINE_GROUPS, QuantFormat

BITS = (4, 8)
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Matrices that choose which others are used, a few rows of work each. mlx-lm keeps its routers at 8 bits, groups
# of 64; a drafter's cluster scores get the same, because a token in a cluster that is not chosen cannot be drafted.
CHOOSERS = ("router.proj", "masked_embedding.centroids")
CHOOSER_FORMAT = QuantFormat(8, 64, "affine")
NO_WEIGHT_SUFFIX = ("layer_scalar", "router.scale", "router.per_expert_scale", "token_ordering")
TOP_LEVEL = ("pre_projection", "post_projection", "masked_embedding.")
SHARD_BYTES = 5 << 30  # as mlx-lm


@dataclass(frozen=True, slots=True)
class NewTensor:
    """One tensor of the new checkpoint; `row_bytes` is what one row of the last axis takes."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor of the model: where its rows are now, and what is made of them (weight, scales and biases)."""

    path: str
    part: Part
    shape: tuple[int, ...]
    form: QuantFormat | None
    made: tuple[NewTensor, ...]

    @property
    def nbytes(self) -> int:
        """To be read."""
        return math.prod(self.shape) * ITEM_BYTES[self.part.info.dtype]

    def runs(self) -> Iterator[tuple[int, int]]:
        """Stored rows that lie together: (offset in the file, rows); half a fused tensor has a run per expert."""
        info, rows = self.part.info, math.prod(self.shape[:-1])
        if self.part.half is None:
            yield info.offset, rows
            return
        row_bytes = self.shape[-1] * ITEM_BYTES[info.dtype]
        experts, rows = self.shape[0], math.prod(self.shape[1:-1])
        for expert in range(experts):
            yield info.offset + (2 * expert + self.part.half) * rows * row_bytes, rows


@dataclass(frozen=True, slots=True)
class Shard:
    """One new file: its header, and where each tensor begins, in bytes from the start of the file."""

    name: str
    header: bytes
    offsets: dict[str, int]
    jobs: tuple[Job, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion."""

    folder: Path
    shards: tuple[Shard, ...]
    config: dict[str, Any]  # the new config.json
    index: dict[str, Any]
    nbytes: int  # of all new weight files
    source_bytes: int  # to be read

    def sources(self) -> dict[str, TensorInfo]:
        """The stored tensors that are read, by name."""
        return {job.part.info.name: job.part.info for shard in self.shards for job in shard.jobs}


def format_of(path: str, shape: tuple[int, ...], bits: int, group_size: int) -> QuantFormat | None:
    """How the tensor at this canonical path is quantised, None where it stays as it is (vectors, odd widths)."""
    form = CHOOSER_FORMAT if path.endswith(CHOOSERS) else QuantFormat(bits, group_size, "affine")
    fits = len(shape) > 1 and shape[-1] % group_size == 0 and shape[-1] % form.group_size == 0
    return form if fits else None


def make_plan(folder: Path, bits: int, group_size: int, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Read config and headers of a dense target or drafter; refuses what cannot or need not be quantised."""
    check_format(bits, group_size)
    raw = read_config(folder)
    is_drafter = isinstance(raw, dict) and raw.get("model_type") in DRAFTERS
    config = read_drafter_config(folder) if is_drafter else read_target_config(folder)
    inventory = check_files(folder, config, scan=False)
    refuse_quantised(folder, inventory)
    jobs = make_jobs(inventory, config, bits, group_size, wanted_dtype(raw))
    shards = cut_into_shards(jobs, shard_bytes)
    if not any(job.form for job in jobs):
        raise CheckpointError(
            f"{folder}: no matrix has a width that groups of {group_size} divide; use a smaller group_size"
        )
    prefix = prefix_of(config)
    total = sum(tensor.nbytes for job in jobs for tensor in job.made)
    return Plan(
        folder=folder,
        shards=shards,
        config=new_config(raw, jobs, prefix, QuantFormat(bits, group_size, "affine")),
        index={
            "metadata": {"total_size": total, "total_parameters": sum(math.prod(job.shape) for job in jobs)},
            "weight_map": {name: shard.name for shard in shards for name in sorted(shard.offsets)},
        },
        nbytes=sum(shard.nbytes for shard in shards),
        source_bytes=sum(job.nbytes for job in jobs),
    )


def check_format(bits: int, group_size: int) -> None:
    """Refuses with ParameterError what is not offered."""
    if bits not in BITS or isinstance(bits, bool):
        raise ParameterError(f"bits must be 4 or 8, got {bits!r}; choose one of these")
    if group_size not in AFFINE_GROUPS:
        raise ParameterError(f"group_size must be one of {AFFINE_GROUPS}, got {group_size!r}; 64 is usual")


def refuse_quantised(folder: Path, inventory: Inventory) -> None:
    if inventory.formats:
        raise CheckpointError(
            f"{folder}: only unquantised weights can be quantised, these are {inventory.usual_format()} already; "
            "load them as they are, or start from the bf16 version"
        )


def wanted_dtype(raw: dict[str, Any]) -> str | None:
    """The float type config.json asks for, where mlx-lm's conversion looks for it; None keeps each tensor's own."""
    text = raw.get("text_config")
    name = raw.get("torch_dtype")
    if name is None and isinstance(text, dict):
        name = text.get("dtype")
    return STORED_AS.get(name) if isinstance(name, str) else None


def make_jobs(
    inventory: Inventory, config: TargetConfig | DrafterConfig, bits: int, group_size: int, dtype: str | None
) -> list[Job]:
    """One job for each tensor the model needs; other towers and unused K/V are left behind."""
    jobs = []
    for path, shape in inventory.shapes.items():
        part = inventory.parts[path]["weight"]
        form = format_of(path, shape, bits, group_size)
        is_integer = path.endswith("token_ordering")
        stored = part.info.dtype if is_integer or dtype is None else dtype
        module = module_name(path, prefix_of(config))
        jobs.append(Job(path, part, shape, form, new_tensors(module, shape, stored, form)))
    return jobs


def new_tensors(
    module: str, shape: tuple[int, ...], dtype: str, form: QuantFormat | None
) -> tuple[NewTensor, ...]:
    """[..., K] dense, or packed words [..., K * bits / 32] with scales and biases [..., K / group]."""
    if form is None:
        return (NewTensor(module if module.endswith(NO_WEIGHT_SUFFIX) else f"{module}.weight", shape, dtype),)
    *outer, width = shape
    groups = (*outer, width // form.group_size)
    return (
        NewTensor(f"{module}.weight", (*outer, width * form.bits // 32), "U32"),
        NewTensor(f"{module}.scales", groups, dtype),
        NewTensor(f"{module}.biases", groups, dtype),
    )


def prefix_of(config: TargetConfig | DrafterConfig) -> str:
    """What stands before the text model's names: as mlx-lm writes targets, as published for drafters."""
    is_nested = isinstance(config, TargetConfig) and config.multimodal
    return "language_model.model." if is_nested else "model."


def module_name(path: str, prefix: str) -> str:
    """A canonical path -> the module's name in the new files."""
    if path.startswith(TOP_LEVEL):
        return path
    return prefix + path.replace(".experts.", ".experts.switch_glu.")


def new_config(raw: dict[str, Any], jobs: list[Job], prefix: str, form: QuantFormat) -> dict[str, Any]:
    """config.json as mlx-lm saves it: with the format, the matrices that differ, and without the vision tower's."""
    quantization: dict[str, Any] = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
    for job in jobs:
        if job.form is not None and job.path.endswith(CHOOSERS):
            own = {"group_size": job.form.group_size, "bits": job.form.bits}
            quantization[module_name(job.path, prefix)] = own
    kept = {name: value for name, value in raw.items() if name not in ("_name_or_path", "vision_config")}
    return dict(sorted({**kept, "quantization": quantization, "quantization_config": quantization}.items()))


def cut_into_shards(jobs: list[Job], limit: int) -> tuple[Shard, ...]:
    """Jobs in order, `limit` bytes a file; a larger matrix gets a file of its own."""
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        nbytes = sum(tensor.nbytes for tensor in job.made)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += nbytes
    if len(groups) == 1:
        return (make_shard("model.safetensors", groups[0]),)
    return tuple(
        make_shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, 1)
    )


def make_shard(name: str, jobs: list[Job]) -> Shard:
    """The header of one file; wider types come first, so that every tensor is aligned to its own type."""
    tensors = [tensor for job in jobs for tensor in job.made]
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    starts: dict[str, int] = {}
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype]):
        starts[tensor.name] = at
        at += tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], at],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(name, header, offsets, tuple(jobs), len(header) + at)
