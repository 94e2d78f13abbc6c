"""A request's finished answers -> OpenAI's reply objects, and the usage of all of them together."""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx_mtp
from mlx_mtp.reply import Generation
from mlx_mtp.server.asks import Ask
from mlx_mtp.server.log_probs import Entry
from mlx_mtp.server.refusals import SERVER, Refusal, unavailable
from mlx_mtp.server.tool_calls import Argued, Begun, Ended, NoCall, Part, ToolCallReader
from mlx_mtp.server.tool_choice import check_call, check_name
from mlx_mtp.stats import Stats

FINGERPRINT = f"mlx-mtp-{mlx_mtp.__version__}"


def as_bytes(value: Any) -> bytes:
    """JSON in ASCII: whatever a text holds, it can be sent."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of one reply begins with."""

    id: str
    created: int
    model: str
    kind: str

    def object(self, *, chunk: bool, **rest: Any) -> dict[str, Any]:
        if self.kind == "completion":
            name = "text_completion"
        else:
            name = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            **rest,
        }


def heading_of(ask: Ask, model: str) -> Heading:
    prefix = "chatcmpl" if ask.kind == "chat" else "cmpl"
    return Heading(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, ask.kind)


@dataclass(slots=True)
class Calls:
    """The calls of one answer, as their parts come."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""  # that looked like a call and is none

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if isinstance(part, Begun):
                function = {"name": part.name, "arguments": ""}
                self.calls.append({"id": part.id, "type": "function", "function": function})
            elif isinstance(part, Argued):
                self.calls[part.index]["function"]["arguments"] += part.text
            elif isinstance(part, NoCall):
                self.text += part.text


def finish_reason(result: Generation, calls: int, *, is_cut: bool = False) -> str:
    """OpenAI's word for how an answer ended. `is_cut`: this server ended it behind its first call.

    Raises Refusal for one that could not go on.
    """
    if result.finish_reason == "error":
        raise Refusal(500, result.note or "the reply could not go on", SERVER, code="generation")
    if result.finish_reason == "cancelled" and not is_cut:
        raise unavailable("the server is shutting down; ask again later", "shutting_down")
    if result.finish_reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"


@dataclass(slots=True)
class Answer:
    """One finished answer; `is_cut`: this server ended it behind its first call; `shown`: tokens with log_probs."""

    result: Generation
    is_cut: bool = False
    shown: list[Entry] = field(default_factory=list)


def reply_object(ask: Ask, heading: Heading, answers: Sequence[Answer]) -> dict[str, Any]:
    """All answers in one object. Raises Refusal where one failed."""
    make = _chat_choice if ask.kind == "chat" else _text_choice
    choices = [make(ask, at, answer) for at, answer in enumerate(answers)]
    usage = usage_of(ask, [answer.result.stats for answer in answers])
    return heading.object(chunk=False, choices=choices, usage=usage)


def _chat_choice(ask: Ask, at: int, answer: Answer) -> dict[str, Any]:
    result, calls = answer.result, Calls()
    if ask.has_tools:
        reader = ToolCallReader()
        parts = reader.push(result.tool_call)
        parts += reader.finish(is_whole=result.finish_reason != "length")
        calls.add(parts if ask.parallel_calls else up_to_a_call(parts))
        for call in calls.calls:
            check_name(ask.must_call, call["function"]["name"])
        check_call(ask.must_call, reader.complete, result.finish_reason)
        text = result.text + calls.text
    else:
        text = result.text + result.tool_call
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if result.thought:
        message["reasoning_content"] = result.thought
    if calls.calls:
        message |= {"content": text or None, "tool_calls": calls.calls}
    reason = finish_reason(result, len(calls.calls), is_cut=answer.is_cut)
    return {"index": at, "message": message, "logprobs": _log_probs(ask, answer), "finish_reason": reason}


def up_to_a_call(parts: list[Part]) -> list[Part]:
    """What is there to the end of the first call: one round may bring more."""
    ends = (at for at, part in enumerate(parts, 1) if isinstance(part, Ended))
    return parts[: next(ends, len(parts))]


def _text_choice(ask: Ask, at: int, answer: Answer) -> dict[str, Any]:
    result = answer.result
    choice: dict[str, Any] = {
        "index": at,
        "text": result.text + result.tool_call,
        "logprobs": _log_probs(ask, answer),
    }
    if result.thought:
        choice["reasoning_content"] = result.thought
    return choice | {"finish_reason": finish_reason(result, 0)}


def _log_probs(ask: Ask, answer: Answer) -> dict[str, Any] | None:
    return None if ask.log_probs is None else ask.log_probs.field(answer.shown)


def usage_of(ask: Ask, stats: Sequence[Stats]) -> dict[str, Any]:
    """Tokens of all answers, a prompt counted once however many answers it has; `mtp`: what drafting did for them."""
    prompts = stats[:: ask.n]
    read, written = sum(one.prompt_tokens for one in prompts), sum(one.generation_tokens for one in stats)
    rounds, drafted, accepted = (
        sum(getattr(one, name) for one in stats) for name in ("rounds", "drafted", "accepted")
    )
    after_first = sum(max(one.generation_tokens - 1, 0) for one in stats)
    reason = next((one.reason for one in stats if one.reason), None)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in prompts)},
        "mtp": {
            "rounds": rounds,
            "drafted": drafted,
            "accepted": accepted,
            "draft_acceptance_rate": round(accepted / drafted, 4) if drafted else None,
            "tokens_per_round": round(after_first / rounds, 4) if rounds else None,
            "parked": any(one.parked for one in stats),
            "reason": reason,
            "seed": ask.seed,
            "tokens_per_second": round(sum(one.generation_tps for one in stats), 2),
        },
    }
