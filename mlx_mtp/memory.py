"""What a model will take before a byte of it is downloaded: estimated from its configuration alone.

The figure is of the whole process: MLX's arrays at their peak, what its allocator keeps, and Python with its libraries.
How the parts add up, and how far they are from what was measured: docs/memory.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_mtp.checkpoint import read_config
from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.config_fields import is_integer
from mlx_mtp.config_parse import parse_drafter_config, parse_target_config
from mlx_mtp.errors import ParameterError
from mlx_mtp.memory_parts import (
    DRAFT_TOKENS,
    MIB,
    TOKENS_A_TURN,
    Formats,
    checkpoint_bytes,
    formats_of_bits,
    grown_layer_bytes,
    kv_bytes,
    prefill_bytes,
    round_bytes,
    weight_bytes,
)
from mlx_mtp.published_configs import SIZES, published_drafter, published_target
from mlx_mtp.quantization import parse_quantization
from mlx_mtp.tensor_names import expected_tensors

if TYPE_CHECKING:
    import mlx.core as mx

BITS = (4, 8, 16)
# Python, MLX and other libraries, compiled rounds: measured 70 to 130 MiB on a CPU. Metal's own heaps and compiled
# kernels come to it on a Mac: an allowance that nobody has measured yet.
BASE_ON_CPU, BASE_ON_GPU = 100 * MIB, 300 * MIB
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by use. Scratch of a prefill and of a round never exist at once, so `total` counts the larger."""

    weights: int
    drafter: int
    kv: int
    checkpoints: int
    prefill: int
    rounds: int
    overhead: int
    plain_rounds: int = field(default=0, repr=False)  # `rounds` without drafts

    @property
    def total(self) -> int:
        """The peak of the whole process with MTP."""
        return self.plain_base + self.drafter + max(self.prefill, self.rounds)

    @property
    def plain(self) -> int:
        """The peak without the drafter and without what drafting adds to a round."""
        return self.plain_base + max(self.prefill, self.plain_rounds)

    @property
    def plain_base(self) -> int:
        """What is there all the time, whether drafts are made or not."""
        return self.weights + self.kv + self.checkpoints + self.overhead

    @property
    def mtp_share(self) -> float:
        """What MTP adds, as a share of plain decoding: 0.05 is 5 %."""
        return self.total / self.plain - 1

    def lines(self) -> list[tuple[str, int]]:
        """What to show, in order; the figures add up to `total`."""
        return [
            ("weights", self.weights),
            ("drafter", self.drafter),
            ("K/V of the context", self.kv),
            ("checkpoints of turns", self.checkpoints),
            ("scratch", max(self.prefill, self.rounds)),
            ("Python, MLX, kernels", self.overhead),
        ]


def estimate_memory(
    model: "TargetConfig | dict[str, Any] | str | Path",
    context: int = 4096,
    batch: int = 1,
    *,
    bits: int | None = None,
    mlp_bits: int | None = None,
    drafter: "DrafterConfig | Literal['auto'] | None" = "auto",
    drafter_bits: "int | Literal['auto'] | None" = "auto",
    dtype: "mx.Dtype | str | None" = None,
    turns: int | None = None,
    prompt: int | None = None,
    wide_sampling: bool = False,
) -> MemoryEstimate:
    """Estimate the peak while `batch` conversations of `context` tokens run; opens no socket and reads no weights.

    model: an alias ("26b:4bit"), a folder, the contents of a config.json, or a parsed configuration. bits 4, 8 or 16
    (None: the alias's, or what config.json says); mlp_bits where the dense MLPs have others. drafter "auto": the one
    published for this shape; drafter_bits "auto": 4 for a quantised target, else 16 (None: as published, 16).
    dtype: of activations, K/V and dense weights; None is the file's bfloat16, a CPU takes "float32". turns: of a
    conversation, each leaves a checkpoint and makes K/V grow (None: one every 256 tokens). prompt: the longest prompt,
    of which a chunk is in work at once (None: as long as the context). wide_sampling: with penalties, or without a
    top_k of 64 or less.
    Raises ParameterError or CheckpointError.
    """
    _check_counts(context=context, batch=batch, prompt=prompt)
    _check_bits(bits=bits, mlp_bits=mlp_bits)
    if turns != 0:
        _check_counts(turns=turns)
    item = _dtype_bytes(dtype)
    config, formats = _resolve(model, bits, mlp_bits, item)
    small = _drafter_of(config) if drafter == "auto" else drafter
    text = config.text
    small_bytes = 0
    if small is not None:
        own_bits = _drafter_bits(drafter_bits, formats)
        small_bytes = weight_bytes(small, formats_of_bits(own_bits, expected_tensors(small), item))
    on_gpu = item != 4  # float32 is what only a CPU computes in; our kernels run on Metal only
    kv = kv_bytes(text, context, batch, item)
    moved = 0 if turns in (0, 1) else grown_layer_bytes(text, context, item)
    moved = (
        kv if batch > 1 else moved
    )  # rows are joined by copying them, a conversation grows by copying a layer
    return MemoryEstimate(
        weights=weight_bytes(config, formats),
        drafter=small_bytes,
        kv=kv,
        checkpoints=checkpoint_bytes(text, context // TOKENS_A_TURN if turns is None else turns, item),
        prefill=max(prefill_bytes(text, min(prompt or context, context), context, item), moved),
        rounds=round_bytes(
            text, context, batch, DRAFT_TOKENS if small else 0, wide=wide_sampling, kernels=on_gpu
        ),
        overhead=BASE_ON_GPU if on_gpu else BASE_ON_CPU,
        plain_rounds=round_bytes(text, context, batch, 0, wide=wide_sampling, kernels=on_gpu),
    )


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (not is_integer(value) or value < 1):
            raise ParameterError(f"{name} must be a whole number above 0, got {value!r}; choose one")


def _check_bits(**bits: int | None) -> None:
    for name, value in bits.items():
        if value is not None and value not in BITS:
            raise ParameterError(f"{name} must be 4, 8, 16 or None, got {value!r}; choose one of them")


def _dtype_bytes(dtype: "mx.Dtype | str | None") -> int:
    name = "bfloat16" if dtype is None else str(dtype).rpartition(".")[2]
    if name not in DTYPE_BYTES:
        raise ParameterError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}; choose one")
    return DTYPE_BYTES[name]


def _resolve(
    model: "TargetConfig | dict[str, Any] | str | Path", bits: int | None, mlp_bits: int | None, item: int
) -> tuple[TargetConfig, Formats]:
    """Any way to name a model -> its configuration and how its matrices are stored."""
    if isinstance(model, TargetConfig):
        return model, formats_of_bits(bits or 16, expected_tensors(model), item, mlp_bits)
    if isinstance(model, str) and not model.startswith(("./", "../", "/", "~")) and model not in (".", ".."):
        return _resolve_alias(model, bits, mlp_bits, item)
    if isinstance(model, dict):
        raw, source = model, "config.json"
    else:
        folder = Path(model).expanduser()
        raw, source = read_config(folder), str(folder / "config.json")
    config = parse_target_config(raw, source)
    claims = parse_quantization(raw, source)
    if bits is not None or claims.default is None:
        return config, formats_of_bits(bits or 16, expected_tensors(config), item, mlp_bits)
    return config, Formats(claims, item)


def _resolve_alias(
    name: str, bits: int | None, mlp_bits: int | None, item: int
) -> tuple[TargetConfig, Formats]:
    """An alias, or the name of a published size with `bits`."""
    from mlx_mtp.aliases import find_alias

    alias = find_alias(name)
    if alias is None and name not in SIZES:
        raise ParameterError(
            f'a model is an alias such as "e4b:4bit", a folder ("./path", "/path") or a config, got {name!r}; '
            "see the list of aliases with `mlx-mtp models list`"
        )
    size = name if alias is None else alias.shape
    if bits is None and alias is not None:
        bits, mlp_bits = alias.bits, alias.mlp_bits if mlp_bits is None else mlp_bits
    config = parse_target_config(published_target(size), size)
    return config, formats_of_bits(bits or 16, expected_tensors(config), item, mlp_bits)


def _drafter_of(config: TargetConfig) -> DrafterConfig | None:
    """The drafter published for a target of this shape, if it is a published one."""
    for size in SIZES:
        published = parse_target_config(published_target(size), size).text
        same = (published.hidden_size, published.layer_types) == (
            config.text.hidden_size,
            config.text.layer_types,
        )
        if same:
            return parse_drafter_config(published_drafter(size), size)
    return None


def _drafter_bits(asked: "int | Literal['auto'] | None", formats: Formats) -> int:
    if asked == "auto":
        return 16 if formats.claims.default is None else 4
    if asked not in (None, *BITS):
        raise ParameterError(
            f'drafter_bits must be "auto", None, 4, 8 or 16, got {asked!r}; choose one of them'
        )
    return asked or 16
