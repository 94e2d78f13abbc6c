"""Finding NaN and Inf in weight files without loading them: only a piece is in memory at a time."""

from collections.abc import Iterable

import numpy as np

from mlx_mtp.config_fields import shown_name
from mlx_mtp.errors import CheckpointError
from mlx_mtp.headers import TensorInfo

FULL_SCAN_BYTES = 4 * 10**9
SAMPLED_ROWS = 64
PIECE_BYTES = 1 << 20
# Unsigned view and mask: NaN or Inf when every bit of the mask is set. One-byte scales have no Inf.
NOT_FINITE = {
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "U8": (np.uint8, 0xFF),
}


def scan_finite(tensors: Iterable[TensorInfo]) -> None:
    """Refuse the first float tensor that holds NaN or Inf, naming it.

    Vectors (norms, scalars) and the scales and biases of quantised matrices are always read whole. Dense
    matrices are read whole when all of them together are below 4 GB; above that, only 64 evenly spaced rows
    of each are, so that a large model still loads at once. Memory stays at one piece of 1 MB.
    """
    floats = [info for info in tensors if info.dtype in NOT_FINITE]
    dense = [info for info in floats if is_dense_matrix(info)]
    sample = sum(info.nbytes for info in dense) >= FULL_SCAN_BYTES
    for info in floats:
        if not is_finite(info, sampled=sample and is_dense_matrix(info)):
            raise CheckpointError(
                f"{info.file}: weights must be finite, {shown_name(info.name)} holds NaN or Inf; "
                "download the model again"
            )


def is_dense_matrix(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and not info.name.endswith((".scales", ".biases"))


def is_finite(info: TensorInfo, *, sampled: bool) -> bool:
    """Whether the tensor's bytes (or `SAMPLED_ROWS` rows of them) are all finite numbers."""
    if not info.nbytes:
        return True
    unsigned, mask = NOT_FINITE[info.dtype]
    row_bytes = info.shape[-1] * np.dtype(unsigned).itemsize
    # Plain reads: mapping the file would make the system read ahead megabytes around every sampled row.
    with info.file.open("rb", buffering=0) as stream:
        for begin, end in pieces(info.nbytes, row_bytes, sampled):
            stream.seek(info.offset + begin)
            data = stream.read(end - begin)
            if len(data) < end - begin:
                raise CheckpointError(f"{info.file}: became shorter while it was read; load the model again")
            if ((np.frombuffer(data, unsigned) & mask) == mask).any():
                return False
    return True


def pieces(nbytes: int, row_bytes: int, sampled: bool) -> Iterable[tuple[int, int]]:
    """Byte ranges to read, relative to the tensor: all of it in pieces, or evenly spaced rows."""
    rows = nbytes // row_bytes
    if sampled and rows > SAMPLED_ROWS:
        for i in range(SAMPLED_ROWS):
            row = i * (rows - 1) // (SAMPLED_ROWS - 1)
            yield row * row_bytes, (row + 1) * row_bytes
        return
    for begin in range(0, nbytes, PIECE_BYTES):
        yield begin, min(begin + PIECE_BYTES, nbytes)
