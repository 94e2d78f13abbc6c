"""Where stock MLX computes a row otherwise in a longer pass on Metal: by chip generation, read in MLX 0.32's dispatch.

Nobody has run this on a Mac. What is said to be invariant is compared bitwise on the machine as well (see
`exactness_probe`); what is not stays not, even where a comparison happens to find equal bits.

| operation           | in mlx/backend/metal               | rule                                                  |
|---------------------|------------------------------------|-------------------------------------------------------|
| QuantizedMatmul     | quantized.cpp, get_qmv_batch_limit | qmv; qmv_wide from 2 rows on (from M3 on, and every   |
|                     |                                    | format but affine); a GEMM from the limit on          |
| Matmul              | matmul.cpp                         | gemv for one row; gemv_wide from M3 on; a GEMM        |
| GatherQMM, GatherMM | quantized.cpp, matmul.cpp          | one pair of row and expert at a time, unless sorted   |
| attention           | scaled_dot_product_attention.cpp   | vector kernel; on Pro, Max and Ultra two passes from  |
|                     |                                    | 1024 keys on, split by rows                           |
| Softmax             | softmax.cpp                        | another kernel beyond 4096 values                     |
| Reduce              | reduce.cpp                         | by length, and for long rows by how many there are    |
"""

import math
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.exactness_graph import Node

READ_IN = (0, 32)  # the MLX series whose dispatch the table describes
WIDE_GENERATION = 15  # M3: qmv_wide and gemv_wide
SMALL_SUM = 32  # a strided sum of fewer values is one thread's loop
SMALL_ROW = 64  # rows up to this length have one kernel for any number of them

Answer = tuple[bool | None, str]  # row-invariant (None: not known), and why


@dataclass(frozen=True, slots=True)
class Backend:
    """Where MLX computes, as a plain value: no Mac is needed to ask what holds on one.

    generation: 13 (M1) .. 17 (M5); size: "p" phone, "g" base, "s" Pro and Max, "d" Ultra; None where unknown.
    """

    kind: Literal["cpu", "metal"]
    generation: int | None = None
    size: str | None = None
    mlx: tuple[int, ...] = READ_IN

    @property
    def is_read(self) -> bool:
        return self.mlx[: len(READ_IN)] == READ_IN

    @property
    def is_wide(self) -> bool | None:
        """Whether products of a few rows have kernels of their own; None where the generation is unknown."""
        return None if self.generation is None else self.generation >= WIDE_GENERATION

    def __str__(self) -> str:
        version = ".".join(map(str, self.mlx))
        if self.kind == "cpu":
            return f"CPU, MLX {version}"
        return f"Metal generation {self.generation or 'unknown'}{self.size or ''}, MLX {version}"


def quantized_product(node: Node, backend: Backend) -> Answer:
    """A quantised matrix times rows; arguments: group size, bits, mode (0: affine), whether it is [N, K]."""
    depth, columns = node.inputs[0].shape[-1], node.outputs[0].shape[-1]
    if backend.is_wide is None:
        return False, "the kernel depends on the number of rows, from how many on is not known for this chip"
    limit = qmv_batch_limit(depth, columns, backend)
    wide = backend.is_wide or node.arguments[2] != 0
    if wide and depth not in (64, 128):
        return False, "qmv for one row, qmv_wide, with another order of sums, from 2 rows on"
    return False, f"alike up to {limit - 1} rows, a GEMM from {limit} rows on"


def qmv_batch_limit(depth: int, columns: int, backend: Backend) -> int:
    """The first number of rows that a GEMM computes, by matrix size and chip."""
    kind = 0 if max(depth, columns) <= 2048 else 1 if max(depth, columns) <= 4096 else 2
    if backend.size == "d":
        return (32, 18, 12)[kind]
    generation = backend.generation or WIDE_GENERATION
    if generation < WIDE_GENERATION:
        return (14, 10, 6)[kind]
    return ((13, 15, 13) if generation < 17 else (33, 25, 13))[kind]


def product(node: Node, backend: Backend) -> Answer:
    """Two dense arrays: weights times rows, or queries, keys and values of attention that is spelt out."""
    if backend.is_wide is None:
        return False, "gemv for one row, other kernels for more"
    more = "gemv_wide, which changes beyond 5 rows, and a GEMM" if backend.is_wide else "a GEMM"
    return False, f"gemv for one row; for more rows {more}, with other orders of sums"


def gathered(node: Node, backend: Backend) -> Answer:
    """Rows times the experts that they chose; the last two arguments say whether indices are sorted."""
    if node.inputs[0].shape[-2] != 1 or any(node.arguments[-2:]):
        return False, "sorted pairs of row and expert are grouped, which changes the order of sums"
    return True, "one pair of row and expert at a time, by the kernel for one row"


def attention(node: Node, backend: Backend) -> Answer:
    """MLX's fused attention, for as many rows as its vector kernel takes; more rows give other nodes."""
    if backend.size in ("g", "p"):
        return True, "one pass over the keys, which lie in the same slots at any number of rows"
    return False, "from 1024 keys on two passes, whose split depends on the number of rows"


def normalised(node: Node, backend: Backend) -> Answer:
    return True, "one threadgroup a row, by the same code for any number of rows"


def softmax(node: Node, backend: Backend, varies: frozenset[str]) -> Answer:
    if varies:
        return False, "over all keys of a bucket: beyond 4096 another kernel adds in another order"
    return normalised(node, backend)


def summed(node: Node, backend: Backend) -> Answer:
    """A sum over part of a row."""
    shape, axes = node.inputs[0].shape, node.arguments[1]
    length = math.prod(shape[axis] for axis in axes)
    is_last = all(axis % len(shape) == len(shape) - 1 for axis in axes)
    if length < SMALL_SUM or (is_last and length <= SMALL_ROW):
        return True, "a short sum, by one kernel for any number of rows"
    return False, "which kernel adds it up depends on how many sums there are"
