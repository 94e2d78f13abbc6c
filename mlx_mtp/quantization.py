"""MLX's quantised formats: what config.json claims, and what a matrix's stored shapes say."""

from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.config_fields import is_integer, shown, shown_name
from mlx_mtp.errors import CheckpointError
from mlx_mtp.headers import FLOATS, TensorInfo
from mlx_mtp.tensor_names import canonical_path

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# MLX's other modes allow one (bits, group size) each.
MODE_OF = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}
MODES = ("affine", *MODE_OF.values())
MLX_METHODS = ("mxfp4", "mxfp8")


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """How one matrix is packed: bits a value, values that share a scale, and MLX's mode."""

    bits: int
    group_size: int
    mode: str

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"


@dataclass(frozen=True, slots=True)
class QuantClaims:
    """What config.json says: a default, and by canonical path a format, or None for a matrix left dense."""

    default: QuantFormat | None = None
    by_path: dict[str, QuantFormat | None] = field(default_factory=dict)


def parse_quantization(raw: dict[str, Any], source: str) -> QuantClaims:
    """Read `quantization` or `quantization_config`; refuses other libraries' and impossible formats."""
    text = raw.get("text_config")
    places = [raw, text] if isinstance(text, dict) else [raw]
    for name in ("quantization", "quantization_config"):
        for place in places:
            if place.get(name):
                return parse_claims(place[name], f"{source} [{name}]")
    return QuantClaims()


def parse_claims(entry: Any, source: str) -> QuantClaims:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{source}: must be an object, got {shown(entry)}; download the model again")
    method = entry.get("quant_method")
    if method is not None and method not in MLX_METHODS:
        raise CheckpointError(
            f"{source}: weights must be dense or quantised by MLX, got quant_method {shown(method)}; "
            "use the unquantised model, or one converted by mlx-lm or mlx-vlm"
        )
    if method is None:
        default = parse_format(entry, source, None)
    else:
        default = next(QuantFormat(*pair, mode) for pair, mode in MODE_OF.items() if mode == method)
    by_path: dict[str, QuantFormat | None] = {}
    for path, value in entry.items():
        if value is False:
            by_path[canonical_path(path)] = None
        elif isinstance(value, dict):
            by_path[canonical_path(path)] = parse_format(value, f"{source} [{shown_name(path)}]", default)
    return QuantClaims(default, by_path)


def parse_format(entry: dict[str, Any], source: str, default: QuantFormat | None) -> QuantFormat:
    """bits, group_size and mode of one entry; a mode but nothing else stands for that mode's own numbers."""
    mode = entry.get("mode", "affine")
    usual = {name: pair for pair, name in MODE_OF.items()} | {"affine": (4, 64)}
    if not isinstance(mode, str) or mode not in usual:
        raise CheckpointError(
            f"{source}: mode must be one of {', '.join(MODES)}, got {shown(mode)}; convert the model again"
        )
    usual_bits, usual_group = usual[mode]
    if default is not None and default.mode == mode:
        usual_bits, usual_group = default.bits, default.group_size
    bits, group = entry.get("bits", usual_bits), entry.get("group_size", usual_group)
    if not is_integer(bits) or not is_integer(group) or mode_of(bits, group, mode != "affine") != mode:
        raise CheckpointError(
            f"{source}: MLX has no {mode} format with bits {shown(bits)} and group_size {shown(group)}; "
            "convert the model again"
        )
    return QuantFormat(bits, group, mode)


def mode_of(bits: int, group: int, is_block_float: bool) -> str | None:
    """MLX's mode for these numbers, None where it has no such format."""
    if is_block_float:
        return MODE_OF.get((bits, group))
    return "affine" if bits in AFFINE_BITS and group in AFFINE_GROUPS else None


def stored_format(
    path: str, shape: tuple[int, ...], parts: dict[str, TensorInfo], claims: QuantClaims
) -> QuantFormat:
    """The format of the matrix at `path` with logical `shape`, worked out from its stored shapes.

    The shapes leave only one possibility; a claim in config.json for this very path must agree with it.
    """
    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    if claims.default is None:
        raise CheckpointError(
            f"{weight.file}: {path} is quantised but config.json has no quantization entry; "
            "restore the config.json that was written with the weights"
        )
    columns = shape[-1]
    bits, bits_rest = divmod(weight.shape[-1] * 32, columns)
    group, group_rest = divmod(columns, max(scales.shape[-1], 1))
    is_block_float = scales.dtype == "U8"
    mode = mode_of(bits, group, is_block_float)
    shapes_fit = weight.shape[:-1] == scales.shape[:-1] == shape[:-1] and not bits_rest and not group_rest
    if is_block_float:
        biases_fit = biases is None
    else:
        same = biases is not None and (biases.shape, biases.dtype) == (scales.shape, scales.dtype)
        biases_fit = same and scales.dtype in FLOATS
    if mode is None or not shapes_fit or not biases_fit or weight.dtype != "U32":
        stored = ", ".join(f"{part} {info.dtype} {list(info.shape)}" for part, info in parts.items())
        raise CheckpointError(
            f"{weight.file}: {path} must be a quantised {list(shape)} matrix, got {stored}; "
            "convert or download the model again"
        )
    found = QuantFormat(bits, group, mode)
    if claims.by_path.get(path, found) != found:
        raise CheckpointError(
            f"{weight.file}: config.json says that {path} is {claims.by_path[path] or 'not quantised'}, "
            f"its tensors are {found}; restore the config.json that was written with the weights"
        )
    return found
