"""Several answers to one prompt, decoded together: they share its prefill, and a conversation keeps it."""

from typing import Any

from mlx_mtp.api import DEFAULT_BATCH, answers_to, check_answers
from mlx_mtp.batch import generate_rows
from mlx_mtp.batch_watch import SILENT, Watch
from mlx_mtp.conversation import Conversation, Prompt, make_request
from mlx_mtp.reply import Generation


def answers_in(
    conversation: Conversation,
    prompt: Prompt,
    n: int,
    *,
    num_draft_tokens: int | str = "auto",
    watch: Watch = SILENT,
    max_batch: int = DEFAULT_BATCH,
    **options: Any,
) -> list[Generation]:
    """n answers to `prompt`, answer i with the seed + i; options as `make_request`.

    What earlier turns left in the conversation is not prefilled again, and the prompt's rows are kept there; the next
    prompt may go on with any of the answers, which is prefilled then. What `watch` raises ends them all. Raises
    ParameterError, PromptError or MemoryRefusal.
    """
    pair = conversation.pair
    request = make_request(pair, prompt, **options)
    rows = answers_to(request, check_answers(n))
    policy, history = pair.policy(num_draft_tokens), conversation.history
    outs = generate_rows(pair, rows, policy, conversation.guard, watch, max_batch=max_batch, history=history)
    if any(out.finish_reason == "error" for out in outs):
        conversation.clear()  # rows that are no numbers must not be reused, and scarce memory is freed
    return outs
