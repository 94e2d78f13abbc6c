"""What was published of MTP's gain with Gemma 4 on Apple's chips at batch 1, to check predictions against."""

from dataclasses import dataclass

# Engines written in Python, by how their sources begin; mlxcel (Rust), Ollama (Go) and mlx-swift-lm are not.
PYTHON = ("mlx-vlm", "r/LocalLLaMA", "lilting.ch", "oMLX", "a user's oMLX", "Rapid-MLX")


@dataclass(frozen=True, slots=True)
class Gain:
    """One published speed-up over plain decoding, with what its source says of how it was got.

    value: None where the source says only that it was slower.
    drafts: the block less one; 3 where it was not given.
    tokens, accepted: tokens a round, or accepted of drafted, where the source says.
    bits, mlp_bits, drafter_bits: of the target, of its dense MLP (None: as shipped), of the drafter (16 if not given).
    has_wide: False where MLX was older than 0.32 (26 June 2026), which had no product for several rows.
    is_exact: each row got the bits of one row, which rules that product out as well.
    is_affine: False for nvfp4, for which older chips have that product too.
    """

    size: str
    chip: str
    text: str
    value: float | None
    source: str
    drafts: int = 3
    tokens: float | None = None
    accepted: float | None = None
    bits: int = 4
    mlp_bits: int | None = None
    drafter_bits: int = 16
    context: int = 1024
    has_wide: bool = True
    is_exact: bool = False
    is_affine: bool = True
    note: str = ""

    @property
    def pays(self) -> bool | None:
        """The side of 1.0; None within 2 % of it."""
        if self.value is None:
            return False
        return None if abs(self.value - 1) <= 0.02 else self.value > 1

    @property
    def is_python(self) -> bool:
        """The engine builds a round's graph in Python once the round before is read; others are compiled."""
        return self.source.startswith(PYTHON)

    @property
    def has_acceptance(self) -> bool:
        """Whether the source says how much was accepted in this very row."""
        return self.tokens is not None or self.accepted is not None


MLXCEL = "mlxcel docs/benchmarks.md"
FIRST = "mlxcel #159"  # prompts: its gemma4-mtp-speculative-decoding.md
HOT = "mlxcel gemma4-31b-mtp-exactness"
REDDIT = "r/LocalLLaMA, 8 May"
LILTING = "lilting.ch, mlx-vlm 0.5.0"
VLM = "mlx-vlm #1121"
USER = "a user's oMLX benchmark file"
INFERRED = "chip by its plain speed"


def _exact(text: str, value: float, accepted: int, drafted: int, mlp_bits: int | None = None) -> Gain:
    note = "QAT, hot" if mlp_bits else "hot"
    return Gain(
        "31b",
        "M5 Max",
        text,
        value,
        HOT,
        accepted=accepted / drafted,
        mlp_bits=mlp_bits,
        is_exact=True,
        note=note,
    )


def _twelve(chip: str, text: str, value: float, tokens: float, drafts: int, is_exact: bool = False) -> Gain:
    return Gain("12b", chip, text, value, MLXCEL, drafts, tokens, drafter_bits=4, is_exact=is_exact)


GAINS = (
    Gain("31b", "M3 Ultra", "list", 2.65, MLXCEL, tokens=3.990),
    Gain("31b", "M3 Ultra", "code", 2.41, MLXCEL, tokens=3.646),
    Gain("31b", "M3 Ultra", "prose", 1.95, MLXCEL, tokens=2.956),
    Gain("31b", "M5 Max", "explain", 1.39, FIRST, has_wide=False),
    Gain("31b", "M5 Max", "prose", 1.29, FIRST, has_wide=False),
    Gain("31b", "M5 Max", "explain", 1.20, FIRST, has_wide=False),
    _exact("science", 1.38, 167, 264),
    _exact("software", 1.31, 157, 293),
    _exact("history", 1.18, 154, 303),
    _exact("science", 1.14, 146, 329, mlp_bits=8),
    _exact("software", 0.85, 133, 367, mlp_bits=8),
    _exact("history", 1.21, 139, 349, mlp_bits=8),
    Gain("31b", "M4 Pro", "mean", 1.00, VLM, 2, tokens=2.10, has_wide=False, note=INFERRED),
    Gain("31b", "M4 Pro", "mean", 0.65, VLM, 5, tokens=2.65, has_wide=False, note=INFERRED),
    Gain("31b", "M1 Max", "code", None, LILTING, has_wide=False),
    Gain(
        "31b",
        "M1 Ultra",
        "mean",
        0.855,
        "mlxcel #216, #1621",
        accepted=0.529,
        note="0.75 to 0.96; accepted by #1621",
    ),
    Gain("26b-a4b", "M4 Max", "code", 1.53, REDDIT, accepted=0.66, has_wide=False),
    Gain("26b-a4b", "M4 Max", "prose", 0.95, REDDIT, accepted=0.31, has_wide=False),
    Gain("26b-a4b", "M4 Max", "JSON", 0.50, REDDIT, accepted=0.08, has_wide=False),
    Gain("26b-a4b", "M5", "code", 1.215, USER, 4, tokens=3.35, drafter_bits=4, is_affine=False),
    Gain("26b-a4b", "M5", "chat", 0.995, USER, 4, tokens=2.60, drafter_bits=4, is_affine=False),
    Gain("26b-a4b", "M2 Max", "mean", 1.21, "Rapid-MLX #3593", accepted=0.90),
    Gain("26b-a4b", "M1 Max", "code", 1.13, LILTING, has_wide=False),
    Gain("26b-a4b", "M1 Max", "prose", None, LILTING, has_wide=False, note="haiku"),
    Gain("26b-a4b", "M1 Pro", "mean", 0.93, "oMLX #2748", accepted=0.708, context=4096),
    Gain("26b-a4b", "M1 Pro", "mean", 0.79, "oMLX #2748", accepted=0.611, context=16384),
    Gain("26b-a4b", "M2 Pro", "chat", 0.88, USER, drafter_bits=4, is_affine=False),
    _twelve("M5 Max", "list", 3.14, 3.990, 3),
    _twelve("M5 Max", "code", 2.79, 3.646, 4),
    _twelve("M5 Max", "prose", 1.90, 2.463, 3),
    _twelve("M5 Max", "code", 2.14, 3.646, 4, is_exact=True),
    Gain("12b", "M5 Max", "code", 1.89, "Ollama 0.31 blog", is_affine=False, note="agent"),
    _twelve("M3 Ultra", "list", 2.61, 3.912, 3),
    _twelve("M3 Ultra", "code", 2.16, 3.477, 4),
    _twelve("M3 Ultra", "prose", 1.74, 2.625, 3),
    _twelve("M3 Ultra", "code", 1.83, 3.477, 4, is_exact=True),
    Gain("12b", "M3 Ultra", "mean", 0.94, "Rapid-MLX #1013", has_wide=False),
    _twelve("M1 Ultra", "list", 1.48, 3.990, 3),
    _twelve("M1 Ultra", "code", 1.25, 3.934, 4),
    _twelve("M1 Ultra", "prose", 0.95, 2.574, 3),
    Gain("e4b", "M4 Pro", "mean", 0.58, VLM, tokens=1.43, bits=16, has_wide=False, note=INFERRED),
    Gain("e4b", "M4 Pro", "mean", 0.52, VLM, 1, tokens=1.24, bits=16, has_wide=False, note=INFERRED),
    Gain("e4b", "M5 Max", "mean", None, "mlx-swift-lm #275", bits=16, has_wide=False),
    Gain("e4b", "M1 Max", "mean", None, LILTING, bits=16, has_wide=False),
)
LEFT_OUT = (
    "batches (31B and 26B-A4B on M3 Max, M5 Max; E4B on M3 Max: the predictions are for one row)",
    "rows without a chip (gmlx, Rapid-MLX #1063, oMLX #2786 and #1909, mlx-swift-lm #267)",
    "other drafters (EAGLE-3, DSpark) and other engines' kernels (llama.cpp, LiteRT)",
)
