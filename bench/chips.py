"""What is known of Apple's chips and of kernels on them, each figure with where it was published; none is ours."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak figures; `generation` is the number in Metal's architecture name, applegpu_g13 for M1 up to g17 for M5."""

    name: str
    generation: int
    gb_per_second: float
    tflops: float  # float32 = float16 in shaders
    source: str


NEWSROOM = "Apple newsroom"
CHIPS = (
    Chip("M1 Max", 13, 400, 10.6, "philipturner/metal-benchmarks"),
    Chip("M2 Ultra", 14, 800, 27.2, "Apple specifications, 76 cores"),
    Chip("M3 Max", 15, 400, 14.3, "bandwidth: Apple; 40 cores at 1398 MHz: hmc-tech"),
    Chip("M3 Ultra", 15, 819, 28.4, "hmc-tech, 80 cores; 692 GB/s were measured, omlx#2238"),
    Chip("M4 Pro", 16, 273, 8.6, "bandwidth: Apple; 20 cores, from hmc-tech's 13.74 for 32"),
    Chip("M4 Max", 16, 546, 18.4, "skorppio, 40 cores"),
    Chip(
        "M5 Max",
        17,
        614,
        18.5,
        "Apple newsroom; 530 GB/s were measured, mlx#3837; its tensor units are not counted",
    ),
)
# Only to check the model against what was published for them.
OTHERS = (
    Chip("M1 Pro", 13, 200, 5.3, "half an M1 Max"),
    Chip("M1 Ultra", 13, 800, 21.2, "two M1 Max"),
    Chip("M2 Pro", 14, 200, 6.8, "bandwidth: Apple; a quarter of an M2 Ultra"),
    Chip("M5", 17, 153, 4.6, "bandwidth: Apple; a quarter of an M5 Max"),
)

BANDWIDTH_REACHED = 0.86  # of peak, dense products of one row: 530 of 614 (mlx#3837), 692 of 819 (omlx#2238)
ALU_REACHED = 0.75  # of peak: an assumption
LAUNCH_SECONDS = (
    2.75e-6  # 3,200 tiny dependent kernels took 8.8 ms on an M3 Ultra, mlx#4521; taken for all chips
)


@dataclass(frozen=True, slots=True)
class Curve:
    """Time of a product of M rows over that of one row, at a few M; linear in between and beyond the last."""

    rows: tuple[int, ...]
    times: tuple[float, ...]
    source: str

    def __call__(self, rows: int) -> float:
        if rows > self.rows[-1]:
            slope = (self.times[-1] - self.times[-2]) / (self.rows[-1] - self.rows[-2])
            return self.times[-1] + slope * (rows - self.rows[-1])
        return float(np.interp(rows, self.rows, self.times))


BEFORE_M3 = Curve(
    (1, 4, 8), (1, 1.89, 3.44), "qmv of MLX 0.31.2 on an M4 Pro, mlx#3839: M1 and M2 have no other"
)
M3_AND_M4 = Curve(
    (1, 2, 3, 4, 6, 8), (1, 1.10, 1.31, 1.50, 2.06, 2.58), "qmv_wide on an M4 Pro, mlx#3839, two shapes"
)
M5 = Curve((1, 3, 5, 8), (1, 1.11, 1.42, 2.20), "a whole 70B model on an M5 Max, mlx#3791")
# Not ours: what another project's kernel of the same kind reached, 0.379 -> 0.313 ms at 5 rows, 0.580 -> 0.314 at 8.
SKINNY = Curve((1, 5, 8), (1, 1.42, 1.44), "skinny_qmm on an M4 Pro, mlx-dspark README, over M3_AND_M4")

# Share of BANDWIDTH_REACHED at which gather_qmm reads experts, by rows: 258-387 and 542 of 690 GB/s, mlx#4509.
GATHER = Curve((1, 4, 5), (0.47, 0.79, 0.79), "gather_qmm on an M3 Ultra, mlx#4509 and omlx#2238")
# Attention over 32k keys at head_dim 256 on an M4 Pro, mlx-dspark README: stock 0.72, 1.94 ms (1, 4 rows); 0.87 at 4.
STOCK_ATTENTION = Curve((1, 4), (1, 2.69), "sdpa_vector on an M4 Pro, mlx-dspark README")
ROWS_ATTENTION = Curve((1, 4), (1, 1.21), "multirow_attn on an M4 Pro, mlx-dspark README")
# Distinct of 128 experts that rows with 8 each choose, if they agree as neighbouring tokens of other models did.
OVERLAP = Curve(
    (1, 2, 3, 4, 5, 6, 8), (8, 13.3, 17, 20.2, 24.2, 28.2, 35.6), "Cohere on MoE speculation; Laguna 256/8"
)


def stock_curve(chip: Chip) -> Curve:
    if chip.generation < 15:
        return BEFORE_M3
    return M3_AND_M4 if chip.generation < 17 else M5


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
