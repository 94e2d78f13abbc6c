"""Faults planted in Metal source."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_mtp.kernels import launch
from mlx_mtp.kernels.source import metal_source


def spoilt(text: str, *changes: tuple[str, str]) -> str:
    """`text` with each sound place, which must be there once, made faulty."""
    for sound, faulty in changes:
        assert text.count(sound) == 1, "the source has changed: the fault has no place in it any more"
        text = text.replace(sound, faulty)
    return text


@contextmanager
def planted_in(file: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Kernels are made from this source file with (sound, faulty) changes."""
    faulty = spoilt(metal_source(file), *changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "metal_source", lambda own: faulty if own == file else metal_source(own))
        with made_anew():
            yield


@contextmanager
def made_anew() -> Iterator[None]:
    """No kernel made before is used inside, nor one made inside later."""
    launch._made.cache_clear()
    try:
        yield
    finally:
        launch._made.cache_clear()
