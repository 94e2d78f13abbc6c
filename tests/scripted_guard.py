"""A guard that says what a test wants, in the order in which it is asked."""

from collections.abc import Callable, Iterable

from mlx_mtp.pressure import Guard, Relief


class ScriptedGuard(Guard):
    """Answers `reliefs` one after another, then "none"; admits what `admits` says (by default everything)."""

    def __init__(self, reliefs: Iterable[Relief] = (), *, admits: Callable[[int], None] | None = None):
        super().__init__()
        self._reliefs = iter(reliefs)
        self._admits = admits
        self.asked = 0
        self.needed: list[int] = []

    def relief(self) -> Relief:
        self.asked += 1
        return next(self._reliefs, "none")

    def admit(self, needed_bytes: int) -> None:
        self.needed.append(needed_bytes)
        if self._admits is not None:
            self._admits(needed_bytes)
