"""`load`: what a folder becomes, and what is refused before weights are opened."""

from pathlib import Path

import mlx.core as mx
import pytest

from cli_runs import VOCAB, write_chat_pair
from mlx_mtp import (
    CheckpointError,
    MachineError,
    MemoryRefusal,
    PairError,
    ParameterError,
    Sampling,
    generate,
    load,
    store,
)
from mlx_mtp.machine import read_machine
from mlx_mtp.pair import Pair, default_sampling
from mlx_mtp.weights import QuantizedWeight
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


@pytest.mark.parametrize("name", ["gemma-4-E2B-it", "target"])
def test_a_bare_name_is_never_a_folder(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="there is no model"):
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
    [{"quantize": 5}, {"quantize": 0}, {"drafter_bits": 3}, {"drafter_bits": "4"}, {"revision": "main"}],
    ids=str,
)
def test_options_are_refused_before_anything_is_read(folder: Path, option: dict[str, object]) -> None:
    for path in folder.glob("*/config.json"):
        path.unlink()
    with pytest.raises(ParameterError, match=next(iter(option))):
        load(folder / "target", **option)  # type: ignore[arg-type]


def bits_of(pair: Pair) -> set[int]:
    """The bits of the drafter's matrices, 0 for a dense one."""
    assert pair.drafter is not None
    matrices = [layer.down_proj for layer in pair.drafter.layers]
    return {matrix.bits if isinstance(matrix, QuantizedWeight) else 0 for matrix in matrices}


def test_a_quantised_target_gets_a_4_bit_drafter_unless_other_bits_are_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "cache")
    target = folder / "target"
    assert bits_of(load(target)) == {0}
    assert bits_of(load(target, drafter_bits=8)) == {8}
    pair = load(target, quantize=8)
    assert pair.folder is not None and pair.folder.is_relative_to(tmp_path / "cache")
    assert bits_of(pair) == {4}
    assert bits_of(load(target, quantize=8, drafter_bits=None)) == {0}
    greedy = Sampling(temperature=0.0)
    plain = generate(pair, [5, 6, 7], max_tokens=20, sampling=greedy, num_draft_tokens=0)
    drafted = generate(pair, [5, 6, 7], max_tokens=20, sampling=greedy, num_draft_tokens=3)
    assert plain.tokens == drafted.tokens and drafted.stats.drafted > 0
    with pytest.raises(CheckpointError, match="quantised"):
        load(pair.folder, drafter=None, quantize=4)


def test_a_model_that_memory_has_no_room_for_is_refused_before_its_weights_are_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    monkeypatch.setattr("mlx_mtp.pair.free_bytes", lambda: 50 * 2**20)
    with pytest.raises(MemoryRefusal, match=r"0\.0 GB can be taken now"):
        load(folder / "target")


def test_a_mac_without_metal_is_refused_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 65."""
    machine = read_machine(Path(__file__).parent / "machines" / "macos_vm.json")
    monkeypatch.setattr("mlx_mtp.pair.this_machine", lambda: machine)
    with pytest.raises(MachineError, match="virtual machine"):
        load("no such model")
