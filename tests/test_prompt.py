"""Prompts to ids: what a prompt may be, which templates and files a checkpoint may bring, clear refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from chat_cases import CHATS, TOOLS, assistant, reference_ids, user
from mlx_mtp.errors import CheckpointError, MtpError, PromptError
from mlx_mtp.prompt import PromptFormat, RenderedPrompt, load_prompt_format, prompt_ids, render_chat
from mlx_mtp.tokenizer import MAX_TEXT_CHARS
from tiny_tokenizer import CHAT_TEMPLATE, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def format(folder: Path) -> PromptFormat:
    return load_prompt_format(folder, eos_ids=(1,))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- text and ids ----


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\udce9"])
def test_lone_surrogates_are_refused(format: PromptFormat, text: str) -> None:
    for prompt in (text, [user(text)], [user([{"type": "text", "text": text}])]):  # type: ignore[arg-type]
        with pytest.raises(PromptError, match="lone surrogate"):
            prompt_ids(format, prompt)


def test_text_prompt_starts_with_bos_once(format: PromptFormat) -> None:
    assert prompt_ids(format, "hello").ids == [2, *format.tokenizer.encode("hello")]
    assert prompt_ids(format, "<bos>hello").ids.count(2) == 1
    assert prompt_ids(format, " \n").ids == [2, *format.tokenizer.encode(" \n")]


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_empty_prompts_are_refused(format: PromptFormat, prompt: Any) -> None:
    """Fault 31."""
    with pytest.raises(PromptError, match="empty"):
        prompt_ids(format, prompt)
    with pytest.raises(PromptError, match="at least one message"):
        render_chat(format, [])
    with pytest.raises(PromptError, match="is empty"):
        render_chat(format, [user("")])


def test_a_huge_text_is_refused_before_it_is_encoded(
    format: PromptFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 40."""
    huge = "a" * (MAX_TEXT_CHARS + 1)
    half = "a" * (MAX_TEXT_CHARS // 2 + 1)
    monkeypatch.delattr(format.tokenizer, "_inner")
    for prompt in (huge, [user(huge)], [user(half), assistant(half), user("?")]):
        with pytest.raises(PromptError, match=f"at most {MAX_TEXT_CHARS:,} characters"):
            prompt_ids(format, prompt)


def test_token_ids_are_taken_as_they_are(format: PromptFormat) -> None:
    chat = render_chat(format, [user("hi"), assistant("ho"), user("?")])
    assert prompt_ids(format, list(chat.ids)) == chat
    assert prompt_ids(format, [7, 511]) == RenderedPrompt([7, 511], ())


@pytest.mark.parametrize("ids", [[512], [-1], [3, 1.0], [True], ["a"], [None], [[1]]])
def test_ids_outside_the_vocabulary_are_refused(format: PromptFormat, ids: list[Any]) -> None:
    with pytest.raises(PromptError, match=r"token \d must be"):
        prompt_ids(format, ids)


@pytest.mark.parametrize("prompt", [None, 5, b"bytes", {"role": "user"}])
def test_other_prompts_are_refused(format: PromptFormat, prompt: Any) -> None:
    with pytest.raises(PromptError, match="a prompt is text"):
        prompt_ids(format, prompt)


# ---- templates ----


def with_template(format: PromptFormat, template: str | None) -> PromptFormat:
    return PromptFormat(
        format.tokenizer, template, format.eos_ids, format.bos_id, format.named_tokens, format.vocab_size
    )


def test_without_a_template_text_works_and_a_chat_is_refused(copy: Path) -> None:
    """Fault 41."""
    (copy / "chat_template.jinja").unlink()
    format = load_prompt_format(copy, eos_ids=(1,))
    assert prompt_ids(format, "hi").ids[0] == 2
    with pytest.raises(PromptError, match="has no chat template; give the prompt as text"):
        prompt_ids(format, [user("hi")])


@pytest.mark.parametrize("place", ["config", "named", "old"])
def test_templates_are_found_in_older_places(copy: Path, format: PromptFormat, place: str) -> None:
    (copy / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    content = {"chat_template": named if place == "named" else CHAT_TEMPLATE}
    (copy / ("chat_template.json" if place == "old" else "tokenizer_config.json")).write_text(
        json.dumps(content)
    )
    found = load_prompt_format(copy, eos_ids=(1,))
    assert render_chat(found, CHATS["tool"]) == render_chat(format, CHATS["tool"])


def test_thinking_and_tools_that_a_template_ignores_are_refused(format: PromptFormat) -> None:
    mute = with_template(format, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(PromptError, match="cannot turn thinking on"):
        render_chat(mute, [user("x")], thinking=True)
    with pytest.raises(PromptError, match="takes no tools"):
        render_chat(mute, [user("x")], tools=TOOLS)
    assert render_chat(mute, [user("x")], thinking=False).ids == format.tokenizer.encode("x")
    for more in ({"thinking": True}, {"tools": TOOLS}):
        with pytest.raises(PromptError, match="belong to a chat"):
            prompt_ids(format, "x", **more)  # type: ignore[arg-type]


def test_a_template_may_work_on_text_as_if_it_were_the_original(format: PromptFormat) -> None:
    """Stand-ins behave as "<" and ">" do: length, case, printing inside data, JSON in both spellings."""
    template = (
        "{% for m in messages %}{{ m.content | length }}{{ m.content | upper }}{{ [m.content] }}"
        "{{ m.content | tojson }}{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}"
    )
    ids = render_chat(with_template(format, template), [user("<a>é")]).ids
    assert format.tokenizer.decode(ids) == '4<A>É[\'<a>é\']"<a>é""<a>\\u00e9"'


def test_an_empty_rendering_is_refused(format: PromptFormat) -> None:
    with pytest.raises(PromptError, match="empty prompt"):
        render_chat(with_template(format, "{# nothing #}"), [user("x")])


def test_blanks_that_a_control_token_swallows_are_swallowed(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] == "<|turn>"
        token["lstrip"] = token["content"] == "<turn|>"
    (copy / "tokenizer.json").write_text(json.dumps(content))
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}<|turn> {{ m.content }} <turn|>{% endfor %}"
    )
    messages = [user("a b"), user(" c")]
    assert render_chat(load_prompt_format(copy, eos_ids=()), messages).ids == reference_ids(copy, messages)


# ---- what a folder holds ----


def test_eos_ids_are_everything_that_ends_a_turn(format: PromptFormat, folder: Path) -> None:
    assert format.eos_ids == (1, 5, 13)
    assert [format.tokenizer.token_text(i) for i in format.eos_ids] == [
        "<eos>",
        "<turn|>",
        "<|tool_response>",
    ]
    assert load_prompt_format(folder, eos_ids=(7, 5)).eos_ids == (7, 5, 1, 13)
    assert format.bos_id == 2
    assert format.vocab_size == format.tokenizer.vocab_size == 512


def test_named_tokens_come_from_the_config(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|think|>"}, "eos_token": None})
    )
    format = load_prompt_format(copy, eos_ids=())
    assert format.bos_id == format.tokenizer.token_id("<|think|>")
    assert format.eos_ids[0] == 1
    (copy / "tokenizer_config.json").unlink()
    assert load_prompt_format(copy, eos_ids=()).bos_id == 2


def test_wider_model_vocabulary_is_allowed(folder: Path) -> None:
    format = load_prompt_format(folder, eos_ids=(1,), vocab_size=600)
    assert prompt_ids(format, [599]).ids == [599]
    assert format.tokenizer.decode([599, 600]) == ""


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("tokenizer.json", "<html>", "tokenizer.json is damaged"),
        ("tokenizer.json", "{}", "tokenizer.json is damaged"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "must hold an object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be text"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read"),
    ],
)
def test_damaged_files_are_refused(copy: Path, file: str, content: str | bytes | None, says: str) -> None:
    """Fault 20."""
    (copy / file).unlink()
    if file == "tokenizer_config.json":
        (copy / "chat_template.jinja").unlink()
    if content is not None:
        (copy / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=says) as caught:
        load_prompt_format(copy, eos_ids=(1,))
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, MtpError)


def test_a_token_beyond_the_embedding_is_refused(format: PromptFormat, copy: Path) -> None:
    """As many tokens as the model has rows for, but one is numbered beyond them: MLX would read any memory there."""
    content = json.loads((copy / "tokenizer.json").read_text())
    [index] = format.tokenizer.encode("e")
    content["model"]["vocab"][format.tokenizer.token_text(index)] = 512
    (copy / "tokenizer.json").write_text(json.dumps(content))
    wrong = load_prompt_format(copy, eos_ids=(1,), vocab_size=512)
    assert prompt_ids(wrong, "a").ids
    for prompt in ("ae", [{"role": "user", "content": "ae"}]):
        with pytest.raises(CheckpointError, match="has a token 512, the model those below 512"):
            prompt_ids(wrong, prompt)


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, copy: Path) -> None:
    with pytest.raises(CheckpointError, match="has 512 tokens, the model 500"):
        load_prompt_format(folder, eos_ids=(1,), vocab_size=500)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load_prompt_format(folder, eos_ids=(512,))
    content = json.loads((copy / "tokenizer.json").read_text())
    content["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the decoder must turn each token into text on its own"):
        load_prompt_format(copy, eos_ids=(1,))
