"""Prompts -> token ids: text as it is, or chat messages through the checkpoint's template.

No text of a message can become a control token. While the template runs, the characters that control tokens
begin and end with ("<" and ">" for Gemma) are replaced in all message text by stand-ins: symbols that occur
nowhere else, and that a template trims, splits, measures and prints as it would the originals. So a control
token in the rendered text comes from the template alone. The text between two of them is put back and encoded
as ordinary text, message and template text together: the same ids as for the whole, because a tokenizer
splits at control tokens.
"""

import json
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_mtp import chat_template
from mlx_mtp.errors import CheckpointError, PromptError
from mlx_mtp.messages import check_messages, check_tools, mapped, texts_of
from mlx_mtp.model_files import own_file, read_json, read_text
from mlx_mtp.tokenizer import Tokenizer, read_tokenizer

TURN = "<|turn>"
STOP_TOKENS = ("<turn|>", "<|tool_response>")  # end of a turn; the place of a tool's answer
_MODEL_TURN = "model\n"
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

# Rare symbols without case, joining or decomposition, which repr() prints as they are; then private use.
_STAND_IN_CODES = (
    range(0x1D300, 0x1D357),
    range(0x1D000, 0x1D0F6),
    range(0x4DC0, 0x4E00),
    range(0xF0000, 0xFFFFE),
)


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How one checkpoint wants to be prompted; `named_tokens` (bos_token, ...) are for its template."""

    tokenizer: Tokenizer
    template: str | None = field(repr=False)
    eos_ids: tuple[int, ...]
    bos_id: int | None
    named_tokens: Mapping[str, str]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """`ids` [n], and at which of them a model's turn opens, the last of these being the one to generate."""

    ids: list[int]
    boundaries: tuple[int, ...]


def load_prompt_format(
    folder: Path, *, eos_ids: tuple[int, ...], vocab_size: int | None = None
) -> PromptFormat:
    """-> the prompt format of the checkpoint in `folder`, given its configs' EOS ids and vocabulary size.

    Raises CheckpointError where the tokenizer is missing, damaged or larger than the model's vocabulary. A
    missing chat template is no error before a chat is asked for.
    """
    tokenizer = read_tokenizer(folder)
    config = _read_object(folder, "tokenizer_config.json")
    size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, the model {size}; "
            "use the tokenizer published with the model"
        )
    if any(not 0 <= index < size for index in eos_ids):
        raise CheckpointError(
            f"eos_token_id {list(eos_ids)} is outside the {size} tokens; download the model again"
        )
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    named |= {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name)))}
    named = {name: text for name, text in named.items() if tokenizer.token_id(text) is not None}
    ends = [tokenizer.token_id(text) for text in (named.get("eos_token", ""), *STOP_TOKENS)]
    return PromptFormat(
        tokenizer=tokenizer,
        template=_read_template(folder, config),
        eos_ids=tuple(dict.fromkeys([*eos_ids, *(index for index in ends if index is not None)])),
        bos_id=tokenizer.token_id(named.get("bos_token", "")),
        named_tokens=named,
        vocab_size=size,
    )


def prompt_ids(
    format: PromptFormat,
    prompt: str | list[int] | list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
) -> RenderedPrompt:
    """-> the ids of a prompt: text (after BOS, control tokens in it inert), token ids as they are, or a chat.

    Raises PromptError where it is empty, not text, outside the vocabulary, or not what the template takes.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        return render_chat(format, prompt, tools=tools, thinking=thinking)
    if tools or thinking is not None:
        raise PromptError(
            "tools and thinking belong to a chat; give the prompt as a list of messages, or leave them out"
        )
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; write something")
        start = [] if format.bos_id is None else [format.bos_id]
        return RenderedPrompt(_made(format, start + format.tokenizer.encode(prompt)), ())
    if not isinstance(prompt, list | tuple):
        raise PromptError(
            "a prompt is text, a list of token ids or a list of messages, "
            f"got {type(prompt).__name__}; give one of these"
        )
    ids = check_ids(prompt, format.vocab_size)
    return RenderedPrompt(ids, model_turns(format.tokenizer, ids))


def render_chat(
    format: PromptFormat,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> RenderedPrompt:
    """-> the ids of a chat in the checkpoint's template; `thinking` None leaves that to the template.

    Thoughts in earlier assistant messages are left out. Raises PromptError for messages that cannot be used,
    a missing, broken or runaway template, and for thinking or tools that the template knows nothing of.
    """
    plain_messages, plain_tools = check_messages(messages), check_tools(tools)
    template = _template_for(format, tools=plain_tools is not None, thinking=thinking)
    texts = list(chain(texts_of(plain_messages), texts_of(plain_tools)))
    stand_ins = _stand_ins(format.tokenizer.controls, [*texts, template])
    hide = str.maketrans(stand_ins)
    variables = {
        **format.named_tokens,
        "messages": mapped(plain_messages, lambda text: text.translate(hide)),
        "tools": mapped(plain_tools, lambda text: text.translate(hide)),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    if thinking is not None:
        variables["enable_thinking"] = thinking
    rendered = chat_template.render(template, variables, input_chars=sum(len(text) + 8 for text in texts))
    ids = _made(format, _encode_rendered(format.tokenizer, rendered, stand_ins))
    return RenderedPrompt(ids, model_turns(format.tokenizer, ids))


def model_turns(tokenizer: Tokenizer, ids: list[int]) -> tuple[int, ...]:
    """-> the indices in `ids` of the <|turn> tokens that open a model's turn."""
    turn = tokenizer.token_id(TURN)
    longest = 1 + len(_MODEL_TURN)
    return tuple(
        at
        for at, index in enumerate(ids)
        if index == turn and tokenizer.decode(ids[at + 1 : at + longest]).startswith(_MODEL_TURN)
    )


def _template_for(format: PromptFormat, *, tools: bool, thinking: bool | None) -> str:
    template = format.template
    if template is None:
        raise PromptError(
            "this checkpoint has no chat template; give the prompt as text, or use an instruction-tuned model"
        )
    if thinking and "enable_thinking" not in template:
        raise PromptError("this checkpoint's chat template cannot turn thinking on; leave thinking out")
    if tools and "tools" not in template:
        raise PromptError("this checkpoint's chat template takes no tools; leave tools out")
    return template


def _stand_ins(controls: Iterable[str], texts: list[str]) -> dict[str, str]:
    """-> for each character that a control token begins or ends with, one that `texts` do not contain."""
    edges = sorted({edge for text in controls for edge in (text[0], text[-1])} - set('"\\ \t\n'))
    free = (
        char
        for char in map(chr, chain.from_iterable(_STAND_IN_CODES))
        if not any(char in text or _json_escape(char) in text for text in texts)
    )
    found = dict(zip(edges, free, strict=False))
    if len(found) < len(edges):
        raise PromptError(
            "the messages use every rare symbol that could mark their text; remove some symbols"
        )
    return found


def _json_escape(char: str) -> str:
    return json.dumps(char)[1:-1]


def _encode_rendered(tokenizer: Tokenizer, rendered: str, stand_ins: Mapping[str, str]) -> list[int]:
    """-> ids of a rendered template: its control tokens as such, everything between them as ordinary text."""
    shown = {form: edge for edge, char in stand_ins.items() for form in (char, _json_escape(char))}
    hidden = _any_of(shown)
    ids: list[int] = []
    at = 0
    for match in _any_of(tokenizer.controls).finditer(rendered):
        control = tokenizer.controls[match[0]]
        text = rendered[at : match.start()]
        ids += tokenizer.encode(hidden.sub(lambda m: shown[m[0]], text.rstrip() if control.lstrip else text))
        index = tokenizer.token_id(control.content)
        assert index is not None, "controls come from the tokenizer"
        ids.append(index)
        at = match.end()
        if control.rstrip:
            at = len(rendered) - len(rendered[at:].lstrip())
    return ids + tokenizer.encode(hidden.sub(lambda m: shown[m[0]], rendered[at:]))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """-> a pattern of all `texts`, the longest first; it matches nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _made(format: PromptFormat, ids: list[int]) -> list[int]:
    """-> ids that the tokenizer made. Raises PromptError for none, CheckpointError for one that has no embedding.

    MLX reads beyond the table of embeddings without a word; how many tokens there are does not tell how they are
    numbered.
    """
    if not ids:
        raise PromptError(
            "the tokenizer, or the chat template, makes an empty prompt of this; write something"
        )
    if max(ids) >= format.vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {max(ids)}, the model those below {format.vocab_size}; "
            "use the tokenizer published with the model"
        )
    return ids


def check_ids(ids: Iterable[Any], vocab_size: int) -> list[int]:
    """-> the ids as plain integers. Raises PromptError for none at all, and for any outside the vocabulary."""
    checked = []
    for at, index in enumerate(ids):
        try:
            value = -1 if isinstance(index, bool) else operator.index(index)
        except TypeError:
            raise PromptError(
                f"token {at} must be an integer, got {type(index).__name__}; give ids or text"
            ) from None
        if not 0 <= value < vocab_size:
            raise PromptError(
                f"token {at} must be 0 to {vocab_size - 1}, got {index}; use this model's tokenizer"
            )
        checked.append(value)
    if not checked:
        raise PromptError("the prompt is empty; write something")
    return checked


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """-> the chat template: its own file, else the tokenizer's config, else the older chat_template.json."""
    path = own_file(folder, "chat_template.jinja")
    if path is not None:
        return read_text(path)
    found = config.get("chat_template") or _read_object(folder, "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{folder}: chat_template must be text; use the files published with the model")
    return found or None


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """-> the object in a JSON file, {} where there is no such file."""
    if own_file(folder, name) is None:
        return {}
    content = read_json(folder / name)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{folder / name} must hold an object, got {type(content).__name__}; download the model again"
        )
    return content


def _token_text(token: Any) -> str | None:
    """-> a named token's text, written as such or as an object with its content; None for what no token can be."""
    text = token.get("content") if isinstance(token, dict) else token
    is_text = isinstance(text, str) and not any("\ud800" <= char <= "\udfff" for char in text)
    return text if is_text else None
