"""Predicts a published gain of MTP: stock kernels as its source had them, and ours; no row has constants of its own."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from published_gains import Gain
from sim_curves import BY_NAME, MOST, WAYS, CostCurve, configs, curve_of
from sim_texts import SHIPPED_MLP_BITS, chance_of, tokens_of

from mlx_mtp.chips import Chip, Curve, stock_curve

# For rows whose source gives no acceptance. 31B, accepted of drafted with 2 and 3 drafts: llama.cpp #23398.
DENSE = {"code": 0.615, "explain": 0.66, "Q&A": 0.72, "math": 0.77, "prose": 0.54}
LIKE = {"list": "math", "science": "explain", "software": "explain", "history": "explain"}
# 26B-A4B: a user's oMLX file (M5, tokens a round), r/LocalLLaMA (M4 Max, accepted of drafted).
MIXED: dict[str, dict[str, Any]] = {
    "code": {"tokens_a_round": 3.35, "drafts": [4]},
    "chat": {"tokens_a_round": 2.60, "drafts": [4]},
    "prose": {"rate": 0.31, "drafts": [3]},
    "JSON": {"rate": 0.08, "drafts": [3]},
}
SMALL = {"tokens_a_round": 1.43, "drafts": [3]}  # E4B: mlx-vlm #1121
# 16-bit products of several rows before MLX 0.32.1, by generation: from M3 on, and before.
PADDED = Curve((1, 2, 8), (1, 1.99, 1.99), "mlx#4265, M3 Ultra")
PADDED_BEFORE_M3 = Curve((1, 2, 8), (1, 2.88, 2.88), "mlx#3661")
# To build one layer of a round in Python, while the GPU waits: `backbone` of oMLX #1097, 1305 ms of 68 rounds of the 64
# layers of a Qwen 27B on an M1, before oMLX #1337 made that figure hold the GPU's time too.
HOST_SECONDS_A_LAYER = 1.3053 / 68 / 64


@dataclass(frozen=True, slots=True)
class Predicted:
    """A row with what is predicted for it: stock kernels at its drafts, ours at its drafts and at the best number."""

    gain: Gain
    chance: float
    stock: float
    ours: float
    best: int
    ours_best: float
    plain: float  # tokens a second on ours
    shared: float | None  # ours_best if experts are shared as elsewhere


def chance(gain: Gain) -> float:
    """Of a draft to be right if those before it were: as the source says, or of the kind of text."""
    if gain.tokens is not None:
        return chance_of({"tokens_a_round": gain.tokens, "drafts": [gain.drafts]})
    if gain.accepted is not None:
        return chance_of({"rate": gain.accepted, "drafts": [gain.drafts]})
    if gain.size == "e4b":
        return chance_of(SMALL)
    if gain.size == "26b-a4b":
        return chance_of(MIXED["chat" if gain.text == "mean" else gain.text])
    rate = statistics.mean(DENSE.values()) if gain.text == "mean" else DENSE[LIKE.get(gain.text, gain.text)]
    return chance_of({"rate": rate, "drafts": [2, 3]})


def products(gain: Gain, is_emulated: bool) -> Callable[[Chip], Curve]:
    """How the stock products of this row's setup grow with rows; is_emulated: bfloat16 costs more on M1 and M2."""

    def of_chip(chip: Chip) -> Curve:
        is_old = chip.generation < 15
        if gain.bits == 16:
            return PADDED_BEFORE_M3 if is_old else PADDED
        has_wide = gain.has_wide and not gain.is_exact
        if is_old and not is_emulated:
            return stock_curve(replace(chip, generation=15), has_wide=has_wide and not gain.is_affine)
        return stock_curve(chip, has_wide=has_wide, is_affine=gain.is_affine)

    return of_chip


def curve(gain: Gain, kernels: str, *, is_emulated: bool = True, has_host: bool = True) -> CostCurve:
    """has_host: rounds with drafts wait for the host where the engine is written in Python; plain ones overlap it."""
    way = WAYS[kernels]
    if kernels == "stock":
        way = replace(way, dense=products(gain, is_emulated))
    costs = curve_of(
        gain.size,
        BY_NAME[gain.chip],
        way,
        bits=gain.bits,
        mlp_bits=gain.mlp_bits or SHIPPED_MLP_BITS.get(gain.size),
        drafter_bits=gain.drafter_bits,
        context=gain.context,
    )
    if kernels != "stock" or not (has_host and gain.is_python):
        return costs
    host = HOST_SECONDS_A_LAYER * configs(gain.size)[0].text.num_layers
    return replace(costs, verify=(costs.verify[0], *(seconds + host for seconds in costs.verify[1:])))


def speed_up(costs: CostCurve, right: float, drafts: int) -> float:
    return tokens_of(right, drafts) * costs.own(0) / costs.own(drafts)


def predict(gain: Gain, *, is_emulated: bool = True, has_host: bool = True) -> Predicted:
    right, ours = chance(gain), curve(gain, "ours")
    stock = curve(gain, "stock", is_emulated=is_emulated, has_host=has_host)
    best = max(range(MOST + 1), key=lambda k: speed_up(ours, right, k))
    shared = None
    if gain.size == "26b-a4b":
        costs = curve(gain, "ours, experts shared as elsewhere")
        shared = max(speed_up(costs, right, k) for k in range(MOST + 1))
    return Predicted(
        gain,
        right,
        speed_up(stock, right, gain.drafts),
        speed_up(ours, right, gain.drafts),
        best,
        speed_up(ours, right, best),
        1 / ours.own(0),
        shared,
    )
