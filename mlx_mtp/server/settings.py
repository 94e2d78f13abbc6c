"""How tokens are chosen, where they stop and how many are drafted: a request's fields -> the library's settings."""

import secrets
from dataclasses import replace
from typing import Any

from mlx_mtp.errors import ParameterError
from mlx_mtp.log_probs import MOST_ALTERNATIVES
from mlx_mtp.sampling import Sampling
from mlx_mtp.server.body import check_bytes
from mlx_mtp.server.fields import Fields
from mlx_mtp.server.refusals import bad, refusal_of

MAX_STOPS = 4
LEAST_REPETITION = 0.01  # logits divided by less stop being numbers
SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def stops_of(fields: Fields) -> tuple[str, ...]:
    value = fields.value("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise bad("stop", "stop must be a text or a list of texts", "invalid_type")
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"at most {MAX_STOPS} stops are allowed, got {len(stops)}; give fewer")
    for stop in stops:
        if not stop:
            raise bad("stop", "a stop must not be empty; remove it")
        check_bytes(stop, "stop")
    return tuple(stops)


def drafts_of(fields: Fields, default: int | str) -> int | str:
    """`mtp`: "auto", "off" or a number of draft tokens; how it is, not what comes out."""
    value = fields.value("mtp")
    if value is None:
        return default
    if value == "off":
        return 0
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 15:
        return value
    raise bad("mtp", 'mtp must be "auto", "off" or a number of draft tokens from 0 to 15; choose one')


def sampling_of(fields: Fields, default: Sampling) -> Sampling:
    given: dict[str, Any] = {name: fields.number(name) for name in SAMPLING}
    repetition = given["repetition_penalty"]
    if repetition is not None and repetition < LEAST_REPETITION:
        raise bad(
            "repetition_penalty",
            f"repetition_penalty must be {LEAST_REPETITION} to 100; choose in that range",
        )
    given["top_k"] = fields.whole("top_k", 0)
    given["seed"] = fields.whole("seed")
    given["logit_bias"] = _bias(fields)
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("seed", secrets.randbits(31))
    try:
        return replace(default, **given)
    except ParameterError as error:
        raise refusal_of(error) from None


def _bias(fields: Fields) -> dict[int, float] | None:
    bias = fields.object("logit_bias")
    if not bias:
        return None
    read: dict[int, float] = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise bad("logit_bias", 'logit_bias has token ids for names, such as "42"; give numbers')
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise bad("logit_bias", "logit_bias has values from -100 to 100; choose values in that range")
        read[int(name)] = value
    return read


def chat_log_probs_of(fields: Fields) -> int | None:
    """`logprobs` true or false, `top_logprobs` 0 to 20 -> alternatives with each token, None for no log_probs."""
    count = fields.whole("top_logprobs", 0, MOST_ALTERNATIVES)
    if fields.flag("logprobs", False):
        return count or 0
    if count is not None:
        raise bad("top_logprobs", "top_logprobs go with logprobs; set logprobs to true, or leave them out")
    return None


def text_log_probs_of(fields: Fields) -> int | None:
    """`logprobs` of a text completion, a number."""
    return fields.whole("logprobs", 0, MOST_ALTERNATIVES)
