"""The routes: what each address answers, and one line of access log for each request."""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mlx_mtp
from mlx_mtp.engine import Engine
from mlx_mtp.server.answering import Live, Outcome, answer
from mlx_mtp.server.asks import Ask, Served, chat_ask, completion_ask
from mlx_mtp.server.body import Gone, json_object
from mlx_mtp.server.guards import Guard
from mlx_mtp.server.openapi import openapi
from mlx_mtp.server.refusals import SERVER, Refusal, refusal_of, unavailable
from mlx_mtp.server.replies import as_bytes
from mlx_mtp.server.templates import template_of

ACCESS = logging.getLogger("mlx_mtp.server.access")
LOG = logging.getLogger("mlx_mtp.server")


@dataclass(slots=True)
class Service:
    """An engine and how it is offered: shared by all requests, on the event loop's thread."""

    engine: Engine
    model: str
    guard: Guard
    max_tokens: int = 4096
    num_draft_tokens: int | str = "auto"
    thinking: bool | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    live: Live = field(default_factory=Live)
    is_closing: bool = False
    _served: Served | None = None

    def check_ready(self) -> None:
        """Raise 503 while the model is loaded, after it has failed, and once the server closes."""
        status = self.engine.status.status
        if self.is_closing or status == "closed":
            raise unavailable("the server is shutting down; ask another one", "shutting_down")
        if status == "loading":
            raise unavailable("the model is being loaded; ask again in a moment", "loading")
        if status == "failed":
            raise unavailable("the model cannot be used any more; the server's log says why", "failed")

    @property
    def served(self) -> Served:
        """What requests are checked against, once the model is there."""
        if self._served is None:
            pair = self.engine.pair
            self._served = Served(
                pair,
                self.model,
                template_of(pair.prompt_format),
                self.max_tokens,
                self.num_draft_tokens,
                self.thinking,
            )
        return self._served


def make_app(service: Service) -> ASGIApp:
    """The whole application, guards outermost."""
    routes = [
        Route("/health", _plain(service, _health), methods=["GET"]),
        Route("/openapi.json", _plain(service, _openapi), methods=["GET"]),
        Route("/v1/models", _plain(service, _models), methods=["GET"]),
        Route("/v1/models/{model:path}", _plain(service, _model), methods=["GET"]),
        Route("/v1/chat/completions", Answers(service, chat_ask), methods=["POST"]),
        Route("/v1/completions", Answers(service, completion_ask), methods=["POST"]),
    ]
    middleware = []
    if service.guard.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(service.guard.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-api-key"],
            )
        )
    handlers = {HTTPException: _http_error, Refusal: _refused, Exception: _broken}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, service)


class Gate:
    """Checks who asks, numbers and logs each request, and turns whatever goes wrong into an error body."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, id = time.monotonic(), uuid4().hex[:12]
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_own_headers(id)]}
            await send(message)

        outcome = scope["mlx_mtp.outcome"] = Outcome()
        try:
            self._check(scope)
            await self._app(scope, receive, watched)
        except Refusal as refusal:
            await _respond(refusal, scope, receive, watched, status)
        except Exception:
            LOG.exception("request %s failed", id)  # was answered, if it could be, by _broken
        finally:
            left = " left early" if outcome.has_left else ""
            tokens = f" {outcome.tokens} tokens" if outcome.tokens else ""
            seconds = time.monotonic() - began
            path = ascii(scope["path"][:100])[1:-1]
            ACCESS.info(
                "%s %s %s %s %.3fs%s%s", id, scope["method"][:20], path, status or "-", seconds, tokens, left
            )

    def _check(self, scope: Scope) -> None:
        guard, headers = self._service.guard, Headers(scope=scope)
        guard.check_place(headers)
        is_preflight = scope["method"] == "OPTIONS" and headers.get("origin") in guard.origins
        if not is_preflight:  # in which browsers send no key
            guard.check_key(scope["path"], headers)


async def _respond(refusal: Refusal, scope: Scope, receive: Receive, send: Send, status: int) -> None:
    """The refusal, unless an answer has begun already: then the connection is closed by returning."""
    if not status:
        await _refusal_response(refusal)(scope, receive, send)


def _own_headers(id: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-request-id", id.encode()), (b"x-content-type-options", b"nosniff")]


def _refusal_response(refusal: Refusal) -> Response:
    return Response(
        as_bytes(refusal.body), refusal.status, headers=refusal.headers, media_type="application/json"
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    words = {
        404: "there is nothing at this address; see /openapi.json",
        405: "this address takes another method",
    }
    refusal = Refusal(error.status_code, words.get(error.status_code, error.detail), code="not_found")
    if error.status_code == 405:
        refusal = Refusal(405, words[405], code="method_not_allowed", headers=dict(error.headers or {}))
    return _refusal_response(refusal)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refusal_response(error)


async def _broken(request: Request, error: Exception) -> Response:
    words = "something went wrong in the server; its log has more under this request's id"
    return _refusal_response(Refusal(500, words, SERVER, code="internal"))


Answerer = Callable[[Service, Request], dict[str, Any]]


def _plain(service: Service, make: Answerer) -> Callable[[Request], Awaitable[Response]]:
    """An address that answers at once."""

    async def endpoint(request: Request) -> Response:
        return Response(as_bytes(make(service, request)), media_type="application/json")

    return endpoint


def _health(service: Service, request: Request) -> dict[str, Any]:
    service.check_ready()
    status = service.engine.status
    return {"status": "ok", "running": status.running, "waiting": status.waiting}


def _openapi(service: Service, request: Request) -> dict[str, Any]:
    return openapi(service.model)


def _models(service: Service, request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_card(service)]}


def _model(service: Service, request: Request) -> dict[str, Any]:
    if request.path_params["model"] != service.model:
        raise Refusal(404, f"only {service.model!r} is served here", param="model", code="model_not_found")
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": service.model,
        "object": "model",
        "created": service.started,
        "owned_by": "mlx-mtp",
    }
    if service.engine.status.status == "ready":
        card["context_length"] = card["max_model_len"] = service.served.pair.max_context
    return card


Checker = Callable[[dict[str, Any], Served], Ask]


class Answers:
    """An address that is answered by the model."""

    def __init__(self, service: Service, check: Checker):
        self._service, self._check = service, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome: Outcome = scope["mlx_mtp.outcome"]
        service = self._service
        try:
            service.check_ready()
            ask = self._check(await json_object(Request(scope, receive)), service.served)
            await answer(service.engine, service.live, ask, service.model, receive, send, outcome)
        except Gone:
            outcome.has_left = True
        except mlx_mtp.MtpError as error:
            raise refusal_of(error) from None
