"""Operations described in JSON and made again with random numbers: what a self-test in another process works on.

A specimen has the sizes and the format of the operation it stands for, not its weights: nothing of the model is read.
"""

import math
from typing import Any

import mlx.core as mx

from mlx_mtp.attention import Sight, fold_mask
from mlx_mtp.kernels.operations import (
    AttentionShape,
    Clustered,
    HeadSize,
    Projected,
    Routed,
    RowSize,
    Subject,
)
from mlx_mtp.layers import Experts
from mlx_mtp.verify import positions_in_ring
from mlx_mtp.weights import DenseWeight, QuantizedWeight, Weight

Description = dict[str, Any]  # plain JSON

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def describe(subject: Subject) -> Description:
    """All that decides which kernel computes it and how."""
    if isinstance(subject, Projected):
        return {"weight": _described(subject.weight), "dtype": name_of(subject.dtype)}
    if isinstance(subject, Routed):
        own = subject.experts
        matrices = zip(MATRICES, (own.router, own.gate, own.up, own.down), strict=True)
        parts = {part: _described(matrix) for part, matrix in matrices}
        return {"experts": parts, "top_k": own.top_k, "dtype": name_of(subject.dtype)}
    if isinstance(subject, Clustered):
        return {
            "centroids": _described(subject.centroids),
            "members": list(subject.members.shape),
            "top_k": subject.top_k,
            "table": _described(subject.table),
            "dtype": name_of(subject.dtype),
        }
    return {**subject._asdict(), "dtype": name_of(subject.dtype)}


def specimen(description: Description, *, seed: int, columns: int | None = None) -> Subject:
    """The same with random numbers, evaluated; of a matrix with more than `columns` columns only about so many.

    N % 64 stays, on which it depends how the last columns are shared out.
    """
    dtype = DTYPES[description["dtype"]]
    if "weight" in description:
        form = dict(description["weight"])
        form["shape"] = (_cut(form["shape"][0], columns), form["shape"][1])
        return Projected(random_weight(form, seed=seed), dtype)
    if "experts" in description:
        return Routed(_random_experts(description, dtype, seed), dtype)
    if "members" in description:
        members = tuple(description["members"])
        ids = mx.random.permutation(math.prod(members), key=mx.random.key(seed + 1)).astype(mx.uint32)
        centroids = random_weight(description["centroids"], seed=seed)
        table = random_weight(description["table"], seed=seed + 2)
        return Clustered(centroids, ids.reshape(members), description["top_k"], table, dtype)
    if "width" in description:
        return RowSize(description["width"], dtype)
    if "kv_heads" not in description:
        return HeadSize(description["head_dim"], dtype)
    return AttentionShape(**{**description, "dtype": dtype})


def bytes_of(description: Description, columns: int | None = None) -> int:
    """What the specimen takes in memory, roughly."""
    if "weight" in description:
        form = description["weight"]
        return _bytes({**form, "shape": (_cut(form["shape"][0], columns), form["shape"][1])})
    if "experts" in description:
        return sum(_bytes(form) for form in description["experts"].values())
    if "members" in description:
        return _bytes(description["centroids"]) + _bytes(description["table"])
    return 0


def normal(shape: tuple[int, ...], dtype: mx.Dtype, *, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def name_of(dtype: mx.Dtype) -> str:
    """mlx.core.bfloat16 -> bfloat16."""
    return str(dtype).rpartition(".")[2]


def sight_of(shape: AttentionShape, first: mx.array, rows: int, held: int, bucket: int) -> Sight:
    """What `rows` rows from position first [B] on see of buffers of `held` rows; a ring where there is a window."""
    query = (first[:, None] + mx.arange(rows, dtype=mx.int32))[..., None]
    if shape.window is None:
        visible = mx.arange(bucket, dtype=mx.int32) <= query
    else:
        own = positions_in_ring(query[:, -1], held)[:, None]
        visible = (own <= query) & (own > query - shape.window) & (own >= 0)
    return Sight(first, shape.window, bucket, fold_mask(visible, shape.heads, shape.kv_heads))


def random_weight(form: Description, *, seed: int) -> Weight:
    """A matrix, or a stack of them, whose products with normal rows are about normal."""
    shape, dtype = tuple(form["shape"]), DTYPES[form["dtype"]]
    size = shape[-1] ** -0.5
    if "bits" not in form:
        weight = (mx.random.normal(shape, key=mx.random.key(seed)) * size).astype(dtype)
        mx.eval(weight)
        return DenseWeight(weight)
    bits, group, mode = form["bits"], form["group_size"], form["mode"]
    if mode == "affine":
        # Made packed: the experts of a layer would take gigabytes before they are.
        words = mx.random.randint(
            0, 2**32 - 1, (*shape[:-1], shape[-1] * bits // 32), mx.uint32, key=mx.random.key(seed)
        )
        steps = (*shape[:-1], shape[-1] // group)
        scales = mx.random.uniform(1, 3, steps, key=mx.random.key(seed + 1)) * (size * 2.0 ** (1 - bits))
        biases = -scales * ((2**bits - 1) / 2)
        parts = [words, scales.astype(DTYPES[form["scales"]]), biases.astype(DTYPES[form["scales"]])]
    else:
        table = mx.random.normal(shape, key=mx.random.key(seed)) * size
        parts = [*mx.quantize(table, group_size=group, bits=bits, mode=mode)]
    mx.eval(parts)
    return QuantizedWeight(parts[0], parts[1], parts[2] if len(parts) > 2 else None, group, bits, mode, dtype)


MATRICES = ("router", "gate", "up", "down")


def _described(weight: Weight) -> Description:
    form: Description = {"shape": list(weight.shape), "dtype": name_of(weight.dtype)}
    if isinstance(weight, QuantizedWeight):
        form |= {"bits": weight.bits, "group_size": weight.group_size, "mode": weight.mode}
        form["scales"] = name_of(weight.scales.dtype)
    return form


def _random_experts(description: Description, dtype: mx.Dtype, seed: int) -> Experts:
    forms = description["experts"]
    made = {part: random_weight(forms[part], seed=seed + 10 * i) for i, part in enumerate(MATRICES)}
    number, _, hidden = forms["gate"]["shape"]
    gains = [1 + 0.1 * mx.random.normal((hidden,), key=mx.random.key(seed + 50 + i)) for i in range(4)]
    gains[0] = gains[0] * 2.0  # the router's: scores that are far apart
    scale = 1 + 0.1 * mx.random.normal((number,), key=mx.random.key(seed + 60))
    vectors = [gain.astype(dtype) for gain in (*gains, scale)]
    mx.eval(vectors)
    return Experts(
        **made,
        router_norm=vectors[0],
        per_expert_scale=vectors[4],
        top_k=description["top_k"],
        pre_norm=vectors[1],
        post_norm=vectors[2],
        post_norm_of_mlp=vectors[3],
    )


def _cut(columns: int, most: int | None) -> int:
    if most is None or columns <= most:
        return columns
    return most - most % 64 + columns % 64


def _bytes(form: Description) -> int:
    size: int = math.prod(form["shape"])
    if "bits" not in form:
        return size * DTYPES[form["dtype"]].size
    return size * form["bits"] // 8 + size // form["group_size"] * 4
