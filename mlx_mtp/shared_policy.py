"""The number of drafts of rounds that several requests share, each of which may have asked for another."""

from collections.abc import Callable, Sequence
from typing import Any

from mlx_mtp.pair import Pair
from mlx_mtp.policy import Plan, Policy


class SharedPolicy:
    """All rows of a round have as many drafts: the smallest number that a running request asked for, if any did.

    Where all are "auto" that is what pays for them together. The text is the same for every number.
    """

    def __init__(self, pair: Pair, asked: Callable[[], Sequence[int | str]]):
        self.parked = False
        self.reason: str | None = None
        self._pair, self._asked = pair, asked
        self._policies: dict[int | str, Policy] = {}
        self._current = self._of("auto")
        self._is_time_known = True

    def forget_time(self) -> None:
        """The next round's time is not its own: something else was computed meanwhile."""
        self._is_time_known = False

    def plan(self, pending: int) -> Plan:
        numbers = [asked for asked in self._asked() if isinstance(asked, int)]
        self._current = self._of(min(numbers, default="auto"))
        plan = self._current.plan(pending)
        self._show()
        return plan

    def observe(self, verified: int, accepted: list[int], seconds: float | None, **seen: Any) -> None:
        """As of the policy that planned the round, which is not told a time that is not the round's own."""
        own = seconds if self._is_time_known else None
        self._is_time_known = True
        self._current.observe(verified, accepted, own, **seen)
        self._show()

    def _of(self, asked: int | str) -> Policy:
        if asked not in self._policies:
            self._policies[asked] = self._pair.policy(asked)
        return self._policies[asked]

    def _show(self) -> None:
        self.parked, self.reason = self._current.parked, self._current.reason
