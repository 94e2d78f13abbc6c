"""Quantising: a checkpoint on disk into a new one or into the kept copy, or a drafter while it is loaded."""

import mlx.core as mx

from mlx_mtp.checkpoint import Tensors
from mlx_mtp.kept_quantized import KeptCopy, is_sound, kept_copies, kept_copy, quantized_copy, remove_copy
from mlx_mtp.quantize_files import quantize_checkpoint
from mlx_mtp.quantize_plan import check_format, format_of
from mlx_mtp.weights import DenseWeight, QuantizedWeight

__all__ = [
    "KeptCopy",
    "is_sound",
    "kept_copies",
    "kept_copy",
    "quantize_checkpoint",
    "quantize_tensors",
    "quantized_copy",
    "remove_copy",
]


def quantize_tensors(tensors: Tensors, bits: int, group_size: int = 64) -> Tensors:
    """Canonically named tensors, dense -> the same quantised in memory, evaluated; `tensors` is emptied on the way.

    Emptied, so that each dense matrix is freed before the next is read: the peak is the result and one matrix.
    Every matrix whose width the group size divides is quantised, the embedding too: a dense head reads all of it
    for each draft, most of what a drafter reads at all. Centroids keep 8 bits, as routers do. Vectors, the token
    ordering and matrices that are quantised already stay as they are. Raises ParameterError.
    """
    check_format(bits, group_size)
    made: Tensors = {}
    for path in list(tensors):
        tensor = tensors.pop(path)
        form = format_of(path, tensor.shape, bits, group_size)
        if form is None or not isinstance(tensor, DenseWeight):
            made[path] = tensor
            continue
        packed, scales, biases = mx.quantize(tensor.weight, form.group_size, form.bits)
        mx.eval(packed, scales, biases)
        made[path] = QuantizedWeight(
            packed, scales, biases, form.group_size, form.bits, form.mode, tensor.dtype
        )
    return made
