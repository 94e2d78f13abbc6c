"""Matching what the files hold against what the model needs: names, shapes, dtypes and quantisation."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.config_fields import shown_name
from mlx_mtp.errors import CheckpointError
from mlx_mtp.headers import FLOATS, TensorInfo
from mlx_mtp.model_files import Seen
from mlx_mtp.quantization import QuantClaims, QuantFormat, stored_format
from mlx_mtp.tensor_names import canonical_name, expected_tensors, is_shared_kv

INTEGERS = ("I64", "U64", "I32", "U32")
FUSED = "experts.gate_up_proj"
HALVES = ("experts.gate_proj", "experts.up_proj")


@dataclass(frozen=True, slots=True)
class Part:
    """Where one array comes from: a stored tensor, or half 0 or 1 of its second to last axis."""

    info: TensorInfo
    half: int | None = None

    @property
    def logical(self) -> TensorInfo:
        """The header entry with the shape that this part has."""
        if self.half is None:
            return self.info
        *lead, rows, columns = self.info.shape
        shape = (*lead, rows // 2, columns)
        return TensorInfo(
            self.info.name, shape, self.info.dtype, self.info.file, self.info.offset, self.info.nbytes
        )


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything the model needs, found: its parts, logical shapes and formats by canonical path."""

    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, dict[str, Part]]
    formats: dict[str, QuantFormat]
    warnings: tuple[str, ...] = field(default=())
    seen: tuple[Seen, ...] = field(default=())  # the files before their headers were read

    def infos(self) -> Iterator[TensorInfo]:
        """Each stored tensor that is used, once."""
        seen = {part.info.name: part.info for parts in self.parts.values() for part in parts.values()}
        return iter(seen.values())

    def usual_format(self) -> str | None:
        """The most common format in words, None for a model that is dense throughout."""
        if not self.formats:
            return None
        return str(Counter(self.formats.values()).most_common(1)[0][0])


def take_inventory(
    headers: dict[str, TensorInfo],
    config: TargetConfig | DrafterConfig,
    claims: QuantClaims,
    folder: Path,
    warnings: list[str],
) -> Inventory:
    """Refuse missing tensors, wrong shapes or dtypes and wrong quantisation; warn of what is left over."""
    expected = expected_tensors(config)
    stored, ignored = sort_by_path(headers, config, folder)
    missing = [path for path in expected if "weight" not in stored.get(path, {})]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(expected)} tensors are missing "
            f"({', '.join(missing[:5])}); download the model again"
        )
    formats = {}
    for path, shape in expected.items():
        form = check_tensor(path, shape, stored[path], claims)
        if form is not None:
            formats[path] = form
    extra = [*ignored, *(path for path in stored if path not in expected)]
    if extra:
        warnings = [*warnings, f"{len(extra)} tensors are not used: {', '.join(map(shown_name, extra[:5]))}"]
    if claims.default is not None and claims.default not in formats.values():
        warnings = [*warnings, f"config.json speaks of {claims.default} weights, and no matrix is such"]
    parts = {path: stored[path] for path in expected}
    return Inventory(expected, parts, formats, tuple(warnings))


def sort_by_path(
    headers: dict[str, TensorInfo], config: TargetConfig | DrafterConfig, folder: Path
) -> tuple[dict[str, dict[str, Part]], list[str]]:
    """Canonical path -> part -> where it is; fused experts appear as two, shared layers' K/V not at all."""
    stored: dict[str, dict[str, Part]] = {}
    ignored: list[str] = []
    for info in headers.values():
        name = canonical_name(info.name)
        if name is None or is_shared_kv(name[0], config.text):
            continue
        path, part = name
        if path.endswith(FUSED) and (len(info.shape) < 2 or info.shape[-2] % 2):
            ignored.append(info.name)
            continue
        fused = path.endswith(FUSED)
        paths = [path.removesuffix(FUSED) + half for half in HALVES] if fused else [path]
        for half, target in enumerate(paths):
            if part in stored.setdefault(target, {}):
                other = stored[target][part].info
                raise CheckpointError(
                    f"{folder}: {target} must be stored once, got {shown_name(other.name)} and "
                    f"{shown_name(info.name)}; download the model again"
                )
            stored[target][part] = Part(info, half if fused else None)
    return stored, ignored


def check_tensor(
    path: str, shape: tuple[int, ...], parts: dict[str, Part], claims: QuantClaims
) -> QuantFormat | None:
    """The tensor's format, None where it is dense."""
    weight = parts["weight"].logical
    if len(shape) > 1 and "scales" in parts:
        logical = {part: where.logical for part, where in parts.items()}
        form = stored_format(path, shape, logical, claims)
        check_global_scale(path, shape, form, logical)
        return form
    stray = [part for part in parts if part != "weight"]
    if stray or (weight.dtype == "U32" and len(shape) > 1):
        raise CheckpointError(
            f"{weight.file}: {path} must be one float array or a whole quantised matrix, "
            f"got the parts {', '.join(sorted(parts))} of type {weight.dtype}; "
            "convert or download the model again"
        )
    if weight.shape != shape:
        raise CheckpointError(
            f"{weight.file}: {path} must have shape {list(shape)} by config.json, got {list(weight.shape)}; "
            "config and weights are of different models: download the model again"
        )
    allowed = INTEGERS if path.endswith("token_ordering") else FLOATS
    if weight.dtype not in allowed:
        raise CheckpointError(
            f"{weight.file}: {path} must be of type {', '.join(allowed)}, got {weight.dtype}; "
            "use the published model, or one converted by mlx-lm or mlx-vlm"
        )
    if claims.by_path.get(path) is not None:
        raise CheckpointError(
            f"{weight.file}: config.json says that {path} is {claims.by_path[path]}, its tensor is dense; "
            "restore the config.json that was written with the weights"
        )
    return None


def check_global_scale(
    path: str, shape: tuple[int, ...], form: QuantFormat, parts: dict[str, TensorInfo]
) -> None:
    """A tensor scale exists for nvfp4 experts only, one each."""
    scale = parts.get("global_scale")
    if scale is None:
        return
    is_experts = len(shape) == 3 and form.mode == "nvfp4"
    if not is_experts or scale.shape != shape[:1] or scale.dtype != "F32":
        raise CheckpointError(
            f"{scale.file}: {path} has a global_scale {scale.dtype} {list(scale.shape)}, "
            f"which only nvfp4 experts have, one F32 each; convert the model again"
        )
