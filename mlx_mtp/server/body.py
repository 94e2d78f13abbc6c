"""A request's body -> a JSON object, within limits of size and time."""

import json
from typing import Any, NoReturn

import anyio
from starlette.requests import Request
from starlette.types import Message

from mlx_mtp.server.refusals import Refusal, bad

LARGEST_BODY = 8 << 20  # bytes; two longest prompts in their JSON form
BODY_WITHIN_S = 30.0


class Gone(Exception):
    """The client has left before its request was there."""


async def json_object(request: Request) -> dict[str, Any]:
    """The body as an object. Raises Refusal, or Gone."""
    _check_headers(request)
    try:
        with anyio.fail_after(BODY_WITHIN_S):
            data = await _read(request)
    except TimeoutError:
        # The rest of the body may still come, so the connection is of no more use.
        headers = {"connection": "close"}
        words = f"the body did not arrive within {BODY_WITHIN_S:g} s; send it at once"
        raise Refusal(408, words, code="timeout", headers=headers) from None
    return parse(data)


def parse(data: bytes) -> dict[str, Any]:
    """JSON's bytes -> an object. Raises Refusal."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8; encode it so", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        words = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise Refusal(400, f"the body is not JSON: {words}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Anything else can be posted by any web page without the browser asking first.
        raise Refusal(415, "the body must be sent as Content-Type: application/json", code="content_type")
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise Refusal(411, "the request has no Content-Length; send one", code="length_required")
    if length is not None and int(length) > LARGEST_BODY:  # h11 lets through nothing but digits
        raise _too_large()


def _too_large() -> Refusal:
    words = f"the body has more than {LARGEST_BODY >> 20} MiB; shorten it"
    return Refusal(413, words, code="too_large")


async def _read(request: Request) -> bytes:
    data = bytearray()
    while True:
        message: Message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        data += message.get("body", b"")
        if len(data) > LARGEST_BODY:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(data)


def check_bytes(value: str, name: str) -> None:
    """Raise a 400 for text that no UTF-8 can hold: half a surrogate pair, which JSON can write."""
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise bad(name, f"{name} holds half a surrogate pair; send whole characters")
