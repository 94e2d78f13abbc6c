"""transformers' arms of peers.py on CPU torch: generate, alone or assisted by Gemma's own assistant."""

from typing import Any

import torch
from peer_arm import Clock, Job, Play, Reply, run_arm
from transformers import AutoModelForCausalLM


class Rounds:
    """A streamer that starts the clock with the first tokens and counts what comes after them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.calls = -1  # the first call brings the prompt

    def put(self, value: torch.Tensor) -> None:
        if self.calls == 0:
            self._clock.start()
        self.calls += 1

    def end(self) -> None:
        self._clock.stop()


def open_arm(job: Job) -> Play:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dtype = torch.float32 if job.float32 else "auto"
    target = AutoModelForCausalLM.from_pretrained(job.target, dtype=dtype).eval()
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if job.drafts:
        drafter = AutoModelForCausalLM.from_pretrained(job.drafter, dtype=dtype).eval()
        drafter.generation_config.num_assistant_tokens = job.drafts
        drafter.generation_config.num_assistant_tokens_schedule = "constant"
        drafter.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = drafter

    def play(ids: list[int], clock: Clock) -> Reply:
        prompt, rounds = torch.tensor([ids]), Rounds(clock)
        text = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=job.tokens,
            streamer=rounds,
            **options,
        )[0, len(ids) :].tolist()
        after = max(rounds.calls - 1, 1)
        return Reply(text, after, max(len(text) - 1 - after, 0) if job.drafts else 0)

    return play


if __name__ == "__main__":
    run_arm(open_arm, ("transformers", "torch"))
