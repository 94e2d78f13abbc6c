"""The only place that hands Metal source to MLX: a kernel's text once, its launches with sizes as template arguments.

MLX writes the kernel's signature around `body` and puts the .metal file in front of it (its generator's rules: MLX
0.32.4, backend/common/metal_kernel.cpp). Two of them are traps, refused here: `<input>_shape`, `_strides` or `_ndim`
anywhere in the body adds parameters, and an input of fewer than 8 elements moves to the constant address space.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.errors import KernelError
from mlx_mtp.kernels.source import metal_source

SIMD = 32  # threads in a simdgroup
MAX_THREADS = 512  # a threadgroup's; Metal on an M1 compiled larger kernels of 1024 for 832 only
SMALL = 8  # inputs with fewer elements are `constant`, not `device`
ADDED = ("_shape", "_strides", "_ndim")

Template = Mapping[str, int | bool | mx.Dtype]
Size = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Metal kernel: `files` of metal/ hold its functions, `body` declares threadgroup memory and calls them.

    `indexed` names inputs that may have fewer than 8 elements: the body indexes them and passes on values only, since
    a function that takes a `const device` pointer would not compile for them.
    """

    name: str
    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    indexed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        added = [name + end for name in self.inputs for end in ADDED if name + end in self.body]
        if added:
            raise KernelError(
                f"{self.name}: a body must not hold an input's name followed by {', '.join(ADDED)}, because MLX would "
                f"add parameters; got {', '.join(added)}; rename it"
            )

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Template,
        groups: Size,
        threads: Size,
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[mx.Dtype],
        init_value: float | None = None,
    ) -> list[mx.array]:
        """Launch `groups` threadgroups of `threads` threads each, all of them whole -> one array an output.

        Outputs start as `init_value`, or undefined. Raises KernelError for sizes that Metal would not run as meant.
        """
        self._check(inputs, groups, threads)
        launch = _made(mx.fast.metal_kernel, self)
        return launch(
            inputs=list(inputs),
            template=list(template.items()),
            grid=tuple(count * size for count, size in zip(groups, threads, strict=True)),
            threadgroup=threads,
            output_shapes=list(shapes),
            output_dtypes=list(dtypes),
            init_value=init_value,
        )

    def _check(self, inputs: Sequence[mx.array], groups: Size, threads: Size) -> None:
        count = math.prod(threads)
        if min(groups) < 1 or not 0 < count <= MAX_THREADS or count % SIMD:
            raise KernelError(
                f"{self.name}: a launch must have threadgroups of a multiple of {SIMD} and at most {MAX_THREADS} "
                f"threads, and at least one of them, got {groups} of {threads}; take stock operations for this shape"
            )
        for name, array in zip(self.inputs, inputs, strict=True):
            if array.size < SMALL and name not in self.indexed:
                raise KernelError(
                    f"{self.name}: {name} must have at least {SMALL} elements, got {array.size}; pad it, or give it as "
                    "a template argument"
                )


@functools.cache
def _made(metal_kernel: Callable[..., Any], kernel: Kernel) -> Callable[..., list[mx.array]]:
    """MLX's own object for a kernel; looked up by who makes it, so that tests can put a runner in MLX's place."""
    made: Callable[..., list[mx.array]] = metal_kernel(
        name=kernel.name,
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body,
        header="".join(metal_source(file) for file in kernel.files),
        ensure_row_contiguous=True,
    )
    return made
