"""Arrays as a kernel sees them: addresses, facts about inputs, outputs between guard zones."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .signature import SMALL, TYPES, InputType

GUARD = 0xA5
MLX_HEADER = 8  # on a CPU, MLX's buffers begin so many bytes behind a multiple of 16; on Metal at a page
GUARD_BYTES = 4096
INPUT, OUTPUT, INITIALISED_OUTPUT = 0, 1, 2  # runtime/checker.cpp


def dtype_name(dtype: object) -> str:
    """Of an MLX or numpy dtype, as MLX calls it."""
    name = str(dtype).removeprefix("mlx.core.")
    if name not in TYPES:
        name = np.dtype(dtype).name  # type: ignore[call-overload]
    if name not in TYPES:
        raise ValueError(f"[metal_kernel] {name} is no type that kernels take")
    return name


@dataclass(frozen=True, slots=True)
class Input:
    """An evaluated array; bfloat16 is held as uint16. `skew`: bytes behind a multiple of 16, were it on Metal."""

    dtype: str
    array: np.ndarray
    skew: int

    @property
    def type(self) -> InputType:
        return InputType(self.dtype, self.array.ndim == 0, self.array.size < SMALL)

    def fact(self, kind: str) -> np.ndarray:
        """ "shape" (int32), "strides" in elements (int64), or "ndim" (int32)."""
        if kind == "shape":
            return np.array(self.array.shape, np.int32)
        if kind == "strides":
            return np.array([s // self.array.itemsize for s in self.array.strides], np.int64)
        return np.array([self.array.ndim], np.int32)


def read_input(given: object, row_contiguous: bool) -> Input:
    """`given`: an MLX array (evaluated here), a numpy array or a Python number."""
    if isinstance(given, mx.array):
        dtype = dtype_name(given.dtype)
        array = np.array(given.view(mx.uint16) if dtype == "bfloat16" else given, copy=False)
        skew = (array.ctypes.data - MLX_HEADER) % 16
    else:
        kinds = {bool: np.bool_, int: np.int32, float: np.float32}
        array = np.asarray(given, kinds.get(type(given)))
        dtype, skew = dtype_name(array.dtype), 0
    if row_contiguous and not array.flags.c_contiguous:
        array, skew = np.ascontiguousarray(array), 0
    return Input(dtype, array, skew)


def storage(dtype: str) -> np.dtype:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def fill_value(dtype: str, value: float) -> object:
    if dtype != "bfloat16":
        return value
    return np.array(mx.array(value, mx.bfloat16).view(mx.uint16))


def as_mlx(array: np.ndarray, dtype: str) -> mx.array:
    return mx.array(array).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(array)


@dataclass(slots=True)
class Block:
    """One buffer of a launch."""

    name: str
    kind: int
    array: np.ndarray
    skew: int = 0
    address: int = 0

    @property
    def span(self) -> int:
        """Bytes from the first to the last element, wherever strides lead."""
        if self.array.flags.c_contiguous:
            return int(self.array.nbytes)
        steps = zip(self.array.shape, self.array.strides, strict=True)
        return int(sum((size - 1) * stride for size, stride in steps) + self.array.itemsize)


def output_block(name: str, shape: tuple[int, ...], dtype: str, init_value: float | None) -> Block:
    """Without `init_value` all bits are set: NaN for floats."""
    array = np.empty(shape, storage(dtype))
    if init_value is None:
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        return Block(name, OUTPUT, array)
    array[...] = fill_value(dtype, init_value)
    return Block(name, INITIALISED_OUTPUT, array)


class Arena:
    """Copies of blocks, each between two guard zones and as aligned as on Metal.

    Inputs are copied only when asked: kernels that are not instrumented read the arrays' own memory, and are built
    for any alignment.
    """

    def __init__(self, blocks: list[Block], copy_inputs: bool):
        self.placed: list[tuple[Block, int]] = []
        at = GUARD_BYTES
        for block in blocks:
            if block.kind == INPUT and not copy_inputs:
                block.address = block.array.ctypes.data
                continue
            at += block.skew
            self.placed.append((block, at))
            at = (at + block.span + GUARD_BYTES + 255) // 256 * 256
        self.size = at + GUARD_BYTES
        memory = np.full(self.size + 256, GUARD, np.uint8)
        self.memory = memory[-memory.ctypes.data % 256 :][: self.size]
        self.address = self.memory.ctypes.data
        for block, offset in self.placed:
            block.address = self.address + offset
            self.part(block, offset)[:] = bytes_of(block)

    def part(self, block: Block, offset: int) -> np.ndarray:
        return self.memory[offset : offset + block.span]

    def damage(self) -> str | None:
        """What was written between the blocks, if anything."""
        start, before = 0, "the first buffer"
        for block, offset in [*self.placed, (None, self.size)]:
            changed = np.flatnonzero(self.memory[start:offset] != GUARD)
            if changed.size:
                return (
                    f"out of bounds: {changed.size} bytes changed behind {before}, from byte {changed[0]} on"
                )
            if block is not None:
                start, before = offset + block.span, block.name
        return None

    def read_outputs(self) -> None:
        for block, offset in self.placed:
            if block.kind != INPUT and block.array.size:
                block.array.reshape(-1).view(np.uint8)[:] = self.part(block, offset)


def bytes_of(block: Block) -> np.ndarray:
    array = block.array
    if array.size == 0:
        return np.empty(0, np.uint8)
    if array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8)
    flat = np.lib.stride_tricks.as_strided(array, (block.span // array.itemsize,), (array.itemsize,))
    return flat.view(np.uint8)
