"""Launches of metal/skinny.metal: a few rows times a large matrix, in whatever format its weights are stored."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.launch import SIMD, Kernel, Size

Body = Literal["scalar", "matrix"]
Bodies = Body | int  # one for every number of rows, or from how many rows on matrix units compute
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
SEGMENT = 32  # K is a multiple of it
MAX_TILE = 16  # rows
MAX_SUMS = 24  # a thread's accumulators; with more the compiler spills
# A scalar tile of more rows has a single column to share the loads of its rows: two tiles issue less.
USUAL_TILE: Mapping[Body, int] = {"scalar": 12, "matrix": 16}
SCALAR_SIMDGROUPS, SCALAR_COLUMNS = 2, 4  # no fewer threadgroups than stock's product with one row
MATRIX_SIMDGROUPS, MATRIX_COLUMNS = 8, 8

CALL: Mapping[Body, str] = {
    "scalar": """
    skinny_scalar<ROWS, COLUMNS>(
        x, weights, y, sizes[0], sizes[1], sizes[2], threadgroup_position_in_grid.x * ROWS,
        (threadgroup_position_in_grid.y * simdgroups_per_threadgroup + simd) * COLUMNS, lane);
""",
    "matrix": """
    threadgroup float scratch[SPLITS * TILES * 64];
    skinny_matrix<TILES>(
        x, weights, y, sizes[0], sizes[1], sizes[2], threadgroup_position_in_grid.x * TILES * 8,
        threadgroup_position_in_grid.y * 8, scratch, lane, simd);
""",
}


@dataclass(frozen=True, slots=True)
class Skinny:
    """Both bodies for one way to store weights.

    weights: the Metal expression that makes them from the inputs called `arrays`, from `depth` (K) and `lane`.
    """

    name: str
    files: tuple[str, ...]
    arrays: tuple[str, ...]
    weights: str

    def __call__(
        self,
        x: mx.array,
        arrays: Sequence[mx.array],
        columns: int,
        *,
        template: Mapping[str, int | mx.Dtype],
        body: Bodies,
        tile: int | None,
    ) -> mx.array:
        """x [..., K] -> [..., columns]; `tile` is how many rows share one reading of the weights, None for the usual.

        Raises KernelError for no rows at all, and for a tile of none or of more than 16.
        """
        depth, rows = x.shape[-1], math.prod(x.shape[:-1])
        if not rows or (tile is not None and not 1 <= tile <= MAX_TILE):
            raise KernelError(
                f"{self.name}: there must be rows, and 1 to {MAX_TILE} of them in a tile, got {rows} in tiles of "
                f"{tile}; leave the tile to the kernel"
            )
        if isinstance(body, int):
            body = "matrix" if rows >= body else "scalar"
        sizes, groups, threads = layout(rows, columns, body, tile or usual_tile(rows, body))
        (y,) = _kernel(self, body)(
            [x.reshape(rows, depth), *arrays, _sizes(rows, columns, depth)],
            template={**template, **sizes},
            groups=groups,
            threads=threads,
            shapes=[(rows, columns)],
            dtypes=[x.dtype],
        )
        return y.reshape(*x.shape[:-1], columns)


def usual_tile(rows: int, body: Body) -> int:
    """Rows of a tile: all of them where one tile takes them, otherwise tiles of like size."""
    return math.ceil(rows / math.ceil(rows / USUAL_TILE[body]))


def layout(rows: int, columns: int, body: Body, tile: int) -> tuple[dict[str, int], Size, Size]:
    """Template sizes, threadgroups, and threads of each, for tiles of `tile` rows.

    Tiles of rows come first in the grid: those that read the same weights run side by side.
    """
    if body == "scalar":
        own = min(SCALAR_COLUMNS, MAX_SUMS // tile)
        groups = (math.ceil(rows / tile), math.ceil(columns / (own * SCALAR_SIMDGROUPS)), 1)
        return {"ROWS": tile, "COLUMNS": own}, groups, (SCALAR_SIMDGROUPS * SIMD, 1, 1)
    tiles = math.ceil(tile / 8)
    groups = (math.ceil(rows / (tiles * 8)), math.ceil(columns / MATRIX_COLUMNS), 1)
    return {"TILES": tiles}, groups, (MATRIX_SIMDGROUPS * SIMD, 1, 1)


@functools.cache
def _kernel(skinny: Skinny, body: Body) -> Kernel:
    weights = f"""
    const uint lane = thread_index_in_simdgroup;
    const uint simd = simdgroup_index_in_threadgroup;
    const int depth = sizes[2];
    const {skinny.weights};
"""
    return Kernel(
        name=f"{skinny.name}_{body}",
        files=("skinny.metal", *skinny.files),
        inputs=("x", *skinny.arrays, "sizes"),
        outputs=("y",),
        body=weights + CALL[body],
        indexed=("sizes",),
    )


@functools.cache
def _sizes(rows: int, columns: int, depth: int) -> mx.array:
    """[M, N, K], read at run time: as template arguments, every shape and number of rows would be compiled anew."""
    return mx.array([rows, columns, depth], mx.int32)
