"""What was published of MTP's gain with Gemma 4 on Apple's chips at batch 1, to check predictions against."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gain:
    """One published speed-up over plain decoding; `value` None: only that it was slower.

    drafts: the block less one; 3 where it was not given. drafter_bits: 16 where not given. is_exact: the engine
    verified with products that give each row the bits of one row. accepted: accepted of drafted, where the source says.
    """

    size: str
    chip: str
    text: str
    value: float | None
    source: str
    drafts: int = 3
    bits: int = 4
    drafter_bits: int = 16
    is_exact: bool = False
    accepted: float | None = None
    note: str = ""

    @property
    def pays(self) -> bool | None:
        """The side of 1.0; None within 2 % of it."""
        if self.value is None:
            return False
        return None if abs(self.value - 1) <= 0.02 else self.value > 1


MLXCEL = "mlxcel docs/benchmarks.md"
HOT = "mlxcel 31b-mtp-exactness"
INFERRED = "chip by its plain speed"

GAINS = (
    Gain("31b", "M3 Ultra", "list", 2.65, MLXCEL),
    Gain("31b", "M3 Ultra", "code", 2.41, MLXCEL),
    Gain("31b", "M3 Ultra", "prose", 1.95, MLXCEL),
    Gain("31b", "M5 Max", "list", 1.39, "mlxcel #159", is_exact=True),
    Gain("31b", "M5 Max", "code", 1.29, "mlxcel #159", is_exact=True),
    Gain("31b", "M5 Max", "prose", 1.20, "mlxcel #159", is_exact=True),
    Gain("31b", "M5 Max", "list", 1.38, HOT, is_exact=True, note="hot"),
    Gain("31b", "M5 Max", "code", 1.31, HOT, is_exact=True, note="hot"),
    Gain("31b", "M5 Max", "prose", 1.18, HOT, is_exact=True, note="hot"),
    Gain("31b", "M5 Max", "list", 1.14, HOT, is_exact=True, note="QAT, hot"),
    Gain("31b", "M5 Max", "code", 0.85, HOT, is_exact=True, note="QAT, hot"),
    Gain("31b", "M5 Max", "prose", 1.21, HOT, is_exact=True, note="QAT, hot"),
    Gain("31b", "M4 Pro", "mean", 1.00, "mlx-vlm #1121", drafts=2, note=INFERRED),
    Gain("31b", "M4 Pro", "mean", 0.65, "mlx-vlm #1121", drafts=5, note=INFERRED),
    Gain("31b", "M1 Max", "mean", None, "lilting.ch"),
    Gain("31b", "M1 Ultra", "mean", 0.855, "mlxcel #216, #1613", note="middle of 0.75 to 0.96"),
    Gain("26b-a4b", "M4 Max", "code", 1.53, "r/LocalLLaMA"),
    Gain("26b-a4b", "M4 Max", "prose", 0.95, "r/LocalLLaMA"),
    Gain("26b-a4b", "M4 Max", "JSON", 0.50, "r/LocalLLaMA"),
    Gain("26b-a4b", "M5", "code", 1.215, "a user's oMLX file", drafts=4),
    Gain("26b-a4b", "M5", "chat", 0.995, "a user's oMLX file", drafts=4),
    Gain("26b-a4b", "M2 Max", "mean", 1.21, "Rapid-MLX #3593", accepted=0.90),
    Gain("26b-a4b", "M1 Max", "code", 1.13, "lilting.ch"),
    Gain("26b-a4b", "M1 Max", "prose", None, "lilting.ch", note="haiku"),
    Gain("26b-a4b", "M1 Pro", "mean", 0.93, "oMLX #2748", note="4k context"),
    Gain("26b-a4b", "M1 Pro", "mean", 0.79, "oMLX #2748", note="16k context"),
    Gain("26b-a4b", "M2 Pro", "mean", 0.88, "a user's benchmark file", note="nvfp4"),
    Gain("12b", "M5 Max", "list", 3.14, MLXCEL, drafter_bits=4),
    Gain("12b", "M5 Max", "code", 2.79, MLXCEL, drafter_bits=4),
    Gain("12b", "M5 Max", "prose", 1.90, MLXCEL, drafter_bits=4),
    Gain("12b", "M5 Max", "code", 2.14, MLXCEL, drafter_bits=4, is_exact=True),
    Gain("12b", "M5 Max", "code", 1.89, "Ollama 0.31 blog", note="agent, nvfp4"),
    Gain("12b", "M3 Ultra", "list", 2.61, MLXCEL, drafter_bits=4),
    Gain("12b", "M3 Ultra", "code", 2.16, MLXCEL, drafter_bits=4),
    Gain("12b", "M3 Ultra", "prose", 1.74, MLXCEL, drafter_bits=4),
    Gain("12b", "M3 Ultra", "code", 1.83, MLXCEL, drafter_bits=4, is_exact=True),
    Gain("12b", "M3 Ultra", "mean", 0.94, "Rapid-MLX #1013"),
    Gain("12b", "M1 Ultra", "list", 1.48, MLXCEL, drafter_bits=4),
    Gain("12b", "M1 Ultra", "code", 1.25, MLXCEL, drafter_bits=4),
    Gain("12b", "M1 Ultra", "prose", 0.95, MLXCEL, drafter_bits=4),
    Gain("e4b", "M4 Pro", "mean", 0.58, "mlx-vlm #1121", bits=16, accepted=0.11, note=INFERRED),
    Gain("e4b", "M4 Pro", "mean", 0.52, "mlx-vlm #1121", bits=16, drafts=1, accepted=0.11, note=INFERRED),
    Gain("e4b", "M5 Max", "mean", None, "mlx-swift-lm #275", bits=16),
    Gain("e4b", "M1 Max", "mean", None, "lilting.ch", bits=16),
)
LEFT_OUT = (
    "batches (31B and 26B-A4B on M3 Max, M5 Max; E4B on M3 Max: the predictions are for one row)",
    "rows without a chip (gmlx, Rapid-MLX #1063, oMLX #2786 and #1909, mlx-swift-lm #267)",
    "other drafters (EAGLE-3, DSpark) and other engines' kernels (llama.cpp, LiteRT)",
)
