"""The type that activations are computed in, on every kind of machine."""

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_mtp.dtypes import activation_dtype
from mlx_mtp.machine import Machine

MAC = Machine(
    system="Darwin",
    arch="arm64",
    os_version="26.0",
    chip="Apple M2 Pro",
    gpu_cores=19,
    memory_bytes=32 << 30,
    gpu_budget_bytes=24 << 30,
    has_metal=True,
    is_translated=False,
    is_virtual=False,
)
LINUX = replace(
    MAC, system="Linux", arch="x86_64", chip="EPYC", gpu_cores=None, gpu_budget_bytes=None, has_metal=False
)
STORED = (mx.bfloat16, mx.float16, mx.float32)


@pytest.mark.parametrize("stored", STORED)
def test_a_cpu_computes_in_float32(stored: mx.Dtype) -> None:
    dtype, reason = activation_dtype(LINUX, stored)
    assert dtype == mx.float32 and "float32 on the CPU" in reason


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("chip", "said"),
    [
        ("Apple M1", "Apple M1 has no bfloat16 arithmetic and emulates it"),
        ("Apple M2 Ultra", "not measured yet"),
        ("Apple M3 Max", "Apple M3 Max computes directly"),
        ("Apple M5", "Apple M5 computes directly"),
        ("Apple processor", "not known"),
    ],
)
def test_every_gpu_computes_in_bfloat16_and_says_why(chip: str, said: str, stored: mx.Dtype) -> None:
    dtype, reason = activation_dtype(replace(MAC, chip=chip), stored)
    assert dtype == mx.bfloat16 and said in reason
    assert ("; the files have" in reason) == (stored != mx.bfloat16)


def test_where_mlx_will_compute_can_be_said() -> None:
    assert activation_dtype(MAC, mx.bfloat16, on_cpu=True)[0] == mx.float32
    assert activation_dtype(LINUX, mx.bfloat16, on_cpu=False)[0] == mx.bfloat16
