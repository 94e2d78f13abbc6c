"""`tool_choice`: whether the model may, must or must not call, and what a reply that must is made to begin with.

A forced call is begun for the model, in Gemma 4's notation: as far as the function's name and its brace where there is
one function to call, else as far as the name. What the model then writes is its own, and may still be no call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mtp.server.fields import Fields
from mlx_mtp.server.refusals import SERVER, Refusal, bad, unsupported
from mlx_mtp.server.tool_calls import OPEN
from mlx_mtp.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class MustCall:
    """A reply that has to be a call of one of `names`; `is_one`: of this function, once."""

    names: frozenset[str]
    begin_with: tuple[int, ...]
    is_one: bool


def is_without_tools(fields: Fields) -> bool:
    """Whether tools are to be left out of the prompt, because none may be called."""
    return fields.value("tool_choice") == "none"


def must_call(fields: Fields, tools: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> MustCall | None:
    """What `tool_choice` asks of the reply, None where the model decides. Raises Refusal."""
    choice = fields.value("tool_choice")
    if choice in (None, "auto", "none"):
        return None
    names = {tool["function"]["name"] for tool in tools}
    if choice == "required":
        wanted = names
    elif isinstance(choice, dict):
        wanted = {_named(choice)}
    else:
        raise bad("tool_choice", 'tool_choice must be "auto", "none", "required" or a function; choose one')
    if not tools:
        raise bad(
            "tool_choice", "tool_choice forces a call, but no tools are given; add tools, or leave it out"
        )
    if not wanted <= names:
        raise bad("tool_choice", f"{min(wanted)!r} is not among tools; name one of them")
    mark = tokenizer.token_id(OPEN)
    if mark is None:
        raise unsupported("tool_choice", "this model has no token that begins a call; leave tool_choice out")
    head = f"call:{min(wanted)}{{" if len(wanted) == 1 else "call:"
    return MustCall(frozenset(wanted), (mark, *tokenizer.encode(head)), isinstance(choice, dict))


def check_name(must: MustCall | None, name: str) -> None:
    """Raise Refusal where a forced reply calls something else."""
    if must is not None and name not in must.names:
        raise _none_came(f"the model called {name[:100]!r}, which tool_choice does not allow")


def check_call(must: MustCall | None, complete_calls: int, reason: str) -> None:
    """Raise Refusal where a forced reply ended by itself without a complete call."""
    if must is not None and not complete_calls and reason not in ("length", "cancelled"):
        raise _none_came("the model did not complete the call that tool_choice asks for")


def _named(choice: dict[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise bad(
            "tool_choice",
            "as an object tool_choice is {'type': 'function', 'function': {'name': ...}}; name a function",
        )
    return name


def _none_came(words: str) -> Refusal:
    return Refusal(500, f"{words}; ask again, or in other words", SERVER, code="no_tool_call")
