"""Which of Google's chat templates a checkpoint carries, and whether it takes a tool's answers as clients send them.

The first release knows no role "tool": such a message would open a turn of its own, which the model never saw. Answers
can be put into the assistant's message instead, as `tool_responses`; every later template takes these, too.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from mlx_mtp.errors import PromptError
from mlx_mtp.prompt import PromptFormat, render_chat

RESPONSE = "<|tool_response>"
# Of the text without blanks at its ends. Copies of both are shipped with llama.cpp (models/templates).
KNOWN = {
    "58c66fdee4afa29786fa0925a4c3659c8ebc28a2db93da6ae479d7d5886ce48f": "Gemma 4, first release",
    "1d35a24a2a63cc600c0cab43628a6df4cd3318e959b03307cf5f9f7e29ecf783": "Gemma 4, revised for tools",
}
OLD = frozenset({"Gemma 4, first release"})
_PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}],
    },
]


@dataclass(frozen=True, slots=True)
class Template:
    """A checkpoint's template: a name if it is a known one, whether tool messages can be rendered as they are."""

    digest: str | None
    name: str | None
    takes_tool_role: bool
    takes_tools: bool

    @property
    def warning(self) -> str | None:
        """What whoever starts the server should know."""
        if self.digest is None:
            return "this checkpoint has no chat template; only text completions are served"
        if self.name in OLD:
            return (
                "this checkpoint's chat template is the first release, which Google revised for tools: their answers "
                "are put into its older form, and after one it opens an empty thought; download the model again"
            )
        if not self.takes_tools:
            return "this checkpoint's chat template takes no tools; requests with tools are refused"
        return None


def template_of(format: PromptFormat) -> Template:
    """Look at a checkpoint's template by its hash, and by what it makes of a tool's answer."""
    if format.template is None:
        return Template(None, None, False, False)
    digest = hashlib.sha256(format.template.strip().encode()).hexdigest()
    role = _renders_answer(format, [*_PROBE, {"role": "tool", "tool_call_id": "1", "content": "b"}])
    older = _renders_answer(
        format, [_PROBE[0], _PROBE[1] | {"tool_responses": [{"name": "f", "response": "b"}]}]
    )
    return Template(digest, KNOWN.get(digest), role, (role or older) and "tools" in format.template)


def _renders_answer(format: PromptFormat, messages: list[dict[str, Any]]) -> bool:
    """Whether the tool's answer "b" comes out right behind the mark of a tool's answer."""
    try:
        ids = render_chat(format, messages).ids
    except PromptError:
        return False
    mark = format.tokenizer.token_id(RESPONSE)
    return mark in ids and "b" in format.tokenizer.decode(ids[ids.index(mark) :])


def with_tool_responses(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of tools moved into the assistant's message before them, for templates that know no role "tool"."""
    changed: list[dict[str, Any]] = []
    for message in messages:
        last = changed[-1] if changed else {}
        if message.get("role") == "tool" and last.get("role") == "assistant" and last.get("tool_calls"):
            response = {"name": message.get("name") or "unknown", "response": message.get("content")}
            changed[-1] = last | {"tool_responses": [*last.get("tool_responses", ()), response]}
        else:
            changed.append(message)
    return changed
