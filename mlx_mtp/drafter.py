"""The 4-layer MTP assistant: it owns no K/V, reads the target's, and has a dense or a centroid head."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.attention import Sight
from mlx_mtp.config import DrafterConfig, TextConfig
from mlx_mtp.kernels.table import STOCK, Kernels
from mlx_mtp.layers import (
    Layer,
    Rope,
    Rotation,
    Tensors,
    make_layer,
    make_ropes,
    queries_of,
    rms_norm,
    run_layer,
)
from mlx_mtp.state import KeysValues
from mlx_mtp.verify import sights_of
from mlx_mtp.weights import Weight, load_weights


@dataclass(frozen=True, slots=True)
class CentroidHead:
    """E2B and E4B: score clusters of tokens first, then only the tokens of the best clusters."""

    centroids: Weight  # [clusters, hidden]
    members: mx.array  # [clusters, V / clusters] canonical token ids
    top_k: int


@dataclass(frozen=True, slots=True)
class Drafter:
    """A `gemma4_assistant` ready to run."""

    config: DrafterConfig
    pre_projection: Weight  # [hidden, 2 * target hidden]
    post_projection: Weight  # [target hidden, hidden]
    embedding: Weight  # output head only; inputs use the target's embedding
    centroid_head: CentroidHead | None
    layers: tuple[Layer, ...]
    norm: mx.array
    ropes: dict[str, Rope]
    kernels: Kernels = STOCK

    @property
    def text(self) -> TextConfig:
        return self.config.text


def make_drafter(config: DrafterConfig, tensors: Tensors) -> Drafter:
    """Assemble a drafter from canonically named tensors (see `checkpoint.read_drafter`), evaluated."""
    load_weights(tensors)
    head = None
    if config.num_centroids:
        members = tensors["masked_embedding.token_ordering"].reshape(config.num_centroids, -1)
        mx.eval(members)
        head = CentroidHead(tensors["masked_embedding.centroids"], members, config.centroid_top_k)
    return Drafter(
        config=config,
        pre_projection=tensors["pre_projection"],
        post_projection=tensors["post_projection"],
        embedding=tensors["embed_tokens"],
        centroid_head=head,
        layers=tuple(make_layer(config.text, tensors, i) for i in range(config.text.num_layers)),
        norm=tensors["norm"],
        ropes=make_ropes(config.text),
    )


class DrafterView(NamedTuple):
    """What the drafter sees of the target during one round: committed rows only, at one position."""

    kv: dict[str, tuple[mx.array, mx.array]]  # whole buffers
    sights: dict[str, Sight]
    rotations: dict[str, Rotation]


def view_for_drafter(
    target: TextConfig, drafter: Drafter, kv: KeysValues, length: mx.array, *, bucket: int
) -> DrafterView:
    """The rows that `look_of_drafter` says, in the buffers of the target's feeding layers."""
    sights, rotations = look_of_drafter(target, drafter, length, bucket=bucket)
    return DrafterView({kind: kv[i] for kind, i in target.feeding_layers.items()}, sights, rotations)


def look_of_drafter(
    target: TextConfig, drafter: Drafter, length: mx.array, *, bucket: int
) -> tuple[dict[str, Sight], dict[str, Rotation]]:
    """Rows 0 .. length-1 of the target's feeding layers; sliding: the last window of them.

    The position is constant over all draft steps and equals `length`, the position of the last committed token:
    transformers 5.22.2 `SinglePositionMultiTokenCandidateGenerator`. This is its one place.
    """
    sights = sights_of(target, drafter.text, length - 1, 1, bucket)
    return sights, {kind: rope.at(length, 1) for kind, rope in drafter.ropes.items()}


def draft_hidden(drafter: Drafter, embedded: mx.array, hidden: mx.array, view: DrafterView) -> mx.array:
    """Scaled target embedding and hidden row, both [B, 1, target H] -> the drafter's normed row [B, 1, H]."""
    kernels = drafter.kernels
    x = kernels.project(drafter.pre_projection, mx.concatenate([embedded, hidden], axis=-1)[:, 0])
    for layer in drafter.layers:
        x = run_layer(kernels, layer, x, partial(_attention, kernels, layer, view), None)
    return rms_norm(x, drafter.norm, drafter.text.rms_norm_eps)[:, None]


def _attention(kernels: Kernels, layer: Layer, view: DrafterView, normed: mx.array) -> mx.array:
    """normed [B, H] -> merged heads [B, heads * D]; keys and values are the target's."""
    queries = queries_of(kernels, layer, normed, view.rotations[layer.kind], normed.shape[0])
    return kernels.attend(queries, *view.kv[layer.kind], view.sights[layer.kind])


def next_hidden(drafter: Drafter, row: mx.array) -> mx.array:
    """The drafter's row [B, 1, H] -> what stands in for the target's hidden row in the next step [B, 1, target H]."""
    return drafter.kernels.project(drafter.post_projection, row)


def draft_logits(drafter: Drafter, row: mx.array) -> tuple[mx.array, mx.array | None]:
    """The drafter's row [B, 1, H] -> logits [B, 1, N] and the token ids they belong to (None: 0 .. V-1). No softcap."""
    if drafter.centroid_head is None:
        return drafter.kernels.project(drafter.embedding, row), None
    head = drafter.centroid_head
    scores = drafter.kernels.project(head.centroids, row)
    best = mx.argpartition(scores, kth=-head.top_k, axis=-1)[..., -head.top_k :]
    ids = head.members[best].reshape(*row.shape[:2], -1)
    rows = drafter.embedding.rows(ids)
    return (rows @ row[..., None])[..., 0], ids
