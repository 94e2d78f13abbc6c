"""What a launch did: operations always, bytes for each buffer where they were counted."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one buffer: asked for by all threads, each once a threadgroup, each once a launch."""

    requested: int
    by_threadgroup: int
    distinct: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.requested + other.requested,
            self.by_threadgroup + other.by_threadgroup,
            self.distinct + other.distinct,
        )


class Uncounted(dict[str, Traffic]):
    """In place of bytes that nobody counted: asking for them is an error."""

    def __missing__(self, name: str) -> Traffic:
        raise LookupError(f"bytes of {name} were not counted: use metal.settings(count=True) or check=True")


@dataclass(slots=True)
class Counts:
    """Summed over launches. Simd and matrix operations count once a simdgroup, barriers once a threadgroup."""

    launches: int = 0
    threadgroups: int = 0
    threads: int = 0
    simd_ops: int = 0
    matrix_ops: int = 0
    barriers: int = 0
    atomics: int = 0
    read: dict[str, Traffic] = field(default_factory=dict)
    written: dict[str, Traffic] = field(default_factory=dict)

    def add(self, other: "Counts") -> None:
        for name in (f.name for f in fields(self)):
            if name in ("read", "written"):
                setattr(self, name, summed(getattr(self, name), getattr(other, name)))
            else:
                setattr(self, name, getattr(self, name) + getattr(other, name))


def summed(a: dict[str, Traffic], b: dict[str, Traffic]) -> dict[str, Traffic]:
    """Once one launch was not counted, the sum is unknown."""
    if isinstance(a, Uncounted) or isinstance(b, Uncounted):
        return Uncounted()
    return {name: a.get(name, Traffic(0, 0, 0)) + b.get(name, Traffic(0, 0, 0)) for name in {**a, **b}}
