"""What was published of Gemma 4 on Apple's chips, to check predictions against; the chips are in `mlx_mtp.chips`."""

from dataclasses import dataclass

from mlx_mtp.chips import CHIPS, OTHERS

__all__ = ["CHIPS", "OTHERS", "PUBLISHED", "Published"]


@dataclass(frozen=True, slots=True)
class Published:
    """One published figure: `tokens a second` without drafts, or the cost of a `round` with drafts in plain steps."""

    size: str
    chip: str
    what: str
    drafts: int
    value: float
    source: str
    bits: int = 4
    mlp_bits: int = 4
    drafter_bits: int = 4


PUBLISHED = (
    Published("31b", "M3 Ultra", "tokens a second", 0, 31.7, "mlxcel docs/benchmarks.md, #1217"),
    Published("31b", "M5 Max", "tokens a second", 0, 26.1, "mlxcel #159"),
    Published("31b", "M1 Ultra", "tokens a second", 0, 18.2, "mlxcel #216"),
    Published("12b", "M5 Max", "tokens a second", 0, 43.3, "mlxcel docs/benchmarks.md", mlp_bits=8),
    Published("12b", "M3 Ultra", "tokens a second", 0, 66.4, "Rapid-MLX #1013", mlp_bits=8),
    Published("26b-a4b", "M4 Max", "tokens a second", 0, 75.0, "r/LocalLLaMA, bits not given"),
    Published("26b-a4b", "M5", "tokens a second", 0, 39.0, "a user's oMLX benchmark file"),
    Published("26b-a4b", "M4 Pro", "tokens a second", 0, 46.9, "mlx-dspark README", bits=8, mlp_bits=8),
    Published("26b-a4b", "M2 Pro", "tokens a second", 0, 44.3, "a user's benchmark file, nvfp4"),
    Published("26b-a4b", "M1 Pro", "tokens a second", 0, 28.5, "oMLX #2748, 4k context"),
    Published("31b", "M3 Ultra", "round", 3, 1.51, "mlxcel #1217, fitted", drafter_bits=16),
    Published("12b", "M5 Max", "round", 3, 1.28, "mlxcel docs/benchmarks.md", mlp_bits=8),
    Published("12b", "M3 Ultra", "round", 3, 1.51, "mlxcel docs/benchmarks.md", mlp_bits=8),
    Published("12b", "M1 Ultra", "round", 3, 2.71, "mlxcel docs/benchmarks.md", mlp_bits=8),
    Published("26b-a4b", "M5", "round", 4, 2.70, "a user's oMLX benchmark file"),
)
