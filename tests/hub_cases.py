"""What the tests of downloads that go wrong share: a small model on a hub, and how a refusal is looked at."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hub_stand_in import HubStandIn
from mlx_mtp import download, transfer
from mlx_mtp.download import cached_snapshot, fetch, plan_download
from mlx_mtp.errors import HubError, MtpError

REPO = "org/model"
WEIGHTS = "model.safetensors"
CONFIG = b'{"model_type": "gemma4"}'
SIZE = 500_000
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


@contextlib.contextmanager
def small_hub(home: Path) -> Iterator[HubStandIn]:
    """A hub with one model of two files, used by this process with a cache in `home`; no pauses between attempts."""
    repos = {REPO: {"config.json": CONFIG, WEIGHTS: bytes(range(250)) * (SIZE // 250)}}
    with impatient(), HubStandIn(repos) as hub, hub.in_process(home):
        yield hub


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """As many attempts as always, without the pauses between them."""
    no_pauses = mock.patch.object(transfer, "PAUSES", (0.0,) * len(transfer.PAUSES))
    with no_pauses, mock.patch.object(download, "ASK_PAUSES", (0.0,) * len(download.ASK_PAUSES)):
        yield


def refusal(kind: type[MtpError] = HubError, **options: Any) -> str:
    """The message with which planning or fetching REPO is refused; nothing of it counts as cached afterwards."""
    with pytest.raises(kind) as refused:
        fetch(plan_download(REPO, **options), token=options.get("token"))
    assert type(refused.value) is kind
    assert cached_snapshot(REPO) is None
    return str(refused.value)


def partials(home: Path) -> list[int]:
    """The sizes of the files in blobs/ that are unfinished."""
    return [path.stat().st_size for path in home.glob("hub/models--*/blobs/*.incomplete")]


def sharded(names: list[str]) -> dict[str, bytes]:
    """A model whose index names all SHARDS, with only those in `names`."""
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}}
    files = {"config.json": CONFIG, INDEX: json.dumps(index).encode()}
    return files | {name: name.encode() * 400 for name in names}
