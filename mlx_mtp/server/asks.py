"""A request's JSON -> what is asked of the engine: checked, with OpenAI's names put into the library's."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from mlx_mtp.conversation import Prompt
from mlx_mtp.pair import Pair
from mlx_mtp.sampling import Sampling
from mlx_mtp.server.body import check_bytes
from mlx_mtp.server.chat_messages import messages_of, tools_of
from mlx_mtp.server.fields import Fields
from mlx_mtp.server.log_probs import LogProbsAsked
from mlx_mtp.server.refusals import Refusal, bad, unsupported
from mlx_mtp.server.settings import chat_log_probs_of, drafts_of, sampling_of, stops_of, text_log_probs_of
from mlx_mtp.server.templates import Template
from mlx_mtp.server.tool_choice import MustCall, is_without_tools, must_call
from mlx_mtp.stream import Channel

MAX_ANSWERS = 16  # n, and prompts times n
COMPLETION_TOKENS = 16  # OpenAI's default for text completions
# What clients send that changes no token here.
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
REFUSED = {
    "functions": "use tools",
    "function_call": "use tools and tool_choice",
    "audio": "only text is written",
    "prediction": "drafts come from the model's own drafter",
    "web_search_options": "this server opens no connection",
    "suffix": "text is only written at the end",
    "echo": "the prompt is not repeated",
    "best_of": "ask for n answers",
    "grammar": "structured output is not supported yet",
    "guided_json": "structured output is not supported yet",
    "guided_regex": "structured output is not supported yet",
    "guided_choice": "structured output is not supported yet",
    "guided_grammar": "structured output is not supported yet",
    "json_schema": "structured output is not supported yet",
}


@dataclass(frozen=True, slots=True)
class Served:
    """The pair, the name that clients call it by, and what is done where they don't say."""

    pair: Pair
    model: str
    template: Template
    max_tokens: int
    num_draft_tokens: int | str = "auto"
    thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One checked request: prompts times n answers, in this order; `options` as `Engine.submit` takes them."""

    kind: Literal["chat", "completion"]
    prompts: tuple[Prompt, ...]
    n: int
    options: dict[str, Any]
    sampling: Sampling
    is_stream: bool
    with_usage: bool
    has_tools: bool = False
    must_call: MustCall | None = None
    parallel_calls: bool = True
    log_probs: LogProbsAsked | None = None
    ignored: tuple[str, ...] = ()  # fields that nobody looked at

    @property
    def count(self) -> int:
        return len(self.prompts) * self.n

    @property
    def seed(self) -> int:
        """Answer i to each prompt has this + i."""
        assert self.sampling.seed is not None, "one is drawn where none is asked for"
        return self.sampling.seed

    def submissions(self) -> list[tuple[Prompt, dict[str, Any]]]:
        """What the engine is given, in the order of the choices."""
        return [
            (prompt, self.options | {"sampling": replace(self.sampling, seed=self.seed + i)})
            for prompt in self.prompts
            for i in range(self.n)
        ]


def chat_ask(body: dict[str, Any], served: Served) -> Ask:
    """POST /v1/chat/completions. Raises Refusal."""
    fields = Fields(body)
    _check_model(fields, served)
    messages = messages_of(fields, takes_tool_role=served.template.takes_tool_role)
    tools = tools_of(fields)
    must = must_call(fields, tools or (), served.pair.prompt_format.tokenizer)
    if is_without_tools(fields):
        tools = None
    if tools and not served.template.takes_tools:
        raise unsupported("tools", "this model's chat template takes no tools; leave tools out")
    options: dict[str, Any] = {"tools": tools, "thinking": _thinking(fields, served)}
    if must is not None:
        options["begin_with"] = must.begin_with
    parallel = bool(fields.flag("parallel_tool_calls", True))
    _check_format(fields)
    older = fields.whole("max_tokens", 1)
    most = fields.whole("max_completion_tokens", 1) or older
    ask = _ask("chat", (messages,), fields, served, options, most or served.max_tokens)
    return replace(
        ask,
        has_tools=tools is not None,
        must_call=must,
        parallel_calls=parallel and not (must is not None and must.is_one),
    )


def completion_ask(body: dict[str, Any], served: Served) -> Ask:
    """POST /v1/completions. Raises Refusal."""
    fields = Fields(body)
    _check_model(fields, served)
    prompts = _prompts(fields)
    most = fields.whole("max_tokens", 1) or COMPLETION_TOKENS
    return _ask("completion", prompts, fields, served, {}, most)


def _ask(
    kind: Literal["chat", "completion"],
    prompts: tuple[Prompt, ...],
    fields: Fields,
    served: Served,
    options: dict[str, Any],
    max_tokens: int,
) -> Ask:
    """What both kinds of request have; `options` are those of one kind."""
    n = _answers(fields, len(prompts))
    is_stream = bool(fields.flag("stream", False))
    with_usage = _with_usage(fields, is_stream=is_stream)
    sampling = sampling_of(fields, served.pair.sampling)
    log_probs = _log_probs(kind, fields, served, has_tools=bool(options.get("tools")))
    options |= {
        "max_tokens": max_tokens,
        "stop": stops_of(fields),
        "num_draft_tokens": drafts_of(fields, served.num_draft_tokens),
        "log_probs": None if log_probs is None else log_probs.count,
    }
    for name, remedy in REFUSED.items():
        if fields.value(name) not in (None, False, "", [], {}):
            raise unsupported(name, f"{name} is not supported by this server; {remedy}")
    ignored = fields.unread(HARMLESS)
    return Ask(
        kind, prompts, n, options, sampling, is_stream, with_usage, log_probs=log_probs, ignored=ignored
    )


def _log_probs(
    kind: Literal["chat", "completion"], fields: Fields, served: Served, *, has_tools: bool
) -> LogProbsAsked | None:
    """Those of a choice's text: where calls are told apart, they are no part of it."""
    count = chat_log_probs_of(fields) if kind == "chat" else text_log_probs_of(fields)
    if count is None:
        return None
    channels: frozenset[Channel] = frozenset({"answer"} if has_tools else {"answer", "tool"})
    return LogProbsAsked(count, kind == "chat", served.pair.prompt_format.tokenizer, channels)


def _check_model(fields: Fields, served: Served) -> None:
    """The model is the one that was loaded, or is not named; whatever else it says is never looked for."""
    model = fields.text("model")
    if model is not None and model != served.model:
        raise Refusal(
            404,
            f"the model {model[:100]!r} is not served here; this server has {served.model!r}",
            param="model",
            code="model_not_found",
        )


def _thinking(fields: Fields, served: Served) -> bool | None:
    own = fields.flag("thinking")
    extra = fields.object("chat_template_kwargs")
    if extra:
        inner = Fields(extra)
        asked = inner.flag("enable_thinking")
        if inner.unread():
            raise bad("chat_template_kwargs", "chat_template_kwargs has enable_thinking and nothing else")
        own = asked if own is None else own
    effort = fields.text("reasoning_effort")
    if own is None and effort is not None:
        own = effort not in ("none", "minimal")
    return served.thinking if own is None else own


def _check_format(fields: Fields) -> None:
    wanted = fields.object("response_format")
    if wanted is not None and wanted.get("type") != "text":
        raise unsupported(
            "response_format",
            "response_format other than text is not supported yet; ask for JSON in words, or use tools",
        )
    modalities = fields.items("modalities", 8)
    if modalities is not None and modalities != ["text"]:
        raise unsupported("modalities", 'only text is written; leave modalities out, or give ["text"]')


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    """Text, texts, token ids or lists of them."""
    value = fields.value("prompt")
    if isinstance(value, str):
        value = [value]
    elif isinstance(value, list) and value and all(_is_id(item) for item in value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise bad("prompt", "prompt must be a text, a list of texts or token ids, and not empty; give one")
    if len(value) > MAX_ANSWERS:
        raise bad("prompt", f"at most {MAX_ANSWERS} prompts are taken at once, got {len(value)}; send fewer")
    for prompt in value:
        is_ids = isinstance(prompt, list) and bool(prompt) and all(_is_id(item) for item in prompt)
        if not is_ids and not (isinstance(prompt, str) and prompt):
            raise bad("prompt", "each prompt must be a text or a list of token ids, and not empty")
        if isinstance(prompt, str):
            check_bytes(prompt, "prompt")
    return tuple(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _answers(fields: Fields, prompts: int) -> int:
    n = fields.whole("n", 1, MAX_ANSWERS) or 1
    if n * prompts > MAX_ANSWERS:
        raise bad("n", f"prompts times n is at most {MAX_ANSWERS}, got {n * prompts}; ask for fewer")
    return n


def _with_usage(fields: Fields, *, is_stream: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not is_stream:
        raise bad("stream_options", "stream_options belong to a stream; set stream, or leave them out")
    return bool(Fields(options).flag("include_usage", False))
