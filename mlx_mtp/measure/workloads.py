"""The prompts that are measured: nine kinds, eight each, written for this project and versioned."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_mtp.errors import ParameterError
from mlx_mtp.measure.harbour_log import harbour_log

if TYPE_CHECKING:
    from mlx_mtp.pair import Pair

PROMPT_SET = 1  # to be raised with every change of a prompt: figures of different sets are not compared
PROMPTS_EACH = 8
AS_WRITTEN = 0  # a context: the prompts without a text before them
TOLERANCE = 0.01  # of a context, by which a prompt may be shorter
SUMMARY_WORDS = 160  # of the text to be summarised, where no context asks for more
NOTES = "Here is the log of a harbour, for reference. It may or may not matter.\n\n"


class Chat(NamedTuple):
    """One prompt before a template is applied."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


Maker = Callable[[dict[str, Any], int], Chat]


def _asked(text: str) -> Chat:
    return Chat([{"role": "user", "content": text}])


def _listed(data: dict[str, Any], i: int) -> Chat:
    return _asked(data["prompts"][i])


def _filled_in(data: dict[str, Any], i: int) -> Chat:
    language = data.get("languages", [""] * PROMPTS_EACH)[i]
    return _asked(data["ask"].format(language=language, text=data["texts"][i]))


def _with_tools(data: dict[str, Any], i: int) -> Chat:
    return Chat(_asked(data["prompts"][i]).messages, data["tools"])


def _loop(data: dict[str, Any], i: int) -> Chat:
    """A task, the calls made so far and what they gave; the model is to go on."""
    loop = data["loops"][i]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": data["system"]},
        {"role": "user", "content": loop["task"]},
    ]
    for name, arguments, result in loop["steps"]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": name, "content": result},
        ]
    return Chat(messages, data["tools"])


MAKERS: dict[str, Maker] = {
    "code": _listed,
    "prose": _listed,
    "chat": _listed,
    "json": _listed,
    "tool_call": _with_tools,
    "translation": _filled_in,
    "summary": _listed,
    "repetition": _filled_in,
    "agent_loop": _loop,
}
WORKLOADS = tuple(MAKERS)


@cache
def _data(workload: str) -> dict[str, Any]:
    path = files("mlx_mtp.measure") / f"prompts/{workload}.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def prompt_set_hash() -> str:
    """Hash of every prompt file: what `PROMPT_SET` stands for."""
    digest = hashlib.sha256()
    for name in (*WORKLOADS, "harbour_log"):
        digest.update(json.dumps(_data(name), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def check_workload(name: str) -> str:
    """`name` if there is such a workload; ParameterError otherwise."""
    if name not in MAKERS:
        raise ParameterError(f"a workload is one of {', '.join(WORKLOADS)}, got {name!r}; choose among these")
    return name


def workload_prompts(pair: "Pair", workload: str, count: int, context: int) -> list[list[int]]:
    """Token ids of the first `count` prompts, each with so much of the harbour log before it that it fills `context`.

    context in tokens, at most 1 % less (AS_WRITTEN: no log); a prompt that is longer by itself stays as it is.
    """
    chats = [MAKERS[check_workload(workload)](_data(workload), i) for i in range(count)]
    return [_fitted(pair, chat, workload, context) for chat in chats]


def _fitted(pair: "Pair", chat: Chat, workload: str, context: int) -> list[int]:
    words = SUMMARY_WORDS if workload == "summary" else 0
    ids = _ids(pair, _after_log(chat, words, workload))
    if context == AS_WRITTEN or len(ids) >= context:
        return ids
    low, high = words, words + context  # no word is less than a token
    low_ids = ids
    per_word = 1.5
    while len(low_ids) < (1 - TOLERANCE) * context and high - low > 1:
        guess = low + int((context - len(low_ids)) / per_word)
        middle = min(max(guess, low + 1), high - 1)
        ids = _ids(pair, _after_log(chat, middle, workload))
        per_word = max((len(ids) - len(low_ids)) / (middle - low), 1.0)
        if len(ids) <= context:
            low, low_ids = middle, ids
        else:
            high = middle
    return low_ids


def _after_log(chat: Chat, words: int, workload: str) -> Chat:
    """The chat with so many words of the log put before its first question."""
    if not words:
        return chat
    place = next(i for i, message in enumerate(chat.messages) if message["role"] == "user")
    asked = chat.messages[place]["content"]
    before = "" if workload == "summary" else NOTES
    content = f"{before}{harbour_log(words)}\n\n{asked}"
    return chat._replace(
        messages=[*chat.messages[:place], {"role": "user", "content": content}, *chat.messages[place + 1 :]]
    )


def _ids(pair: "Pair", chat: Chat) -> list[int]:
    """Through the model's own template where it has one, with the functions where that knows of them."""
    from mlx_mtp.prompt import prompt_ids

    template = pair.prompt_format.template
    if template is None:
        return prompt_ids(pair.prompt_format, "\n\n".join(m["content"] for m in _flat(chat))).ids
    if chat.tools and "tools" not in template:
        return prompt_ids(pair.prompt_format, _flat(chat)).ids
    return prompt_ids(pair.prompt_format, chat.messages, tools=chat.tools).ids


def _flat(chat: Chat) -> list[dict[str, str]]:
    """The same for a template without functions: they, their calls and results become text."""
    flat: list[dict[str, str]] = []
    for message in chat.messages:
        if message["role"] == "tool":
            flat.append({"role": "user", "content": f"Result: {message['content']}"})
        elif message.get("tool_calls"):
            called = json.dumps(message["tool_calls"][0]["function"])
            flat.append({"role": "assistant", "content": f"Call: {called}"})
        else:
            flat.append({"role": message["role"], "content": message["content"]})
    if chat.tools:
        asked = next(message for message in flat if message["role"] == "user")
        asked["content"] = f"You may call these functions: {json.dumps(chat.tools)}\n\n{asked['content']}"
    return flat
