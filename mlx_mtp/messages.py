"""Chat messages and tool schemas: checked and copied into plain data before a template sees them."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mlx_mtp.errors import PromptError
from mlx_mtp.tokenizer import MAX_TEXT_CHARS, check_text

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"model": "assistant", "developer": "system"}
MAX_DEPTH = 32


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """-> a plain copy of `messages`; raises PromptError naming the message and field that cannot be used."""
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError(
            "a chat needs at least one message, got none; add {'role': 'user', 'content': '...'}"
        )
    checked = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    check_total(checked)
    return checked


def check_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """-> a plain copy of the tools' JSON schemas, or None where there are none."""
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError("tools must be a list of JSON-schema dicts; give [{'type': 'function', ...}]")
    checked: list[dict[str, Any]] = [plain(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    check_total(checked)
    return checked


def check_total(value: Any) -> None:
    """Raise PromptError where all texts in `value` together are too long to be a prompt."""
    total = sum(map(len, texts_of(value)))
    if total > MAX_TEXT_CHARS:
        raise PromptError(
            f"a prompt has at most {MAX_TEXT_CHARS:,} characters, got {total:,}; shorten the messages"
        )


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """-> a copy of `value` made of dict, list, str, int, float, bool and None only."""
    if depth > MAX_DEPTH:
        raise PromptError(f"{where} is nested deeper than {MAX_DEPTH} levels; flatten it")
    if isinstance(value, str):
        check_text(value)
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {plain(key, where): plain(item, where, depth + 1) for key, item in value.items()}
    raise PromptError(
        f"{where} must be JSON data, got a {type(value).__name__}; convert it to text, lists and dicts"
    )


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """-> plain data with `change` applied to every text in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): mapped(item, change) for key, item in value.items()}
    return value


def texts_of(value: Any) -> Iterator[str]:
    """-> every text in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(
            f"{where} must be a dict with role and content, got {type(message).__name__}; wrap the text"
        )
    role = message.get("role")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise PromptError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.40}; change the role"
        )
    checked: dict[str, Any] = plain({k: v for k, v in message.items() if k not in ("role", "content")}, where)
    checked["role"] = role
    calls = checked.get("tool_calls")
    if calls:
        checked["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    content = message.get("content")
    if content is None and role == "assistant" and (calls or checked.get("tool_responses")):
        content = ""
    checked["content"] = _check_content(content, role, f"{where}.content")
    return checked


def _check_content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, Mapping) and role == "tool":
        return plain(content, where)
    if role == "user" and (content == "" or content == []):
        raise PromptError(f"{where} is empty; write something")
    if isinstance(content, list | tuple):
        return [_check_item(item, f"{where}[{index}]", role) for index, item in enumerate(content)]
    if not isinstance(content, str):
        raise PromptError(
            f"{where} must be text or a list of {{'type': 'text', ...}}, got {type(content).__name__}; "
            "give it as text"
        )
    check_text(content)
    return without_thoughts(content) if role == "assistant" else str(content)


def _check_item(item: Any, where: str, role: str) -> dict[str, str]:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PromptError(
            f"{where}: this program reads text only, got an item of type {kind[:40]!r}; "
            "leave out images, audio and video, or describe them in words"
        )
    if kind is None or not isinstance(item.get("text"), str):
        raise PromptError(f"{where} must be {{'type': 'text', 'text': '...'}}; give the text as a string")
    text = item["text"]
    check_text(text)
    return {"type": "text", "text": without_thoughts(text) if role == "assistant" else str(text)}


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """-> tool calls with their arguments as data; the text form that OpenAI's interface uses is parsed."""
    if not isinstance(calls, list):
        raise PromptError(f"{where} must be a list, got {type(calls).__name__}; give a list")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PromptError(
                f"{where}[{index}] must hold a function with a name; give {{'function': {{'name': ...}}}}"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{where}[{index}].function.arguments")
        if not isinstance(arguments, dict):
            raise PromptError(f"{where}[{index}].function.arguments must be a dict; give names and values")
        function["arguments"] = plain(arguments, where)
    return calls


def _parsed(arguments: str, where: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}; give a dict") from None


def without_thoughts(text: str) -> str:
    """-> an assistant's earlier text without <|channel> ... <channel|>, cut as Gemma's template cuts it."""
    return "".join(part.split("<|channel>")[0] for part in text.split("<channel|>"))
