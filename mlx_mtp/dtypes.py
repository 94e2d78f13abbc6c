"""The type that activations and dense weights are computed in: decided for every machine here, and only here."""

import mlx.core as mx

from mlx_mtp.machine import Machine

CPU_REASON = (
    "float32 on the CPU: its backend has no fast 16-bit arithmetic, and accumulates quantised products in the "
    "activations' type, so that bfloat16 would lose most of their digits"
)
EMULATED_REASON = (
    "bfloat16, the type that Gemma 4 was trained in; {chip} has no bfloat16 arithmetic and emulates it, so float16 "
    "may be faster here, but Gemma's activations can exceed float16's 65504: not measured yet"
)
NATIVE_REASON = "bfloat16, the type that Gemma 4 was trained in, which {chip} computes directly"
UNKNOWN_REASON = "bfloat16, the type that Gemma 4 was trained in; this GPU's generation is not known"
FIRST_WITH_BFLOAT16 = (
    3  # M3; one M1 Max ran the same quantised products in 17 ms in float16, 31 ms in bfloat16
)


def activation_dtype(
    machine: Machine, stored: mx.Dtype, *, on_cpu: bool | None = None
) -> tuple[mx.Dtype, str]:
    """-> the type to compute in on `machine`, and why, in words.

    stored: of the file's floats. on_cpu: where MLX will compute; None: on the CPU only without Metal. Never float32
    on a GPU, which would double what every round reads, and never float16 before it has been measured on a Mac.
    """
    if on_cpu if on_cpu is not None else not machine.has_metal:
        return mx.float32, CPU_REASON
    if machine.generation is None:
        reason = UNKNOWN_REASON
    elif machine.generation < FIRST_WITH_BFLOAT16:
        reason = EMULATED_REASON.format(chip=machine.chip)
    else:
        reason = NATIVE_REASON.format(chip=machine.chip)
    if stored != mx.bfloat16:
        reason += f"; the files have {str(stored).removeprefix('mlx.core.')}"
    return mx.bfloat16, reason
