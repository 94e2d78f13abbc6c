"""What is known of Apple's chips and of kernels on them, each figure with where it was published; none is ours."""

from bisect import bisect_left
from dataclasses import dataclass

from mlx_mtp.machine import Machine


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak figures; `generation` is the number in Metal's architecture name, applegpu_g13 for M1 up to g17 for M5."""

    name: str
    generation: int
    gb_per_s: float
    tflops: float  # float32 = float16 in shaders
    source: str


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
# Not in the tables of predictions: to check them against what was published, and as a prior where they are met.
OTHERS = (
    Chip("M1", 13, 68, 2.6, "Apple specifications, 8 cores"),
    Chip("M1 Pro", 13, 200, 5.3, "half an M1 Max"),
    Chip("M1 Ultra", 13, 800, 21.2, "two M1 Max"),
    Chip("M2", 14, 100, 3.6, "Apple specifications, 10 cores"),
    Chip("M2 Max", 14, 400, 13.6, "bandwidth: Apple; half an M2 Ultra"),
    Chip("M3", 15, 100, 3.6, "bandwidth: Apple; a quarter of an M3 Max"),
    Chip("M3 Pro", 15, 150, 6.4, "bandwidth: Apple; 18 cores, from the M3 Max's 14.3 for 40"),
    Chip("M4", 16, 120, 4.3, "bandwidth: Apple; 10 cores, from the M4 Pro's 8.6 for 20"),
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

    def __call__(self, rows: float) -> float:
        if rows > self.rows[-1]:
            slope = (self.times[-1] - self.times[-2]) / (self.rows[-1] - self.rows[-2])
            return self.times[-1] + slope * (rows - self.rows[-1])
        at = bisect_left(self.rows, rows)
        if at == 0:
            return self.times[0]
        share = (rows - self.rows[at - 1]) / (self.rows[at] - self.rows[at - 1])
        return self.times[at - 1] + share * (self.times[at] - self.times[at - 1])


QMV = Curve(
    (1, 4, 8),
    (1, 1.89, 3.44),
    "qmv of MLX 0.31.2 on an M4 Pro, mlx#3839: all chips before 0.32, M1 and M2 since",
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


# M1 and M2 have no bfloat16 arithmetic: a product of 512 rows took 30.6 ms, 17.2 in float16, on an M1 Max, mlx#4216.
# Rows beyond the first are arithmetic (mlx#3852), so they are taken to cost so much more there.
BF16_EMULATED = 30.6 / 17.2


def stock_curve(chip: Chip, *, has_wide: bool = True, is_affine: bool = True) -> Curve:
    """Products of several rows in stock MLX, bfloat16 activations.

    has_wide: of MLX 0.32, which has `qmv_wide`: for M3 and later, and for weights that are not affine (nvfp4, mxfp4)
    on any chip. Without it, and in modes that give each row the bits of one row, each row is a `qmv` of its own.
    """
    if not has_wide or (is_affine and chip.generation < 15):
        curve = QMV
    else:
        curve = M3_AND_M4 if chip.generation < 17 else M5
    return on_chip(curve, chip)


def on_chip(curve: Curve, chip: Chip) -> Curve:
    """The curve of a chip with bfloat16 arithmetic, on one that may have none."""
    if chip.generation >= 15:
        return curve
    times = tuple(1 + (time - 1) * BF16_EMULATED for time in curve.times)
    return Curve(curve.rows, times, f"{curve.source}; bfloat16 emulated, mlx#4216")


def chip_of(machine: Machine) -> Chip | None:
    """What is published of this machine's chip, None where nothing is known here."""
    name = machine.chip.removeprefix("Apple ").strip()
    return next((chip for chip in (*CHIPS, *OTHERS) if chip.name == name), None)
