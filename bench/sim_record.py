"""A trace of a pair on the CPU: at each place of greedy texts, how many drafts made there would be right."""

import json
from pathlib import Path

from demo_models import held_out_chat, held_out_code, load_ours

from mlx_mtp import Sampling, generate, stream_generate
from mlx_mtp.pair import Pair

TOKENS = 100  # of each text
PROMPTS = 2  # of code, and as many of chat
GREEDY = Sampling(temperature=0.0)


def record_trace(name: str, path: Path, most: int) -> None:
    """Decode held-out prompts, then play one round with `most` drafts from each place of what came."""
    pair = load_ours(name)
    right: list[int] = []
    for prompt in held_out_code(name, PROMPTS) + held_out_chat(pair, name, PROMPTS):
        text = generate(
            pair, prompt, max_tokens=TOKENS + most + 1, sampling=GREEDY, num_draft_tokens=0
        ).tokens
        right += [right_behind(pair, [*prompt, *text[:place]], most) for place in range(TOKENS)]
        print(f"{len(right)} places, {sum(right) / len(right):.2f} drafts right on average", flush=True)
    kept = {
        "title": "code and chat of the demo pair, recorded",
        "source": f"bench/simulate.py --record {name}: greedy, float32, drafts behind each token of {PROMPTS} "
        f"held-out code prompts and {PROMPTS} of chat",
        "sizes": ["31b", "12b", "e4b", "e2b", "26b-a4b"],
        "right": right,
    }
    path.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def right_behind(pair: Pair, ids: list[int], most: int) -> int:
    """Drafts of the first round behind `ids` and the token that prefill gives."""
    chunks = stream_generate(pair, ids, max_tokens=most + 2, sampling=GREEDY, num_draft_tokens=most)
    next(chunks)
    first_round = next(chunks)
    chunks.close()
    return len(first_round.tokens) - 1
