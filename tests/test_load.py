"""`load`: what a folder becomes, and what is refused before weights are opened."""

from pathlib import Path

import mlx.core as mx
import pytest

from cli_runs import VOCAB, write_chat_pair
from mlx_mtp import CheckpointError, PairError, ParameterError, Sampling, generate, load
from mlx_mtp.pair import default_sampling
from tiny_checkpoints import edit_json, write_drafter
from tiny_tokenizer import write_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `target` and, beside it, `drafter`."""
    write_chat_pair(tmp_path)
    return tmp_path


def test_a_drafter_beside_the_target_is_found(folder: Path) -> None:
    pair = load(folder / "target")
    assert pair.drafter is not None and pair.warnings == ()
    assert pair.target.dtype == mx.float32
    greedy = Sampling(temperature=0.0)
    ids = list(range(5, 25))
    plain = generate(pair, ids, max_tokens=20, sampling=greedy, num_draft_tokens=0)
    drafted = generate(pair, ids, max_tokens=20, sampling=greedy, num_draft_tokens=2)
    assert plain.tokens == drafted.tokens and drafted.stats.drafted > 0


def test_without_a_drafter_decoding_is_plain_and_says_so(folder: Path) -> None:
    """Fault 27: one warning; asking for drafts all the same is refused."""
    (folder / "drafter").rename(folder / "elsewhere")
    pair = load(folder / "target")
    assert len(pair.warnings) == 1 and "decoding is plain" in pair.warnings[0]
    out = generate(pair, [5, 6], max_tokens=3)
    assert out.stats.parked and out.stats.drafted == 0
    with pytest.raises(ParameterError, match="without a drafter"):
        generate(pair, [5, 6], max_tokens=3, num_draft_tokens=2)
    assert load(folder / "target", drafter=None).warnings == ()
    assert load(folder / "target", drafter=folder / "elsewhere").drafter is not None


@pytest.mark.parametrize("name", ["gemma-4-E2B-it", "google/gemma-4-E2B-it", "target"])
def test_a_bare_name_is_never_a_folder(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match=r"\./path"):
        load(name)
    assert load("./target").name == "./target"


def test_missing_folders_are_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        load(folder / "nowhere")
    with pytest.raises(PairError, match="no folder"):
        load(folder / "target", drafter=folder / "nowhere")


def test_wrong_pairs_are_refused_before_weights_are_opened(folder: Path) -> None:
    """Faults 21 to 25 need the configurations only: the weights are not even there."""
    write_drafter(folder / "other", "e2b")
    edit_json(folder / "other" / "config.json", backbone_hidden_size=128)
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    for drafter, said in (
        (folder / "other", "hidden size"),
        (folder / "target", "target"),
    ):
        with pytest.raises(PairError, match=said):
            load(folder / "target", drafter=drafter)
    with pytest.raises(PairError):
        load(folder / "drafter", drafter=None)


def test_a_tokenizer_of_another_size_is_refused_before_weights_are_opened(folder: Path) -> None:
    """Fault 20."""
    write_tokenizer(folder / "target", VOCAB + 64)
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokens, the model"):
        load(folder / "target")


@pytest.mark.parametrize("max_context", [0, -1, 10**9])
def test_a_context_beyond_the_model_is_refused(folder: Path, max_context: int) -> None:
    with pytest.raises(ParameterError, match="max_context must be in 1"):
        load(folder / "target", max_context=max_context)


def test_defaults_come_from_the_generation_config() -> None:
    published = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 106]}
    assert default_sampling(published) == Sampling(temperature=1.0, top_k=64, top_p=0.95)
    assert default_sampling({"do_sample": False, "top_k": 64}) == Sampling(temperature=0.0)
    assert default_sampling({}) == Sampling()


@pytest.mark.parametrize(
    "option",
    [{"quantize": 4}, {"drafter_bits": 8}, {"revision": "main"}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_later_versions_are_refused(folder: Path, option: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=r"version"):
        load(folder / "target", **option)  # type: ignore[arg-type]
