"""mlx-lm's arms of peers.py: generate_step, or speculative_generate_step with a 4-bit copy of the target drafting.

mlx-lm cannot draft with Gemma's assistants. Its speculative decoding needs a whole model; the target's own 4-bit copy
stands in for one that agrees with it most of the time.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model
from peer_arm import Clock, Job, Play, Reply, run_arm
from peer_watch import watching

GROUP = 32
QUANTISED = (nn.Linear, nn.Embedding, SwitchLinear)


def load(job: Job) -> Any:
    model, _ = load_model(Path(job.target))
    if job.float32:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def four_bit_copy(job: Job) -> Any:
    model = load(job)

    def fits(_: str, module: Any) -> bool:
        return isinstance(module, QUANTISED) and module.weight.shape[-1] % GROUP == 0

    nn.quantize(model, group_size=GROUP, bits=4, class_predicate=fits)
    mx.eval(model.parameters())
    return model


def open_arm(job: Job) -> Play:
    model = load(job)
    draft_model = four_bit_copy(job) if job.drafts else None

    def plain(ids: list[int], clock: Clock) -> Reply:
        steps = generate_step(mx.array(ids), model, max_tokens=job.tokens)
        text = [next(steps)[0]]
        clock.start()  # the second token is under way already
        text.extend(token for token, _ in steps)
        mx.synchronize()
        clock.stop()
        return Reply(text, len(text) - 1, 0)

    def speculative(ids: list[int], clock: Clock) -> Reply:
        steps = speculative_generate_step(
            mx.array(ids), model, draft_model, num_draft_tokens=job.drafts, max_tokens=job.tokens
        )
        first = next(steps)[0]
        clock.start()  # the rest of the first round is on the host already
        taken = [(token, was_drafted) for token, _, was_drafted in steps]
        mx.synchronize()
        clock.stop()
        kept = sum(was_drafted for _, was_drafted in taken)
        return Reply([first, *(token for token, _ in taken)], max(len(taken) - kept, 1), kept)

    return speculative if job.drafts else plain


if __name__ == "__main__":
    run_arm(open_arm, ("mlx-lm", "mlx"), watching)
