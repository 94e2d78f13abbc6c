"""Whether a drafter fits its target, by the drafts that were right: near none means that the pair is wired wrongly."""

ENOUGH_DRAFTS = 200  # verified drafts after which a verdict is given
LEAST_RATE = 0.05  # published pairs stay far above this on any text
FEW = 4  # drafts below which nothing is said
USUAL = 0.7  # what published pairs have on most texts
NEW_WEIGHT = 0.01  # of a draft in what is usual: many texts, for the next may be of any kind
CLEARED_BY = 5  # drafts that were right since a warning, with which it is taken back


class Fit:
    """Counts a pair's drafts over all its requests; `warning` is set while hardly any of the last ones were right.

    The rate is that of drafts whose predecessors in the round were right too: what comes after a wrong draft is never
    right, so counting it would blame a sound drafter for a large number of drafts. `usual` is how often a first draft
    was right of late, over all texts: what the next request starts from.
    """

    def __init__(self) -> None:
        self.warning: str | None = None
        self.usual = USUAL
        self._restart()

    def observe(self, verified: int, accepted: list[int]) -> None:
        """One round: drafts verified in each row, drafts accepted per active row."""
        for n in accepted:
            self._drafts += verified
            self._tried += min(n + 1, verified)
            self._right += min(n, verified)
            if verified:
                self.usual += NEW_WEIGHT * ((n > 0) - self.usual)
        if self._drafts >= ENOUGH_DRAFTS:
            self.warning = self._verdict()
            self._restart()
        elif self.warning is not None and self._right >= CLEARED_BY:
            self.warning = None

    @property
    def hint(self) -> str:
        """What can be said before there is a verdict, "" where nothing is strange."""
        if self._tried < FEW or self._right >= LEAST_RATE * self._tried:
            return ""
        return f"; {self._right} of {self._drafts} drafts were right so far"

    def _verdict(self) -> str | None:
        if self._right >= LEAST_RATE * self._tried:
            return None
        return (
            f"only {self._right} of {self._drafts} drafts were right: the drafter was probably not made for this "
            "model, or the model was fine-tuned far from the one it was made for; use the model's own assistant, "
            "or none"
        )

    def _restart(self) -> None:
        self._drafts = self._tried = self._right = 0
