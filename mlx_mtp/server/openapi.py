"""The server's interface in OpenAPI 3.1, as GET /openapi.json gives it: what is accepted, and nothing else."""

from typing import Any

import mlx_mtp
from mlx_mtp.log_probs import MOST_ALTERNATIVES
from mlx_mtp.server.asks import MAX_ANSWERS
from mlx_mtp.server.chat_messages import MAX_MESSAGES, MAX_TOOLS
from mlx_mtp.server.settings import LEAST_REPETITION, MAX_STOPS

Schema = dict[str, Any]


def openapi(model: str) -> Schema:
    """The document for a server that has one model."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-mtp",
            "version": mlx_mtp.__version__,
            "description": "Gemma 4 with multi-token prediction, in the form of OpenAI's interface.",
        },
        "paths": {
            "/health": {"get": _get("Whether requests are answered", {"type": "object"}, 503, is_open=True)},
            "/openapi.json": {"get": _get("This document", {"type": "object"})},
            "/v1/models": {"get": _get("The model that is served", {"$ref": "#/components/schemas/Models"})},
            "/v1/models/{model}": {
                "parameters": [
                    {
                        "name": "model",
                        "in": "path",
                        "required": True,
                        "schema": {"type": "string", "enum": [model]},
                    }
                ],
                "get": _get("The model by name", {"$ref": "#/components/schemas/Model"}, 404),
            },
            "/v1/chat/completions": {"post": _post("A reply to a chat", _chat(model), "ChatCompletion")},
            "/v1/completions": {"post": _post("A text's continuation", _completion(model), "Completion")},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
        },
        "security": [{"key": []}, {}],
    }


def _responses(*statuses: int) -> Schema:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": "Refused", "content": error} for status in statuses}


def _get(summary: str, schema: Schema, *statuses: int, is_open: bool = False) -> Schema:
    ok = {"description": "OK", "content": {"application/json": {"schema": schema}}}
    refusals = (403, 405, 431, *statuses) if is_open else (401, 403, 405, 431, *statuses)
    return {"summary": summary, "responses": {"200": ok, **_responses(*refusals)}}


def _post(summary: str, schema: Schema, reply: str) -> Schema:
    content = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{reply}"}},
        "text/event-stream": {},
    }
    refusals = _responses(400, 401, 403, 404, 405, 408, 411, 413, 415, 429, 431, 500, 503)
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "OK", "content": content}, **refusals},
    }


def _object(properties: Schema, *required: str, **rest: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **rest}


def _or_null(kind: str, **rest: Any) -> Schema:
    return {"type": [kind, "null"], **rest}


def _common(model: str) -> Schema:
    """Fields of both kinds of request."""
    stop = {"type": "string", "minLength": 1, "maxLength": 1000}
    return {
        "model": {"type": ["string", "null"], "enum": [model, None]},
        "stream": _or_null("boolean"),
        "n": _or_null("integer", minimum=1, maximum=MAX_ANSWERS),
        "max_tokens": _or_null("integer", minimum=1, maximum=2**63),
        "temperature": _or_null("number", minimum=0, maximum=100),
        "top_p": _or_null("number", exclusiveMinimum=0, maximum=1),
        "top_k": _or_null("integer", minimum=0, maximum=2**63),
        "min_p": _or_null("number", minimum=0, maximum=1),
        "repetition_penalty": _or_null("number", minimum=LEAST_REPETITION, maximum=100),
        "presence_penalty": _or_null("number", minimum=-100, maximum=100),
        "frequency_penalty": _or_null("number", minimum=-100, maximum=100),
        "seed": _or_null("integer", minimum=-(2**63), maximum=2**63),
        "stop": {"anyOf": [{"type": "null"}, stop, {"type": "array", "items": stop, "maxItems": MAX_STOPS}]},
        "logit_bias": _or_null(
            "object",
            propertyNames={"pattern": "^[0-9]{1,9}$"},
            additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        ),
        "mtp": {
            "description": "How many drafts a round has; what comes out does not depend on it.",
            "anyOf": [
                {"type": ["string", "null"], "enum": ["auto", "off", None]},
                {"type": "integer", "minimum": 0, "maximum": 15},
            ],
        },
    }


def _stream_rule() -> Schema:
    """stream_options only with stream."""
    return {
        "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
        "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
    }


def _stream_options() -> Schema:
    return {"stream_options": _or_null("object", properties={"include_usage": _or_null("boolean")})}


def _chat(model: str) -> Schema:
    fields = _common(model) | _stream_options()
    fields |= {
        "messages": {
            "type": "array",
            "items": {"$ref": "#/components/schemas/Message"},
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
        },
        "max_completion_tokens": _or_null("integer", minimum=1, maximum=2**63),
        "tools": {
            "type": ["array", "null"],
            "items": {"$ref": "#/components/schemas/Tool"},
            "maxItems": MAX_TOOLS,
        },
        "tool_choice": {
            "description": "A call can be forced only where tools are given, and of a function among them.",
            "anyOf": [
                {"type": ["string", "null"], "enum": ["auto", "none", "required", None]},
                {"$ref": "#/components/schemas/NamedFunction"},
            ],
        },
        "parallel_tool_calls": _or_null("boolean"),
        "thinking": _or_null("boolean"),
        "logprobs": {
            "type": ["boolean", "null"],
            "description": "Of the model's own distribution, before penalties, bias, temperature and filters.",
        },
        "top_logprobs": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": MOST_ALTERNATIVES,
            "description": "Only with logprobs.",
        },
        "response_format": _or_null("object", properties={"type": {"const": "text"}}, required=["type"]),
    }
    return _object(fields, "messages", **_stream_rule())


def _completion(model: str) -> Schema:
    text = {"type": "string", "minLength": 1}
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    many = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": MAX_ANSWERS}
    fields = _common(model) | _stream_options()
    fields |= {
        "prompt": {"anyOf": [text, ids, many]},
        "logprobs": _or_null("integer", minimum=0, maximum=MOST_ALTERNATIVES),
    }
    return _object(fields, "prompt", **_stream_rule())


def _schemas() -> Schema:
    count = {"type": "integer", "minimum": 0}
    usage = _object(
        {
            "prompt_tokens": count,
            "completion_tokens": count,
            "total_tokens": count,
            "prompt_tokens_details": _object({"cached_tokens": count}, "cached_tokens"),
            "mtp": _object({"drafted": count, "accepted": count, "parked": {"type": "boolean"}}, "drafted"),
        },
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
    )
    error = _object({"message": {"type": "string"}, "type": {"type": "string"}}, "message", "type")
    reply = {"id": {"type": "string"}, "created": count, "model": {"type": "string"}, "usage": usage}
    choice = _object({"index": count, "finish_reason": {"type": "string"}}, "index", "finish_reason")
    reply["choices"] = {"type": "array", "items": choice}
    model = _object({"id": {"type": "string"}, "object": {"const": "model"}}, "id", "object")
    return {
        "Error": _object({"error": error}, "error"),
        "ChatCompletion": _object(reply, "id", "choices", "usage"),
        "Completion": _object(reply, "id", "choices", "usage"),
        "Model": model,
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}}, "data"),
        "Message": _message(),
        "Tool": _tool(),
        "NamedFunction": _named_function(),
    }


def _message() -> Schema:
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text")
    function = _object({"name": {"type": "string"}, "arguments": {"type": "string"}}, "name", "arguments")
    return _object(
        {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}, {"type": "null"}]},
            "name": _or_null("string"),
            "tool_call_id": _or_null("string"),
            "tool_calls": _or_null("array", items=_object({"function": function}, "function")),
        },
        "role",
    )


def _tool() -> Schema:
    function = _object(
        {
            "name": {"type": "string", "pattern": "^[A-Za-z0-9_.:/-]{1,128}$"},
            "description": _or_null("string"),
            "parameters": _or_null("object"),
        },
        "name",
    )
    return _object({"type": {"const": "function"}, "function": function}, "function")


def _named_function() -> Schema:
    return _object(
        {"type": {"const": "function"}, "function": _object({"name": {"type": "string"}}, "name")},
        "type",
        "function",
    )
