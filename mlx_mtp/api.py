"""The three functions most programs need: a reply, a reply as it comes, and many replies at once."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, Literal

from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_choice import check_goal, make_chooser
from mlx_mtp.batch_watch import Watch
from mlx_mtp.batch_width import check_batch
from mlx_mtp.conversation import Conversation, Prompt, Request, make_request
from mlx_mtp.errors import ParameterError
from mlx_mtp.pair import Pair
from mlx_mtp.pressure import Guard
from mlx_mtp.reply import Chunk, Generation, collect
from mlx_mtp.sampling import Sampling

DEFAULT_BATCH = 8  # rows decoded together unless told otherwise
MAX_ANSWERS = 64


def stream_generate(
    pair: Pair,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    num_draft_tokens: int | str = "auto",
    stop: str | Sequence[str] = (),
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
    log_probs: int | None = None,
    begin_with: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Generator[Chunk, None, None]:
    """Reply to a prompt chunk by chunk; closing the iterator cancels within one round.

    prompt: text as is, token ids, or chat messages (the model's template is applied). sampling None: the model's own
    defaults. num_draft_tokens: "auto", or 0 (plain) to 15. log_probs: 0 for those of the reply's tokens, up to 20 for
    so many alternatives with each, in the chunks' `written` (see `TokenLogProbs`). begin_with: ids that the reply is
    made to begin with. Raises PromptError or ParameterError before any work.
    """
    return Conversation(pair).stream(
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        num_draft_tokens=num_draft_tokens,
        stop=stop,
        tools=tools,
        thinking=thinking,
        log_probs=log_probs,
        begin_with=begin_with,
        on_progress=on_progress,
    )


def generate(pair: Pair, prompt: Prompt, **options: Any) -> Generation:
    """A whole reply; options as `stream_generate`."""
    return collect(stream_generate(pair, prompt, **options))


def generate_batch(
    pair: Pair,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    max_batch: int | Literal["auto"] = "auto",
    goal: str = "throughput",
    max_tokens: int = 256,
    sampling: Sampling | Sequence[Sampling] | None = None,
    num_draft_tokens: int | str = "auto",
    stop: str | Sequence[str] = (),
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
    log_probs: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Replies to all prompts, at most `max_batch` decoded together; n answers to a prompt share its prefill.

    max_batch "auto": as many as pay on this machine, from times of rounds that are known or tried meanwhile, for the
    `goal` "throughput" (tokens a second of all) or "latency" (each reply nearly as fast as alone).
    The answers to a prompt follow one another; answer i has the prompt's seed + i. sampling: one for all or one per
    prompt. A row joins as soon as another has ended. Rows do not influence each other: each text is that of its own
    solo run, where rows are invariant (see `exactness`). While memory is short fewer rows are decoded at a time (see
    `generate_rows`).
    """
    wide = max_batch if max_batch == "auto" else check_batch(max_batch)
    wanted = check_goal(goal)
    check_answers(n)
    if not prompts:
        return []
    per_prompt = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
    if len(per_prompt) != len(prompts):
        raise ParameterError(
            f"one sampling for all or one per prompt is needed, got {len(per_prompt)} for {len(prompts)} prompts; "
            "give as many as there are prompts"
        )
    requests = [
        make_request(
            pair,
            prompt,
            max_tokens=max_tokens,
            sampling=own,
            stop=stop,
            tools=tools,
            thinking=thinking,
            log_probs=log_probs,
        )
        for prompt, own in zip(prompts, per_prompt, strict=True)
    ]
    rows = [answer for request in requests for answer in answers_to(request, n)]
    policy, rounds = pair.policy(num_draft_tokens), pair.rounds
    chooser = make_chooser(rounds.times, rounds.fit, num_draft_tokens, wanted) if wide == "auto" else wide
    return generate_rows(pair, rows, policy, Guard(), Watch(on_progress), max_batch=chooser)


def check_answers(n: int) -> int:
    """`n` if so many answers can be asked for; ParameterError otherwise."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_ANSWERS:
        raise ParameterError(f"n must be 1 .. {MAX_ANSWERS} answers, got {n!r}; ask for at least one")
    return n


def answers_to(request: Request, n: int) -> list[Request]:
    """The request n times, with seeds that follow one another."""
    seed = request.sampling.seed or 0
    return [replace(request, sampling=replace(request.sampling, seed=seed + i)) for i in range(n)]
