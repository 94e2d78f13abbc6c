"""How many drafts are kept in whole replies: by draft position, drafter bits, sampling and kind of prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx_mtp
from mlx_mtp.checkpoint import read_drafter
from mlx_mtp.drafter import Drafter, make_drafter
from mlx_mtp.errors import MtpError
from mlx_mtp.pair import Pair
from mlx_mtp.reply import Generation
from mlx_mtp.report.protocol import Deadline, Found, NotHere
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded, with_drafter
from mlx_mtp.sampling import Sampling
from mlx_mtp.weights import QuantizedWeight

K = 4
CONTEXT = 2048  # tokens that another precision is opened for
DRAFTER_BITS = (16, 8, 4)


def tally(replies: Sequence[Generation], k: int) -> dict[str, Any]:
    """Replies played with k drafts -> rates; `by_position[j]`: how often draft j was kept when those before it were."""
    rounds = sum(reply.stats.num_draft_tokens.count(k) for reply in replies)
    kept = [0] * k
    for reply in replies:
        for position, count in enumerate(reply.stats.accepted_by_position[:k]):
            kept[position] += count
    reached = [rounds, *kept[:-1]]
    drafted = sum(reply.stats.drafted for reply in replies)
    all_rounds = sum(reply.stats.rounds for reply in replies)
    emitted = sum(max(reply.stats.generation_tokens - 1, 0) for reply in replies)
    return {
        "replies": len(replies),
        "tokens": emitted,
        "rounds": all_rounds,
        "acceptance_rate": rounded(sum(kept) / drafted) if drafted else None,
        "tokens_per_round": rounded(emitted / all_rounds) if all_rounds else None,
        "by_position": [rounded(a / b) if b else None for a, b in zip(kept, reached, strict=True)],
    }


def acceptance(setting: Setting, found: Found, deadline: Deadline) -> None:
    """The stored target with the drafter at 16, 8 and 4 bits, greedy and with the model's own sampling."""
    pair = setting.the_pair
    if pair.drafter is None:
        raise NotHere("the model was opened without a drafter")
    found["target"] = bits_of(pair.target.layers[0].q_proj)
    found["k"] = K
    found["drafters"] = {}
    for name, drafter in drafters_of(setting, pair.drafter):
        played: dict[str, Any] = {}
        found["drafters"][name] = played
        measure_acceptance(with_drafter(pair, drafter), setting, played, deadline)


def other_targets(setting: Setting, found: Found, deadline: Deadline) -> None:
    """The same for the other precisions of this model that are downloaded, each opened beside it if memory allows."""
    from mlx_mtp.aliases import ALIASES
    from mlx_mtp.cache import cached_snapshot

    own = setting.target_folder
    others = [
        alias
        for alias in ALIASES
        if alias.size == setting.size and cached_snapshot(alias.target) not in (None, own)
    ]
    if not others:
        raise NotHere("no other precision of this model is downloaded (mlx-mtp models pull)")
    for alias in others:
        deadline.check()
        found[alias.name] = {}
        try:
            pair = mlx_mtp.load(alias.name, max_context=min(CONTEXT, setting.the_pair.max_context))
        except MtpError as error:
            found[alias.name]["refusal"] = str(error)
            continue
        beside = replace(setting, pair=pair, drafter_folder=pair.drafter_folder, target_folder=pair.folder)
        acceptance(beside, found[alias.name], deadline)


def measure_acceptance(pair: Pair, setting: Setting, found: Found, deadline: Deadline) -> None:
    """Rates by sampling and by kind of prompt, filled in after each reply."""
    for name, sampling in samplings_of(pair).items():
        replies: dict[str, Generation] = {}
        for seed, (kind, ids) in enumerate(setting.prompt_tokens().items()):
            deadline.check()
            row = replace(sampling, seed=seed)
            replies[kind] = play(pair, ids, k=K, tokens=setting.tokens, sampling=row)
            found[name] = {
                **tally(list(replies.values()), K),
                "tokens_per_round_by_prompt": {
                    kind: rounded(reply.stats.tokens_per_round) for kind, reply in replies.items()
                },
            }


def samplings_of(pair: Pair) -> dict[str, Sampling]:
    """Greedy, and the model's own defaults where they differ from it."""
    both = {"greedy": GREEDY, "default": pair.sampling}
    return both if pair.sampling.temperature else {"greedy": GREEDY}


def drafters_of(setting: Setting, own: Drafter) -> Iterator[tuple[str, Drafter]]:
    """The drafter as its files have it, then made smaller, by "16-bit" and so on; without files the loaded one."""
    folder, dtype = setting.drafter_folder, setting.the_pair.target.dtype
    if folder is None:
        yield f"{bits_of(own.pre_projection)}-bit", own
        return
    from mlx_mtp.quantize import quantize_tensors

    stored = read_drafter(folder, dtype=dtype, scan=False)
    stored_bits = bits_of(stored.tensors["pre_projection"])
    yield f"{stored_bits}-bit", make_drafter(stored.config, stored.tensors)
    for bits in DRAFTER_BITS:
        if bits < stored_bits == 16:
            again = read_drafter(folder, dtype=dtype, scan=False)
            yield f"{bits}-bit", make_drafter(again.config, quantize_tensors(again.tensors, bits))


def bits_of(weight: Any) -> int:
    """Bits a value of a weight matrix: as quantised, or 16 for one that is stored dense."""
    return weight.bits if isinstance(weight, QuantizedWeight) else 16
