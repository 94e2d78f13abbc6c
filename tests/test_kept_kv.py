"""K/V kept on the disk: what goes on from them is what a cold run gives, and a file that is not ours is never used."""

import os
import stat
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp.kept_kv
from goldens import loaded
from mlx_mtp import StorageError
from mlx_mtp.conversation import Conversation
from mlx_mtp.kept_kv import load_kv, save_kv
from talks import MODEL_TURN, check_rows, golden_text

VARIANTS = ("e2b", "31b", "a4b")


def talked(variant: str, tokens: int = 40) -> tuple[Conversation, list[int], list[int]]:
    """A conversation in which a model's turn was answered, its prompt and its reply."""
    conversation = Conversation(loaded(variant))
    prompt = [*golden_text(variant, "long")[0], *MODEL_TURN]
    return conversation, prompt, conversation.generate(prompt, max_tokens=tokens).tokens


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[Path, str]:
    """A file of e2b's, and its digest."""
    path = tmp_path_factory.mktemp("kept") / "talk.kv.safetensors"
    conversation, _, _ = talked("e2b")
    return path, save_kv(path, conversation.history, conversation.pair)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turn_on_kept_kv_is_a_cold_runs(variant, tmp_path):
    """Going on behind the reply, and answering the same turn again from the checkpoint before it."""
    conversation, prompt, reply = talked(variant)
    path = tmp_path / "deep" / "talk.kv.safetensors"
    digest, size = save_kv(path, conversation.history, conversation.pair)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size == size
    assert os.listdir(path.parent) == [path.name]
    longer = [*prompt, *reply, *golden_text(variant, "short")[0]]
    other = [*prompt, *golden_text(variant, "short")[0][:5], *MODEL_TURN]
    for ids, least in ((longer, len(prompt) + len(reply) - 1), (other, len(prompt) - len(MODEL_TURN))):
        again = Conversation(loaded(variant))
        assert load_kv(path, again.history, again.pair, digest) == len(prompt) + len(reply) - 1
        check_rows(again)
        out = again.generate(ids, max_tokens=20)
        assert out.stats.reused_tokens >= least, "nothing is prefilled that was kept"
        assert out.tokens == Conversation(loaded(variant)).generate(ids, max_tokens=20).tokens
        check_rows(again)


def test_nothing_there_is_said(tmp_path):
    conversation = Conversation(loaded("e2b"))
    with pytest.raises(StorageError, match="no K/V yet"):
        save_kv(tmp_path / "a", conversation.history, conversation.pair)
    assert os.listdir(tmp_path) == []


def refused(path: Path, digest: str, words: str) -> None:
    """It is refused in these words, and a conversation is as it was."""
    conversation = Conversation(loaded("e2b"))
    reply = conversation.generate([5, 6, 7], max_tokens=2).tokens
    with pytest.raises(StorageError, match=words):
        load_kv(path, conversation.history, conversation.pair, digest)
    assert conversation.history.tokens == [5, 6, 7, *reply]
    check_rows(conversation)


def test_a_file_that_is_not_as_it_was_written_is_refused(kept, tmp_path):
    path, digest = kept
    data = path.read_bytes()
    for changed in (data[:-1], data[:100], b"", data + b"x", data[:-9] + b"\1" + data[-8:]):
        damaged = tmp_path / "damaged"
        damaged.write_bytes(changed)
        refused(damaged, digest, "not as it was written")
    refused(tmp_path / "nowhere", digest, "missing")
    refused(tmp_path, digest, "missing")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", digest, "missing")


def test_another_models_are_refused(kept, monkeypatch):
    path, digest = kept
    monkeypatch.setattr(mlx_mtp.kept_kv, "model_key", lambda pair: "another")
    refused(path, digest, "another model")


HOSTILE = {
    "rows beyond the buffers": (("rows", "100000"), None, "something else"),
    "rows beyond the tokens": (("rows", "90"), None, "something else"),
    "no rows": (("rows", "0"), None, "something else"),
    "a number that is none": (("written", "x"), None, "something else"),
    "fewer written than whole": (("written", "3"), None, "something else"),
    "a checkpoint beyond the rows": (("checkpoint_length", "5000"), None, "something else"),
    "another version": (("format", "mlx-mtp kv 2"), None, "another version"),
    "a field too many": (("more", "1"), None, "another version"),
    "a token outside": (None, ("tokens", lambda ids: mx.full(ids.shape, 10**6, mx.uint32)), "something else"),
    "tokens of another type": (None, ("tokens", lambda ids: ids.astype(mx.float32)), "something else"),
    "no tokens": (None, ("tokens", None), "something else"),
    "a layer too few": (None, ("kv.0.keys", None), "something else"),
    "a layer too many": (None, ("kv.99.keys", lambda _: mx.zeros((1,))), "something else"),
    "another shape": (None, ("kv.0.values", lambda ring: ring[:, :, :8]), "something else"),
    "another type": (None, ("kv.0.values", lambda ring: ring.astype(mx.float16)), "something else"),
    "half a checkpoint": (None, ("ring.0.keys", None), "something else"),
}


@pytest.mark.parametrize(("about", "tensor", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_whose_digest_is_right_and_content_is_not_is_refused(kept, tmp_path, about, tensor, words):
    """As by somebody who writes both files."""
    arrays, metadata = mx.load(str(kept[0]), return_metadata=True)
    if about is not None:
        metadata[about[0]] = about[1]
    if tensor is not None:
        name, change = tensor
        old = arrays.pop(name, None)
        if change is not None:
            arrays[name] = change(old)
    path = tmp_path / "made.safetensors"
    mx.save_safetensors(str(path), arrays, metadata)
    refused(path, mlx_mtp.kept_kv._digest(path), words)


def test_bytes_that_are_no_safetensors_are_refused_before_mlx_sees_them(tmp_path, monkeypatch):
    path, conversation = tmp_path / "made", Conversation(loaded("e2b"))
    monkeypatch.setattr(mx, "load", lambda *_: pytest.fail("MLX was given an unchecked file"))
    for data in (b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}", b"<html>"):
        path.write_bytes(data)
        with pytest.raises(StorageError, match="damaged"):
            load_kv(path, conversation.history, conversation.pair, mlx_mtp.kept_kv._digest(path))


def test_a_disk_that_gets_full_leaves_what_was_there(kept, tmp_path, monkeypatch):
    path = tmp_path / "talk.kv.safetensors"
    path.write_bytes(b"before")
    conversation, _, _ = talked("e2b", tokens=4)
    save = mx.save_safetensors

    def cut(file: str, *words: object) -> None:
        save(file, *words)
        os.truncate(file, 5000)

    monkeypatch.setattr(mx, "save_safetensors", cut)
    with pytest.raises(StorageError, match="disk space"):
        save_kv(path, conversation.history, conversation.pair)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == [path.name]
