"""How many distinct experts a pass of several rows needs: on the model's own text, layer by layer."""

from dataclasses import replace
from typing import cast

import mlx.core as mx

from mlx_mtp.layers import Layer
from mlx_mtp.report.observe import forward_text, watched, with_layers
from mlx_mtp.report.protocol import Deadline, Found, NotHere
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded
from mlx_mtp.target import Target

MOST_ROWS = 9


def expert_overlap(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Distinct experts of 1 to 9 consecutive rows of greedy replies, against independent choice and none shared."""
    pair = setting.the_pair
    text = pair.target.text
    if not text.num_experts:
        raise NotHere("the model has no experts; open 26b to answer this")
    found["experts"], found["experts_per_token"] = text.num_experts, text.num_experts_per_token
    routes: list[list[set[int]]] = [[] for _ in range(text.num_layers)]
    breaks: list[int] = []  # where one reply's rows end and the next one's begin
    for ids in setting.prompt_tokens().values():
        deadline.check()
        reply = play(pair, ids, k=0, tokens=setting.tokens, sampling=GREEDY)
        for layer, rows in enumerate(routes_of(pair.target, ids, reply.tokens, deadline)):
            routes[layer] += rows
        breaks.append(len(routes[0]))
        found.update(summary(routes, breaks, text.num_experts, text.num_experts_per_token))


def routes_of(
    target: Target, prompt: list[int], reply: list[int], deadline: Deadline
) -> list[list[set[int]]]:
    """By layer, for each token of the reply: the experts that its row is sent to."""
    seen: list[list[mx.array]] = [[] for _ in target.layers]

    def watch(i: int, layer: Layer) -> Layer:
        assert layer.experts is not None
        top_k = layer.experts.top_k

        def look(x: mx.array, scores: mx.array) -> None:
            best = mx.argpartition(scores.astype(mx.float32), kth=-top_k, axis=-1)[..., -top_k:]
            seen[i].append(best)

        return replace(layer, experts=replace(layer.experts, router=watched(layer.experts.router, look)))

    spying = with_layers(target, watch)
    ids = [*prompt, *reply]
    for _ in forward_text(spying, ids, start=len(prompt)):
        deadline.check()
    mx.eval(seen)
    # The prompt's rows came first: a prefill shows one entry a chunk, and fewer for the last layer.
    return [_last_rows(entries, len(reply)) for entries in seen]


def _last_rows(entries: list[mx.array], rows: int) -> list[set[int]]:
    chosen = mx.concatenate([entry.reshape(-1, entry.shape[-1]) for entry in entries])[-rows:]
    return [set(row) for row in cast(list[list[int]], chosen.tolist())]


def summary(
    routes: list[list[set[int]]], breaks: list[int], experts: int, top_k: int, most_rows: int = MOST_ROWS
) -> Found:
    """Mean distinct experts by number of rows, over layers; shares of pairs; and each layer's own at 4 rows."""
    starts = [0, *breaks[:-1]]
    replies = list(zip(starts, breaks, strict=True))
    by_rows: dict[str, Found] = {}
    for rows in range(1, most_rows + 1):
        layers = [_mean_distinct(layer, replies, rows) for layer in routes]
        known = [value for value in layers if value is not None]
        if not known:
            continue
        mean = sum(known) / len(known)
        by_rows[str(rows)] = {
            "distinct": rounded(mean),
            "independent": rounded(experts * (1 - (1 - top_k / experts) ** rows)),
            "pairs": rows * top_k,
            "share_of_pairs": rounded(mean / (rows * top_k)),
        }
    four = [_mean_distinct(layer, replies, 4) for layer in routes]
    return {
        "rows_of_text": len(routes[0]),
        "by_rows": by_rows,
        "distinct_at_4_rows_by_layer": [None if value is None else rounded(value) for value in four],
    }


def _mean_distinct(layer: list[set[int]], replies: list[tuple[int, int]], rows: int) -> float | None:
    """Over every run of `rows` consecutive rows within one reply."""
    counts = [
        len(set().union(*layer[at : at + rows]))
        for low, high in replies
        for at in range(low, high - rows + 1)
    ]
    return sum(counts) / len(counts) if counts else None
