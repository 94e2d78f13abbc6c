"""Short names for published Gemma 4 models in MLX's format, each with its drafter and where its id was read.

None of the ids could be looked up on the hub when this table was written: every entry says so (`verified`).
"""

import re
from dataclasses import dataclass

BITS = {"4bit": 4, "8bit": 8, "bf16": 16}
# Each size as `published_configs` calls it.
SHAPES = {"e2b": "e2b", "e4b": "e4b", "12b": "12b", "26b": "26b-a4b", "31b": "31b"}
SIZES = tuple(SHAPES)
DEFAULT_PRECISION = "4bit"

CARD = "the model's own page"
LAYR_26B = "https://github.com/Layr-Labs/mlxfast-gemma4-26b-a4b-engine (pinned to a commit)"
LAYR_31B = "https://github.com/Layr-Labs/mlxfast-challenge-dev (pinned to a commit)"
MELIX = "https://github.com/Keith-CY/melix (scripts/gemma4_qat_runtime_evidence.py)"
MLX_VLM = "https://github.com/Blaizzy/mlx-vlm (mlx_vlm/speculative/drafters/gemma4_assistant/README.md)"
OLLAMA = "https://github.com/ollama/ollama/issues/16740"
PROSPER = "https://github.com/ventsislav-georgiev/prosper (the app's list of models)"
QUOTED = "quoted by several public repositories, one of which compared its files (23.92 GB); no page of it was read"
RAPID = "https://github.com/raullenchai/Rapid-MLX/pull/523"


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name such as "e4b:4bit" and what it stands for.

    bits: of most matrices, 16 where nothing is quantised; mlp_bits: of the dense MLPs, which the quantisation-aware
    conversions keep at 8; download_gb: of the target's weight files (10^9 bytes) as its sources give it, with the
    vision and audio parts that are never loaded. source, drafter_source: where the two ids were read.
    """

    name: str
    size: str
    bits: int
    target: str
    drafter: str
    mlp_bits: int
    download_gb: float | None
    source: str
    drafter_source: str
    verified: bool = False

    @property
    def shape(self) -> str:
        """The size's name in `published_configs`."""
        return SHAPES[self.size]


# name, target and drafter after "mlx-community/gemma-4-", bits of dense MLPs, GB of weight files, where the target's id
# was read, where the drafter's. Why these among several conversions and drafters: docs/models.md.
PREFIX = "mlx-community/gemma-4-"
_TABLE: tuple[tuple[str, str, str, int, float | None, str, str], ...] = (
    ("e2b:4bit", "E2B-it-qat-4bit", "E2B-it-qat-assistant-bf16", 8, 4.3, MELIX, MELIX),
    ("e2b:8bit", "E2B-it-qat-8bit", "E2B-it-qat-assistant-bf16", 8, 5.9, CARD, MELIX),
    ("e2b:bf16", "E2B-it-bf16", "E2B-it-assistant-bf16", 16, None, MLX_VLM, MLX_VLM),
    ("e4b:4bit", "E4B-it-qat-4bit", "E4B-it-qat-assistant-bf16", 8, 6.8, OLLAMA, MELIX),
    ("e4b:8bit", "E4B-it-qat-8bit", "E4B-it-qat-assistant-bf16", 8, 8.9, PROSPER, MELIX),
    ("e4b:bf16", "E4B-it-bf16", "E4B-it-assistant-bf16", 16, None, MLX_VLM, CARD),
    ("12b:4bit", "12B-it-qat-4bit", "12B-it-qat-assistant-4bit", 8, 11.0, RAPID, CARD),
    ("12b:8bit", "12B-it-qat-8bit", "12B-it-qat-assistant-4bit", 8, 12.6, RAPID, CARD),
    ("12b:bf16", "12B-it-bf16", "12B-it-assistant-bf16", 16, 23.9, QUOTED, CARD),
    ("26b:4bit", "26B-A4B-it-qat-4bit", "26B-A4B-it-qat-assistant-4bit", 8, 15.6, RAPID, LAYR_26B),
    ("26b:8bit", "26B-A4B-it-qat-8bit", "26B-A4B-it-qat-assistant-4bit", 8, 28.0, PROSPER, LAYR_26B),
    ("26b:bf16", "26B-A4B-it-bf16", "26B-A4B-it-assistant-bf16", 16, None, MLX_VLM, MLX_VLM),
    ("31b:4bit", "31B-it-qat-4bit", "31B-it-qat-assistant-4bit", 8, 28.8, RAPID, LAYR_31B),
    ("31b:8bit", "31B-it-qat-8bit", "31B-it-qat-assistant-4bit", 8, None, RAPID, LAYR_31B),
    ("31b:bf16", "31B-it-bf16", "31B-it-assistant-bf16", 16, None, MLX_VLM, MLX_VLM),
)


def _where(source: str, repo: str) -> str:
    return f"https://huggingface.co/{PREFIX}{repo}" if source == CARD else source


ALIASES: tuple[Alias, ...] = tuple(
    Alias(
        name=name,
        size=name.partition(":")[0],
        bits=BITS[name.partition(":")[2]],
        target=PREFIX + target,
        drafter=PREFIX + drafter,
        mlp_bits=mlp_bits,
        download_gb=download_gb,
        source=_where(source, target),
        drafter_source=_where(drafter_source, drafter),
    )
    for name, target, drafter, mlp_bits, download_gb, source, drafter_source in _TABLE
)
_BY_NAME = {alias.name: alias for alias in ALIASES}
# What the two publishers call a size's models: google/gemma-4-E4B-it, mlx-community/gemma-4-e4b-it-4bit, ...
# What may follow says how the weights are stored; any other word makes it a model of its own, such as a fine-tune.
_STORED = r"(?:-(?:qat|[2-8]bit|bf16|fp16|mxfp[48]|nvfp4|q4_0|unquantized|optiq|dwq|mlx|aligned))*"
_PUBLISHED = re.compile(
    rf"(?P<org>google|mlx-community)/gemma-4-(?P<size>e2b|e4b|12b|26b-a4b|31b)-it(?P<rest>{_STORED})"
)
_SIZE_OF_SHAPE = {shape: size for size, shape in SHAPES.items()}


def find_alias(text: str) -> Alias | None:
    """The alias of a name such as "e4b:8bit" or "e4b" (the 4-bit one), in any case; None where there is none."""
    size, colon, precision = text.casefold().partition(":")
    size = _SIZE_OF_SHAPE.get(size, size)
    return _BY_NAME.get(f"{size}:{precision if colon else DEFAULT_PRECISION}")


def alias_of(repo_id: str) -> Alias | None:
    """The alias whose target this id is, in any case; Google's own ids are the unquantised one. None for all others."""
    name = repo_id.casefold()
    found = _PUBLISHED.fullmatch(name)
    if found is not None and found["org"] == "google" and found["rest"] in ("", "-qat-q4_0-unquantized"):
        return _BY_NAME[f"{_SIZE_OF_SHAPE[found['size']]}:bf16"]
    return next((alias for alias in ALIASES if alias.target.casefold() == name), None)


def assistants_of(repo_id: str) -> str | None:
    """The drafter published for a target of Google's or mlx-community's, by its id; None for all others.

    Targets trained for quantisation have drafters of their own, in Google's repositories as in MLX's.
    """
    found = _PUBLISHED.fullmatch(repo_id.casefold())
    if found is None:
        return None
    shape, is_qat = found["size"], "-qat" in found["rest"]
    if found["org"] == "mlx-community":
        return stock_assistant(shape, is_qat=is_qat)
    name = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b-a4b": "26B-A4B", "31b": "31B"}[shape]
    return f"google/gemma-4-{name}-it{'-qat-q4_0-unquantized' if is_qat else ''}-assistant"


def stock_assistant(shape: str, *, is_qat: bool = False) -> str:
    """The drafter of a size (as `published_configs` names it), for the quantisation-aware or the plain target."""
    return _BY_NAME[f"{_SIZE_OF_SHAPE[shape]}:{'4bit' if is_qat else 'bf16'}"].drafter
