"""Our kernels by operation: what computes it, the same in plain MLX, and which examples of it are not supported."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.kernels import (
    add_norm,
    centroid_head,
    head_choose,
    norm_rotate,
    prefill_attention,
    verify_attention,
    verify_experts,
    verify_gemm,
    verify_qmm,
)
from mlx_mtp.kernels.operations import (
    ADD_NORM,
    ATTEND,
    ATTEND_TILED,
    CENTROID_CHOOSE,
    EXPERTS,
    HEAD_CHOOSE,
    NORM_ROTATE,
    PROJECT,
    AttentionShape,
    Clustered,
    HeadSize,
    Projected,
    Routed,
    RowSize,
    Subject,
)
from mlx_mtp.sampling import MAX_CANDIDATES, Sampling, sampler_class
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

DRAWN = sampler_class([Sampling(top_k=MAX_CANDIDATES)])  # asks for most, of the classes `decided_by_best`


class Family(NamedTuple):
    """A kernel, its reference, and who says of an example why the kernel does not compute it (None: it does)."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    unsupported: Callable[..., str | None]  # takes what a Subject holds; an AttentionShape whole


def _head_unsupported(weight: Weight, dtype: mx.Dtype) -> str | None:
    return head_choose.unsupported(weight, dtype, DRAWN)


def _clusters_unsupported(
    centroids: Weight, members: mx.array, top_k: int, table: Weight, dtype: mx.Dtype
) -> str | None:
    return centroid_head.unsupported(centroids, members, top_k, table, dtype, DRAWN)


QMM = Family(verify_qmm.verify_qmm, verify_qmm.reference, verify_qmm.unsupported)
GEMM = Family(verify_gemm.verify_gemm, verify_gemm.reference, verify_gemm.unsupported)
HEAD = Family(head_choose.head_choose, head_choose.reference, _head_unsupported)
FAMILIES: dict[tuple[str, type], Family] = {  # by operation and the kind of its weights
    (PROJECT, QuantizedWeight): QMM,
    (PROJECT, DenseWeight): GEMM,
    (HEAD_CHOOSE, QuantizedWeight): HEAD,
    (HEAD_CHOOSE, DenseWeight): HEAD,
    (CENTROID_CHOOSE, Clustered): Family(
        centroid_head.centroid_head, centroid_head.reference, _clusters_unsupported
    ),
    (ADD_NORM, RowSize): Family(add_norm.add_norm, add_norm.reference, add_norm.unsupported),
    (NORM_ROTATE, HeadSize): Family(norm_rotate.norm_rotate, norm_rotate.reference, norm_rotate.unsupported),
    (EXPERTS, Routed): Family(
        verify_experts.verify_experts, verify_experts.reference, verify_experts.unsupported
    ),
    (ATTEND, AttentionShape): Family(
        verify_attention.verify_attention, verify_attention.reference, verify_attention.unsupported
    ),
    (ATTEND_TILED, AttentionShape): Family(
        prefill_attention.prefill_attention, prefill_attention.reference, prefill_attention.unsupported
    ),
}


def key_of(name: str, subject: Subject) -> tuple[str, type]:
    """Where FAMILIES has the kernels for an operation."""
    return name, type(subject.weight) if isinstance(subject, Projected) else type(subject)
