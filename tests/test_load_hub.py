"""`load` with models of the hub, against the stand-in: aliases, drafters, memory before weights, offline, copies."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_runs import write_chat_pair
from hub_stand_in import HubStandIn
from mlx_mtp import HubError, MemoryRefusal, PairError, Progress, Sampling, generate, load, store
from mlx_mtp import download as downloads
from mlx_mtp.aliases import find_alias
from mlx_mtp.machine import read_machine
from mlx_mtp.memory import estimate_memory
from tiny_checkpoints import edit_json

MACHINES = Path(__file__).parent / "machines"
TARGET, DRAFTER = "org/target", "org/drafter"
SMALL = ".json"  # everything but weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub with a tiny pair, under its own names and under those of the alias e4b."""
    monkeypatch.setattr(downloads, "ASK_PAUSES", (0.0,))
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "ours")
    target = write_chat_pair(tmp_path / "files")
    drafter = tmp_path / "files" / "drafter"
    alias = find_alias("e4b")
    assert alias is not None
    repos = {TARGET: target, DRAFTER: drafter, alias.target: target, alias.drafter: drafter}
    with HubStandIn(repos) as hub, hub.in_process(tmp_path / "home"):
        yield hub


def test_an_alias_brings_its_drafter_and_opens_no_socket_the_second_time(hub: HubStandIn) -> None:
    seen: list[Progress] = []
    pair = load("e4b", on_progress=seen.append)
    assert pair.drafter is not None and pair.warnings == ()
    assert {progress.stage for progress in seen} == {"download", "read"}
    drafted = generate(pair, [5, 6, 7], max_tokens=20, sampling=Sampling(temperature=0.0), num_draft_tokens=2)
    assert drafted.stats.drafted > 0
    hub.requests.clear()
    again = load("e4b")
    assert hub.requests == [] and again.folder == pair.folder


def test_a_revision_is_loaded_as_it_was(hub: HubStandIn, tmp_path: Path) -> None:
    first = hub.repos[TARGET].refs["main"]
    edit_json(tmp_path / "files" / "target" / "generation_config.json", temperature=0.25)
    hub.push(TARGET, tmp_path / "files" / "target")
    now, then = load(TARGET, drafter=None), load(TARGET, drafter=None, revision=first)
    assert now.sampling.temperature == 0.25 != then.sampling.temperature
    assert then.folder is not None and then.folder.name == first


def test_memory_is_asked_for_before_weights_are_downloaded(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the alias before anything, and by config.json for any other name."""
    monkeypatch.setattr("mlx_mtp.pair.this_machine", lambda: read_machine(MACHINES / "m1_16.json"))
    monkeypatch.setattr("mlx_mtp.pair.check_machine", lambda machine: None)
    with pytest.raises(MemoryRefusal, match=r"use e4b:4bit"):
        load("26b")
    assert hub.requests == []
    large = tmp_path / "large"
    write_chat_pair(large)
    edit_json(large / "target" / "config.json", text_config__intermediate_size=2**30)
    hub.push("org/large", large / "target")
    with pytest.raises(MemoryRefusal, match="org/large needs"):
        load("org/large")
    assert hub.downloads("config.json") and not hub.downloads("model.safetensors")


def test_a_drafter_that_does_not_fit_is_refused_before_its_weights_come(
    hub: HubStandIn, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_chat_pair(other)
    edit_json(other / "drafter" / "config.json", backbone_hidden_size=128)
    hub.push("org/other", other / "drafter")
    with pytest.raises(PairError, match="hidden size"):
        load(TARGET, drafter="org/other")
    fetched = [request.path for request in hub.requests if "org/other" in request.path]
    assert any(path.endswith("config.json") for path in fetched)
    assert not any(path.endswith(".safetensors") for path in fetched)


def test_without_its_own_drafter_within_reach_decoding_is_plain_and_says_why(hub: HubStandIn) -> None:
    """Fault 27: only where the drafter was not asked for by name."""
    alias = find_alias("e4b")
    assert alias is not None
    del hub.repos[alias.drafter]
    pair = load("e4b")
    assert pair.drafter is None
    assert len(pair.warnings) == 1 and alias.drafter in pair.warnings[0] and "plain" in pair.warnings[0]
    with pytest.raises(HubError, match=alias.drafter):
        load("e4b", drafter=alias.drafter)


def test_a_quantised_copy_outlives_the_files_it_was_made_from(hub: HubStandIn) -> None:
    pair = load(TARGET, drafter=DRAFTER, quantize=4)
    downloads.remove_cached(TARGET)
    hub.requests.clear()
    again = load(TARGET, drafter=DRAFTER, quantize=4)
    assert again.folder == pair.folder and hub.requests == []
    assert not downloads.cached_snapshot(TARGET)


def test_the_estimate_before_the_download_is_that_of_the_alias() -> None:
    """The refusal names the same figure that anyone can ask for."""
    assert estimate_memory("26b", 4096).total > 13 * 2**30
