"""The operations of a pass that a kernel of ours may take over, with stock MLX as their default.

A pass calls `kernels.project(...)` and the like and cannot tell which of the two it gets. Every family in this package
offers, beside each other: the kernel, its `reference` in plain MLX, both with the signature below, and `unsupported`,
which says in a few words why the chooser takes stock operations (None where the kernel computes it):

    verify_qmm.py, verify_gemm.py   unsupported(weight: Weight, dtype: mx.Dtype) -> str | None
    verify_experts.py               unsupported(experts: Experts, dtype: mx.Dtype) -> str | None
    verify_attention.py             unsupported(shape: operations.AttentionShape) -> str | None
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_mtp.attention import Sight, attend, attend_tiled
from mlx_mtp.layers import add_norm, mixture, norm_rotate

if TYPE_CHECKING:
    from mlx_mtp.layers import Experts, OnChoice, Rotation
    from mlx_mtp.sampling import SamplerClass
    from mlx_mtp.weights import Weight


class Project(Protocol):
    """x [..., K] times a matrix -> [..., N] in x's type; each row's bits depend on that row and the matrix only."""

    def __call__(self, weight: "Weight", x: mx.array) -> mx.array: ...


class Mixture(Protocol):
    """x [rows, H] (the residual stream itself) -> [rows, H]: routed, weighted, summed and normed experts.

    Router norm and product, top-8, pre_norm, gate and up, GeGLU, down, sum by router weight in the order of the
    choice, post_norm. `project` multiplies by the router's matrix, for those who replace only a part. `on_choice` is
    shown the ids [rows, top_k] once, whoever chose them.
    """

    def __call__(
        self,
        experts: "Experts",
        x: mx.array,
        eps: float,
        project: Project,
        on_choice: "OnChoice | None" = None,
    ) -> mx.array: ...


class Attend(Protocol):
    """queries [B, heads, M, D], one layer's whole K/V buffers [B, kv_heads, R, D] -> [B * M, heads * D].

    The rows of a verify pass, and the drafter's one row (`sight.first` = length - 1: it sees committed rows only).
    `queries` is a transposed view of contiguous [B, M, heads, D]: transposing it back copies nothing. Buffer rows that
    `sight` does not cover hold anything, NaN included.
    """

    def __call__(self, queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> mx.array: ...


class AttendTiled(Protocol):
    """A prefill chunk: queries [1, heads, M, D] at positions first_query .. over keys and values [1, kv_heads, L, D] at
    positions first_key .. -> [M, heads * D]; a query sees keys up to itself, at most the last `window` of them. Rows
    behind the last query's position hold anything, NaN included.
    """

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        first_query: int,
        first_key: int,
        window: int | None,
    ) -> mx.array: ...


class NormRotate(Protocol):
    """raw [B, M, heads, D], gain [D] -> heads normed and rotated to their positions; values normed without a gain."""

    def __call__(
        self,
        raw: mx.array,
        gain: mx.array,
        rotation: "Rotation",
        eps: float,
        values: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]: ...


class AddNorm(Protocol):
    """x, y [N, H] -> (x + y normed) * scalar, and that normed with the gain `then`, if there is one; not both."""

    def __call__(
        self,
        x: mx.array,
        y: mx.array,
        gain: mx.array,
        eps: float,
        *,
        scalar: mx.array | None = None,
        then: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]: ...


class HeadChoose(Protocol):
    """hidden [B, M, H] of positions [B, M], the head's matrix, the softcap -> tokens [B, M] uint32, valid [B, M].

    What `sampling.choose` would give for the logits, which are never all in memory; for classes `decided_by_best`.
    """

    def __call__(
        self,
        weight: "Weight",
        cap: float | None,
        hidden: mx.array,
        positions: mx.array,
        seed: mx.array,
        sampling: dict[str, mx.array],
        sampler: "SamplerClass",
    ) -> tuple[mx.array, mx.array]: ...


class CentroidChoose(Protocol):
    """The same for a drafter's clustered head: centroids [C, H], members [C, S] token ids, table [V, H]."""

    def __call__(
        self,
        centroids: "Weight",
        members: mx.array,
        top_k: int,
        table: "Weight",
        row: mx.array,
        positions: mx.array,
        seed: mx.array,
        sampling: dict[str, mx.array],
        sampler: "SamplerClass",
    ) -> tuple[mx.array, mx.array]: ...


def project(weight: "Weight", x: mx.array) -> mx.array:
    """The stock product of a weight's own format."""
    return weight.project(x)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a pass computes with; as it stands, stock MLX throughout."""

    project: Project = project
    experts: Mixture = mixture
    attend: Attend = attend
    attend_tiled: AttendTiled = attend_tiled
    norm_rotate: NormRotate = norm_rotate
    add_norm: AddNorm = add_norm
    head_choose: HeadChoose | None = None  # None: all logits, then `sampling.choose`
    centroid_choose: CentroidChoose | None = None


STOCK = Kernels()
