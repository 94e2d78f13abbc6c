"""A layer taken apart into its arrays and the rest, so that layers of one sort can share a traced function."""

import copy
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import TypeVar

import mlx.core as mx

Part = TypeVar("Part")


def arrays_of(part: object) -> list[mx.array]:
    """All arrays in a tree of dataclasses, in the order of their fields."""
    if isinstance(part, mx.array):
        return [part]
    return [array for field in _fields(part) for array in arrays_of(getattr(part, field))]


def with_arrays(part: Part, arrays: Iterator[mx.array]) -> Part:
    """The same tree around other arrays, taken in that order."""
    if isinstance(part, mx.array):
        return next(arrays)  # type: ignore[return-value]
    names = _fields(part)
    if not names:
        return part
    whole = copy.copy(part)  # not made anew: what a part works out of its arrays is among its fields
    for name in names:
        object.__setattr__(whole, name, with_arrays(getattr(part, name), arrays))
    return whole


def likeness(part: object) -> Hashable:
    """Equal for two trees that differ in the values of their arrays only; what is no dataclass must be hashable."""
    if isinstance(part, mx.array):
        return (part.dtype, part.shape)
    names = _fields(part)
    if not names:
        return part
    return (type(part), *(likeness(getattr(part, name)) for name in names))


def _fields(part: object) -> tuple[str, ...]:
    return tuple(field.name for field in fields(part)) if is_dataclass(part) else ()
