"""OpenAI's chat messages and tools -> messages as chat templates take them."""

import re
from typing import Any

from mlx_mtp.server.fields import Fields
from mlx_mtp.server.refusals import bad, unsupported
from mlx_mtp.server.templates import with_tool_responses

MAX_MESSAGES = 4096
MAX_TOOLS = 128
KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)


def messages_of(fields: Fields, *, takes_tool_role: bool) -> list[dict[str, Any]]:
    """`messages`, without what templates know nothing of. Raises Refusal; what is left is checked by the library."""
    given = fields.items("messages", MAX_MESSAGES)
    if not given:
        raise bad("messages", "messages must hold at least one message; add one", "missing")
    names: dict[str, str] = {}
    messages = [_message(message, f"messages[{at}]", names) for at, message in enumerate(given)]
    return messages if takes_tool_role else with_tool_responses(messages)


def _message(given: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    """One message; `names` are the functions of the calls so far, by id."""
    if not isinstance(given, dict):
        raise bad(where, f"{where} must be an object with role and content", "invalid_type")
    message = {name: given[name] for name in KEPT if given.get(name) is not None}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        _check_parts(content, f"{where}.content")
        if role in ("system", "developer"):
            # Google's templates print a list of parts here as Python would.
            message["content"] = "\n".join(part["text"] for part in content)
    if role == "assistant":
        message.setdefault("content", "")
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(call.get("id"), str):
                names[call["id"]] = str(function.get("name"))
    elif role == "tool":
        message.setdefault("content", "")
        call = message.get("tool_call_id")
        if "name" not in message and isinstance(call, str) and call in names:
            message["name"] = names[call]
    return message


def _check_parts(content: list[Any], where: str) -> None:
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image_url", "input_audio", "file", "image", "audio", "video"):
            raise unsupported(
                f"{where}[{at}]",
                f"{where}[{at}]: this model reads text only here, got {kind}; describe it in words",
            )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad(
                f"{where}[{at}]", f"{where}[{at}] must be {{'type': 'text', 'text': ...}}", "invalid_type"
            )


def tools_of(fields: Fields) -> list[dict[str, Any]] | None:
    """`tools`, None where there are none. Raises Refusal for what is no tool."""
    given = fields.items("tools", MAX_TOOLS)
    for at, tool in enumerate(given or ()):
        _check_tool(tool, f"tools[{at}]")
    return given or None


def _check_tool(tool: Any, where: str) -> None:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type", "function") != "function":
        raise bad(where, f"{where} must be {{'type': 'function', 'function': ...}}", "invalid_type")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad(
            f"{where}.function.name", f"{where}.function.name must be 1 to 128 letters, digits, . : / _ or -"
        )
    for key, kind in (("description", str), ("parameters", dict)):
        if function.get(key) is not None and not isinstance(function[key], kind):
            raise bad(
                f"{where}.function.{key}", f"{where}.function.{key} is of the wrong type", "invalid_type"
            )
