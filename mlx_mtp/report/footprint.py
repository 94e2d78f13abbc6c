"""What MLX and the process take at their peaks, against the estimate made from the configuration alone."""

import gc

import mlx.core as mx

from mlx_mtp.machine import footprint_bytes, free_bytes, pressure_level
from mlx_mtp.memory import estimate_memory
from mlx_mtp.pair import Pair
from mlx_mtp.report.acceptance import bits_of
from mlx_mtp.report.protocol import Deadline, Found
from mlx_mtp.report.setting import GREEDY, Setting, play, rounded

CONTEXTS = (512, 4096)
REPLY = 32


def memory(setting: Setting, found: Found, deadline: Deadline) -> None:
    """A prefill and some rounds at two contexts: MLX's peak and the process's footprint against the estimate."""
    pair = setting.the_pair
    gc.collect()
    mx.clear_cache()
    found["loaded"] = {"mlx_active_bytes": mx.get_active_memory(), "footprint_bytes": footprint_bytes()}
    found["contexts"] = []
    for context in CONTEXTS:
        deadline.check()
        ids = setting.long_prompt(context - REPLY)
        if found["contexts"] and len(ids) + REPLY <= found["contexts"][-1]["context"]:
            break  # the model's own context is shorter
        mx.clear_cache()
        mx.reset_peak_memory()
        before = footprint_bytes()
        reply = play(pair, ids, k=4 if pair.drafter else 0, tokens=REPLY, sampling=GREEDY)
        peak, after = mx.get_peak_memory(), footprint_bytes()
        entry = {
            "context": len(ids) + len(reply.tokens),
            "mlx_peak_bytes": peak,
            "footprint_before_bytes": before,
            "footprint_after_bytes": after,
            "prefill_tokens_per_second": rounded(reply.stats.prompt_tps),
            "free_bytes": free_bytes(),
            "pressure": pressure_level(),
        }
        found["contexts"].append(entry | against_estimate(setting, pair, int(entry["context"]), peak, after))


def against_estimate(setting: Setting, pair: Pair, context: int, peak: int, footprint: int) -> Found:
    """The estimate for this model and context, and what was measured as a share of it."""
    drafter = pair.drafter
    estimate = estimate_memory(
        pair.target.config if setting.target_folder is None else setting.target_folder,
        context,
        drafter=None if drafter is None else drafter.config,
        drafter_bits=None if drafter is None else bits_of(drafter.pre_projection),
        dtype=pair.target.dtype,
        turns=0,
    )
    arrays = estimate.total - estimate.overhead
    return {
        "estimate_bytes": dict(estimate.lines()),
        "estimate_total_bytes": estimate.total,
        "mlx_peak_share_of_estimated_arrays": rounded(peak / arrays),
        "footprint_share_of_estimate": rounded(footprint / estimate.total),
    }
