"""How many distinct experts a pass of several rows needs: on the model's own text, layer by layer."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_mtp.cost import independent_experts
from mlx_mtp.layers import Layer
from mlx_mtp.report.observe import forward_text, watched, with_layers
from mlx_mtp.report.protocol import Deadline, Found, NotHere
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded
from mlx_mtp.target import Target

MOST_ROWS = 16  # as many as a verify has at most


class Text(NamedTuple):
    """Tokens whose rows are looked at, and those before them."""

    before: list[int]
    rows: list[int]


def expert_overlap(setting: Setting, found: Found, deadline: Deadline) -> None:
    """Distinct experts of 1 to 16 consecutive rows of greedy replies, against independent choice and none shared."""
    target = setting.the_pair.target
    if not target.text.num_experts:
        raise NotHere(
            "the model has no experts; mlx-mtp tune 26b --experts answers this, and docs/tuning.md says how to send it"
        )
    measure_overlap(target, replies(setting), found, deadline.check)


def replies(setting: Setting) -> Iterator[Text]:
    """The model's greedy replies to the fixed prompts, each played when it is asked for."""
    for ids in setting.prompt_tokens().values():
        reply = play(setting.the_pair, ids, k=0, tokens=setting.tokens, sampling=GREEDY)
        yield Text(ids, reply.tokens)


def measure_overlap(target: Target, texts: Iterable[Text], found: Found, check: Callable[[], None]) -> None:
    """Fill `found` after each text; `check` is called between passes, and what it raises ends the work."""
    text = target.text
    found["experts"], found["experts_per_token"] = text.num_experts, text.num_experts_per_token
    routes: list[list[set[int]]] = [[] for _ in range(text.num_layers)]
    breaks: list[int] = []  # where one text's rows end and the next one's begin
    for before, rows in texts:
        check()
        for layer, own in enumerate(routes_of(target, before, rows, check)):
            routes[layer] += own
        breaks.append(len(routes[0]))
        found.update(summary(routes, breaks, text.num_experts, text.num_experts_per_token))


def routes_of(
    target: Target, prompt: list[int], reply: list[int], check: Callable[[], None]
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
        check()
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
    texts = list(zip([0, *breaks[:-1]], breaks, strict=True))
    layers = [_mean_distinct(layer, texts) for layer in routes]
    by_rows: dict[str, Found] = {}
    for rows in range(1, MOST_ROWS + 1):
        known = [means[rows] for means in layers if rows in means]
        if not known:
            continue
        mean = sum(known) / len(known)
        by_rows[str(rows)] = {
            "distinct": rounded(mean),
            "independent": rounded(independent_experts(rows, experts, top_k)),
            "pairs": rows * top_k,
            "share_of_pairs": rounded(mean / (rows * top_k)),
        }
    return {
        "rows_of_text": len(routes[0]),
        "by_rows": by_rows,
        "distinct_at_4_rows_by_layer": [rounded(means[4]) if 4 in means else None for means in layers],
    }


def _mean_distinct(layer: list[set[int]], texts: list[tuple[int, int]]) -> dict[int, float]:
    """By number of rows, over every run of so many consecutive rows within one text."""
    totals, runs = [0] * (MOST_ROWS + 1), [0] * (MOST_ROWS + 1)
    for low, high in texts:
        for at in range(low, high):
            used: set[int] = set()
            for rows, own in enumerate(layer[at : min(at + MOST_ROWS, high)], start=1):
                used |= own
                totals[rows] += len(used)
                runs[rows] += 1
    return {rows: totals[rows] / runs[rows] for rows in range(1, MOST_ROWS + 1) if runs[rows]}
