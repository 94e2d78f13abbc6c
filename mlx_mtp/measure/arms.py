"""What is compared: our plain decoding, mlx-lm's, MTP with `auto` and with fixed numbers of drafts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_watch import Watch as BatchWatch
from mlx_mtp.conversation import Conversation, Request, make_request
from mlx_mtp.errors import GenerationError
from mlx_mtp.measure.clock import Played, Player, Prompt, Watch
from mlx_mtp.measure.plan import PEER, drafts_of
from mlx_mtp.pair import Pair
from mlx_mtp.pressure import Guard
from mlx_mtp.round import Rounds
from mlx_mtp.sampling import SamplerClass, Sampling
from mlx_mtp.state import State

NEVER = float("-inf")


def sampling_of(pair: Pair, name: str) -> Sampling:
    """ "greedy" or the model's "default", with end-of-turn tokens kept out so that every reply has its full length."""
    sampling = Sampling(temperature=0.0) if name == "greedy" else pair.sampling
    ends = dict.fromkeys(pair.prompt_format.eos_ids, NEVER)
    return replace(sampling, logit_bias={**(sampling.logit_bias or {}), **ends})


def make_arms(pair: Pair, names: Sequence[str], sampling: Sampling, peer: Any = None) -> list[Player]:
    """The arms by name; `peer` is mlx-lm's model, needed for its arm only."""
    return [
        MlxLm(peer, pair, sampling) if name == PEER else Ours(name, pair, drafts_of(name) or 0, sampling)
        for name in names
    ]


class CountedRounds(Rounds):
    """Rounds that count how many kinds of them were traced: a sample in which one was says nothing about speed."""

    traced = 0

    def is_new(self, state: State, *, k: int, bucket: int, sampler: SamplerClass) -> bool:
        new = super().is_new(state, k=k, bucket=bucket, sampler=sampler)
        self.traced += new
        return new


def counted(pair: Pair) -> tuple[Pair, CountedRounds]:
    """The same pair on rounds of its own, which count; what it learns of their times is shared."""
    rounds = CountedRounds(pair.target, pair.drafter, compiled=pair.rounds.compiled, times=pair.rounds.times)
    return replace(pair, rounds=rounds), rounds


class Ours:
    """Replies of this project, each from a cold cache; what rounds cost is known from those before, as in a chat."""

    def __init__(self, name: str, pair: Pair, num_draft_tokens: int | str, sampling: Sampling) -> None:
        self.name = name
        self._pair, self._drafts, self._sampling = pair, num_draft_tokens, sampling

    def play(self, group: Sequence[Prompt], watch: Watch) -> Played:
        requests = [
            make_request(
                self._pair,
                prompt.ids,
                max_tokens=prompt.tokens,
                sampling=replace(self._sampling, seed=prompt.seed),
            )
            for prompt in group
        ]
        return self._alone(requests[0], watch) if len(group) == 1 else self._together(requests, watch)

    def _alone(self, request: Request, watch: Watch) -> Played:
        conversation = Conversation(self._pair)
        text: list[int] = []
        for chunk in conversation.stream(
            request.ids,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            num_draft_tokens=self._drafts,
        ):
            watch.arrived(len(chunk.tokens))
            text += chunk.tokens
            last = chunk
        _refuse_broken(self._pair, [last.finish_reason])
        return Played([text], [last.stats], list(conversation.history.buffers()))

    def _together(self, requests: list[Request], watch: Watch) -> Played:
        policy = self._pair.policy(self._drafts)
        seen = 0

        def on_round(tokens: int) -> None:
            nonlocal seen
            watch.arrived(tokens - seen)
            seen = tokens

        outs = generate_rows(
            self._pair, requests, policy, Guard(), BatchWatch(on_round=on_round), max_batch=len(requests)
        )
        _refuse_broken(self._pair, [out.finish_reason for out in outs])
        return Played([out.tokens for out in outs], [out.stats for out in outs], ())


class MlxLm:
    """Plain decoding by mlx-lm: `generate_step` for one reply, its `BatchGenerator` for several."""

    name = PEER

    def __init__(self, model: Any, pair: Pair, sampling: Sampling) -> None:
        self._model = model
        self._sampler = _mlx_lm_sampler(pair.target.text.vocab_size, sampling)

    def play(self, group: Sequence[Prompt], watch: Watch) -> Played:
        mx.random.seed(group[0].seed)
        return self._alone(group[0], watch) if len(group) == 1 else self._together(group, watch)

    def _alone(self, prompt: Prompt, watch: Watch) -> Played:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)
        text = []
        steps = generate_step(
            mx.array(prompt.ids, mx.uint32),
            self._model,
            max_tokens=prompt.tokens,
            sampler=self._sampler,
            prompt_cache=cache,
        )
        for token, _ in steps:
            watch.arrived(1)
            text.append(int(token))
        return Played([text], [], [layer.state for layer in cache])

    def _together(self, group: Sequence[Prompt], watch: Watch) -> Played:
        from mlx_lm.generate import BatchGenerator

        width = len(group)
        generator: Any = BatchGenerator(
            self._model, sampler=self._sampler, completion_batch_size=width, prefill_batch_size=width
        )
        names = generator.insert([prompt.ids for prompt in group], [prompt.tokens for prompt in group])
        texts: dict[int, list[int]] = {name: [] for name in names}
        while responses := generator.next_generated():
            watch.arrived(len(responses))
            for response in responses:
                texts[response.uid].append(int(response.token))
        generator.close()
        return Played([texts[name] for name in names], [], ())


def _mlx_lm_sampler(vocab_size: int, sampling: Sampling) -> Any:
    """mlx-lm's own sampler for these settings; one addition keeps the same tokens out as in our arms."""
    from mlx_lm.sample_utils import make_sampler

    bias = mx.zeros((vocab_size,))
    for token, value in (sampling.logit_bias or {}).items():
        bias[token] = value
    mx.eval(bias)
    choose = make_sampler(
        temp=sampling.temperature, top_p=sampling.top_p, min_p=sampling.min_p, top_k=sampling.top_k
    )
    return lambda log_probs: choose(log_probs + bias.astype(log_probs.dtype))


def _refuse_broken(pair: Pair, reasons: Sequence[str | None]) -> None:
    if "error" in reasons:
        raise GenerationError(
            f"{pair.name} gave no finite logits to choose from, or memory ran out; check the model or close programs"
        )
