"""Downloads that go well: sizes first, only what is needed, cut and resumed, two at once, offline from the cache."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_runs import environment, write_chat_pair
from hub_cases import impatient
from hub_stand_in import TOKEN, HubStandIn
from mlx_mtp import Sampling, generate, load
from mlx_mtp.cache import has_size
from mlx_mtp.download import cached_snapshot, fetch, list_cached, plan_download, remove_cached, verify
from mlx_mtp.progress import Progress
from mlx_mtp.transfer import size_of

REPO = "org/target"
WEIGHTS = "model.safetensors"
CONFIG = json.dumps({"model_type": "gemma4"}).encode()
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"import os",
    "README.md": b"# A model",
    "original/consolidated.safetensors": b"0" * 100,
    "notes.json": b"{}",
}
FETCH = """
import sys
from pathlib import Path
from mlx_mtp.download import fetch, plan_download
plan = plan_download(sys.argv[1])
print("planned", plan.missing_bytes, flush=True)
fetch(plan, lambda progress: print(progress.stage, progress.done, flush=True))
"""
NO_SOCKETS = """
import sys
def forbid(event, arguments):
    if event.startswith("socket."):
        raise AssertionError(f"a socket was opened: {event} {arguments}")
sys.addaudithook(forbid)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """A hub with one model of 1 MB, which this process uses with a cache of its own."""
    weights = bytes(range(256)) * 4096
    with HubStandIn(
        {REPO: {"config.json": CONFIG, "tokenizer.json": b"{}", WEIGHTS: weights} | OTHERS}
    ) as hub:
        with impatient(), hub.in_process(tmp_path):
            yield hub


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_pair(tmp_path_factory.mktemp("published"))


def run_python(code: str, *words: str, hub: HubStandIn, home: Path) -> subprocess.Popen[str]:
    variables = environment(**hub.variables(home), PYTHONPATH=":".join(path for path in sys.path if path))
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_plan_states_sizes_and_writes_nothing(hub: HubStandIn, tmp_path: Path) -> None:
    plan = plan_download(REPO)
    assert {file.name: file.size for file in plan.files} == {
        "config.json": len(CONFIG),
        "tokenizer.json": 2,
        WEIGHTS: 1 << 20,
    }
    assert plan.total_bytes == plan.missing_bytes == (1 << 20) + len(CONFIG) + 2
    assert plan.commit == hub.repos[REPO].refs["main"]
    assert not any(file.is_cached for file in plan.files)
    assert list(tmp_path.iterdir()) == []
    assert not hub.downloads()


def test_only_what_is_needed_is_fetched_once(hub: HubStandIn) -> None:
    folder = fetch(plan_download(REPO))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS, "tokenizer.json"]
    assert (folder / WEIGHTS).read_bytes() == hub.repos[REPO].commits[folder.name][WEIGHTS].content
    assert hub.sent == plan_download(REPO).total_bytes
    assert plan_download(REPO).missing_bytes == 0
    hub.requests.clear()
    assert fetch(plan_download(REPO)) == folder
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}/revision/main"] * 1
    assert verify(folder) == 3


def test_a_downloaded_model_writes_the_same_text(tmp_path: Path, chat_folder: Path) -> None:
    with HubStandIn({REPO: chat_folder}) as hub, hub.in_process(tmp_path):
        folder = fetch(plan_download(REPO))
    options = {"max_tokens": 12, "sampling": Sampling(temperature=0.0), "num_draft_tokens": 0}
    prompt = [{"role": "user", "content": "Why?"}]
    assert (
        generate(load(folder), prompt, **options).tokens
        == generate(load(chat_folder), prompt, **options).tokens
    )


def test_progress_counts_all_bytes_and_ends_at_the_total(hub: HubStandIn) -> None:
    hub.faults.bytes_per_second = 4e6
    reports: list[Progress] = []
    plan = plan_download(REPO)
    fetch(plan, reports.append)
    done = [report.done or 0 for report in reports]
    assert done == sorted(done)
    assert {report.total for report in reports} == {plan.total_bytes}
    assert done[-1] == plan.total_bytes
    assert len(reports) >= 4, "a download of a quarter of a second reports more than its ends"
    assert reports[-1].message == f"downloading {WEIGHTS}"


def test_a_cut_connection_goes_on_from_the_same_byte(hub: HubStandIn) -> None:
    hub.faults.cut_after, hub.faults.cuts = 300_000, 3
    reports: list[Progress] = []
    folder = fetch(plan_download(REPO), reports.append)
    assert verify(folder) == 3
    starts = [request.range for request in hub.downloads(WEIGHTS) if request.path.startswith("/cdn/")]
    assert starts == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert hub.sent == plan_download(REPO).total_bytes
    assert [report.message for report in reports if report.stage == "wait"] == [
        f"connection lost; {WEIGHTS} goes on in 0 s"
    ] * 3


def test_a_killed_download_goes_on_in_the_next_process(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.bytes_per_second = 500_000
    first = run_python(FETCH, REPO, hub=hub, home=tmp_path)
    assert first.stdout is not None
    while int(first.stdout.readline().split()[1]) < 200_000 or hub.sent < 200_000:
        pass
    first.kill()
    first.communicate(timeout=60)
    hub.faults.bytes_per_second = None
    assert cached_snapshot(REPO) is None, "an unfinished model is never taken as complete"
    plan = plan_download(REPO)
    begun = {file.name: file.begun for file in plan.files}
    assert 100_000 < begun[WEIGHTS] < 1 << 20
    assert plan.missing_bytes == (1 << 20) - begun[WEIGHTS]
    hub.requests.clear()
    assert verify(fetch(plan)) == 3
    assert hub.downloads(WEIGHTS)[0].range == f"bytes={begun[WEIGHTS]}-"


def test_two_processes_fetch_every_byte_once(hub: HubStandIn, tmp_path: Path) -> None:
    hub.faults.bytes_per_second = 700_000
    both = [run_python(FETCH, REPO, hub=hub, home=tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert hub.sent == plan_download(REPO).total_bytes
    assert sum("wait" in output for output, _ in outputs) == 1, "the one that came later says that it waits"
    assert verify(cached_snapshot(REPO) or Path()) == 3


def test_two_threads_fetch_every_byte_once(hub: HubStandIn) -> None:
    hub.faults.bytes_per_second = 4e6
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(fetch(plan_download(REPO)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1
    assert hub.sent == plan_download(REPO).total_bytes


def test_a_file_that_is_moved_while_it_is_looked_at_is_not_there(tmp_path: Path, monkeypatch) -> None:
    """Another download renames it after it was seen: that is no error of the disk."""
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert size_of(tmp_path / "gone.incomplete") == 0 and not has_size(tmp_path / "gone", 0)
    assert size_of(tmp_path) == 0 and not has_size(tmp_path, tmp_path.stat().st_size)


def test_a_slow_hub_that_stalls_is_asked_again(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.push(REPO, {"config.json": CONFIG, WEIGHTS: b"w" * 40_000})
    hub.faults.bytes_per_second = 8_000  # two seconds after every 16 kB
    started = time.monotonic()
    fetch(plan_download(REPO))
    assert time.monotonic() - started < 2
    assert len(hub.downloads(WEIGHTS)) >= 4


def test_a_hub_that_ignores_ranges_is_read_from_the_start(hub: HubStandIn) -> None:
    hub.faults.cut_after, hub.faults.cuts, hub.faults.ignore_range = 300_000, 1, True
    reports: list[Progress] = []
    folder = fetch(plan_download(REPO), reports.append)
    assert verify(folder) == 3
    assert reports[-1].done == reports[-1].total


def test_a_token_is_not_sent_to_where_the_hub_redirects(hub: HubStandIn) -> None:
    hub.repos[REPO].is_gated = True
    fetch(plan_download(REPO, token=TOKEN), token=TOKEN)
    stored = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert stored and all(request.origin.startswith("localhost:") for request in stored)
    assert all(request.authorization is None for request in stored)
    asked = [request for request in hub.requests if not request.path.startswith("/cdn/")]
    assert {request.authorization for request in asked} == {f"Bearer {TOKEN}"}


def test_weights_without_a_redirect(hub: HubStandIn) -> None:
    hub.faults.redirect = False
    assert verify(fetch(plan_download(REPO))) == 3


def test_a_revision_is_pinned_to_its_commit(hub: HubStandIn) -> None:
    old = fetch(plan_download(REPO))
    newer = hub.push(REPO, {"config.json": CONFIG, WEIGHTS: b"other weights"})
    hub.push(REPO, {"config.json": CONFIG, WEIGHTS: b"tagged weights"}, branch="v1.0")
    assert cached_snapshot(REPO) == old, "what is cached stays until it is asked for anew"
    assert plan_download(REPO, old.name).missing_bytes == 0
    plan = plan_download(REPO)
    assert (plan.commit, plan.missing_bytes) == (newer, len(b"other weights"))
    new = fetch(plan)
    assert cached_snapshot(REPO) == new != old
    assert cached_snapshot(REPO, old.name) == old
    assert cached_snapshot(REPO, "v1.0") is None
    tagged = fetch(plan_download(REPO, "v1.0"))
    assert cached_snapshot(REPO, "v1.0") == tagged
    assert (tagged / WEIGHTS).read_bytes() == b"tagged weights"
    assert cached_snapshot(REPO) == new


def test_the_cache_serves_without_a_socket(tmp_path: Path, chat_folder: Path) -> None:
    with HubStandIn({REPO: chat_folder}) as hub:
        with hub.in_process(tmp_path):
            fetch(plan_download(REPO))
        code = NO_SOCKETS + (
            "from mlx_mtp import load\n"
            "from mlx_mtp.download import cached_snapshot, fetch, list_cached, plan_download, verify\n"
            f"folder = cached_snapshot({REPO!r})\n"
            "print(folder.parent.name, load(folder).target is not None, len(list_cached()), verify(folder))\n"
            "try:\n"
            f"    plan_download({REPO!r})\n"
            "except AssertionError as error:\n"
            "    print('the hook works:', 'a socket was opened' in str(error))\n"
        )
        process = run_python(code, hub=hub, home=tmp_path)
        output, problems = process.communicate(timeout=120)
    count = sum(file.is_file() for file in chat_folder.iterdir())
    assert output.splitlines() == [f"snapshots True 1 {count}", "the hook works: True"], problems


def test_other_tools_share_the_cache_both_ways(hub: HubStandIn) -> None:
    from huggingface_hub import snapshot_download

    ours = fetch(plan_download(REPO))
    patterns = [
        "model*.safetensors",
        "config.json",
        "token*.json",
        "tokenizer.model",
        "*.jinja",
    ]  # as mlx-lm's
    theirs = snapshot_download(REPO, local_files_only=True, allow_patterns=patterns)
    assert Path(theirs) == ours
    remove_cached(REPO)
    assert cached_snapshot(REPO) is None
    snapshot_download(REPO, allow_patterns=["config.json"])
    assert cached_snapshot(REPO) is None, "only a part was fetched"
    snapshot_download(REPO)
    assert cached_snapshot(REPO) == ours
    assert plan_download(REPO).missing_bytes == 0


def test_cached_models_are_listed_and_removed(tmp_path: Path, chat_folder: Path) -> None:
    repos = {"org/target": chat_folder, "org/drafter": chat_folder.parent / "drafter"}
    other = {"config.json": b'{"model_type": "llama"}', WEIGHTS: b"w" * 1000}
    with HubStandIn({**repos, "else/llama": other}) as hub, hub.in_process(tmp_path):
        assert list_cached() == ()
        plans = {name: plan_download(name) for name in hub.repos}
        for plan in plans.values():
            fetch(plan)
        kinds = {model.repo_id: model.kind for model in list_cached()}
        assert kinds == {"else/llama": "other", "org/drafter": "drafter", "org/target": "target"}
        for model in list_cached():
            plan = plans[model.repo_id]
            assert model.is_complete and model.commit == plan.commit and model.path == plan.snapshot
            assert plan.total_bytes <= model.bytes <= plan.total_bytes + 20_000
            assert abs(model.last_used - time.time()) < 600
        freed = remove_cached("org/target")
        assert freed >= plans["org/target"].total_bytes
        assert [model.repo_id for model in list_cached()] == ["else/llama", "org/drafter"]
        assert not plans["org/target"].folder.exists()


def test_a_folder_named_like_a_model_is_not_looked_at(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / REPO).mkdir(parents=True)
    (here / REPO / "config.json").write_text("another model")
    monkeypatch.chdir(here)
    assert cached_snapshot(REPO) is None
    folder = fetch(plan_download(REPO))
    assert (folder / "config.json").read_bytes() == CONFIG


def test_a_disk_without_links_holds_the_files_themselves(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.symlink", no_links)
    folder = fetch(plan_download(REPO))
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert cached_snapshot(REPO) == folder
    assert plan_download(REPO).missing_bytes == 0
    assert verify(folder) == 3
