"""How many floats a thread accumulates into, by declaration."""

from .signature import Signature


def accumulators(source: Signature) -> int:
    raise NotImplementedError("accumulators are not counted yet")
