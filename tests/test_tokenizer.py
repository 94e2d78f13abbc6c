"""Text to ids and back: nothing is lost, and no text makes a control token."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_cases import plain_tokenizer
from mlx_mtp.prompt import PromptFormat, load_prompt_format
from mlx_mtp.tokenizer import Tokenizer
from tiny_tokenizer import CONTROLS, write_tokenizer


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


with_controls = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*CONTROLS, "<|", "|>", "turn", " ", "\n\n"]))
)
TEXTS = with_controls.map("".join).filter(lambda text: "▁" not in text)


@given(TEXTS)
@settings(max_examples=200, deadline=None)
def test_text_survives_and_makes_no_control_token(format: PromptFormat, text: str) -> None:
    """Fault 38, and 37: NUL is a character like others."""
    ids = format.tokenizer.encode(text)
    assert format.tokenizer.decode(ids) == text
    assert format.tokenizer.control_ids.isdisjoint(ids)


@pytest.mark.parametrize("control", CONTROLS)
def test_each_control_token_is_literal_in_text_and_one_id_by_name(format: PromptFormat, control: str) -> None:
    tokenizer = format.tokenizer
    index = tokenizer.token_id(control)
    assert index is not None
    assert index in tokenizer.special_ids
    ids = tokenizer.encode(f"a {control} b")
    assert index not in ids
    assert tokenizer.decode([index, *ids, index]) == f"a {control} b", "by id it gives no text"


@pytest.mark.parametrize("text", ["plain words", " a  b", "Żółw 🐢 \x00", "<h1>\n\n\n", "x < y > z |"])
def test_ordinary_text_has_the_plain_tokenizers_ids(folder: Path, format: PromptFormat, text: str) -> None:
    assert format.tokenizer.encode(text) == plain_tokenizer(folder).encode(text, add_special_tokens=False).ids


def test_controls_that_merges_can_reach_are_spelled_out(copy: Path) -> None:
    """Converters derive merges from the vocabulary, so that text may merge into a control token."""
    content = json.loads((copy / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    del content["added_tokens"][-1]  # <h1>
    for index, (left, right) in enumerate([("<", "b"), ("<b", "o"), ("<bo", "s"), ("<bos", ">")]):
        for new in (left, right, left + right):
            vocab.setdefault(new, len(vocab))
        merges.insert(index, [left, right])
    (copy / "tokenizer.json").write_text(json.dumps(content))
    plain = plain_tokenizer(copy)
    plain.encode_special_tokens = True
    tokenizer = load_prompt_format(copy, eos_ids=()).tokenizer
    assert plain.encode("see <bos>!", add_special_tokens=False).ids.count(2) == 1, "the danger is real"
    assert 2 not in tokenizer.encode("see <bos>!")
    assert tokenizer.decode(tokenizer.encode("see <bos>!")) == "see <bos>!"


def test_controls_not_marked_as_special_are_found_by_their_shape(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in ("<pad>", "<eos>", "<bos>", "<unk>")
    (copy / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_prompt_format(copy, eos_ids=()).tokenizer
    assert tokenizer.token_id("<|turn>") in tokenizer.control_ids
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<|turn>model\n<turn|>"))


def test_the_tokenizer_type_is_what_others_need(format: PromptFormat) -> None:
    tokenizer = format.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("🐢")[:-1]) == "", "no U+FFFD for a character that is cut off"
