"""What `prove` says: lines for a person, an object for a program, and whether the promise holds."""

from dataclasses import asdict
from typing import Any

from mlx_mtp.against_mlx_lm import Agreement
from mlx_mtp.clean import clean_for_terminal
from mlx_mtp.cli.proof import Compared
from mlx_mtp.exactness import Exactness
from mlx_mtp.exactness_tax import Tax
from mlx_mtp.pair import Pair

SHOWN = 5  # reasons against promise (a); --json has all


class Report:
    """What was found, and whether the promise holds."""

    def __init__(
        self,
        pair: Pair,
        exactness: Exactness,
        tax: Tax,
        prompt_lengths: list[int],
        tokens: int,
        compared: list[Compared],
        agreed: Agreement | None,
    ) -> None:
        self._pair = pair
        self._exactness = exactness
        self._tax = tax
        self._prompt_lengths = prompt_lengths
        self._tokens = tokens
        self._compared = compared
        self._agreed = agreed

    @property
    def holds(self) -> bool:
        """No difference where rows are computed alike, none beyond rounding elsewhere, mlx-lm agrees if asked."""
        parts = [part for compared in self._compared for part in compared.parts]
        same = not parts if self._exactness.holds else not any(c.illegitimate for c in self._compared)
        return same and (self._agreed is None or self._agreed.passes)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "model": self._pair.name,
            "holds": self.holds,
            "promise": self._exactness.promise,
            "exactness": self._exactness.as_json(),
            "exactness_tax": asdict(self._tax),
            "prompt_tokens": self._prompt_lengths,
            "tokens": self._tokens,
            "compared": [asdict(compared) for compared in self._compared],
            "against_mlx_lm": None if self._agreed is None else asdict(self._agreed),
        }

    def as_text(self) -> str:
        window, longest = self._pair.target.text.sliding_window, max(self._prompt_lengths) + self._tokens
        past = "past" if longest > window else "not past"
        lines = [
            f"{self._pair.name}: {len(self._prompt_lengths)} prompts x {self._tokens} tokens, contexts up to "
            f"{longest}, {past} the window of {window}",
            *self._promise_lines(),
            *(self._compared_line(compared) for compared in self._compared),
            *self._flip_lines(),
            *self._agreement_lines(),
            "it holds" if self.holds else "it does NOT hold",
        ]
        return clean_for_terminal("\n".join(lines))

    def _promise_lines(self) -> list[str]:
        """Which promise holds, what stands against the stronger one, and what exactness costs."""
        found = self._exactness
        operations = sum(row.count for row in found.rows)
        if found.holds:
            said = (
                f"all {operations:,} operations of a round compute a row alike in passes of any size here "
                f"({found.backend}): promise (a), bitwise equality"
            )
            return [said, str(self._tax)]
        against = found.why_not()
        lines = [
            f"a row of a target pass depends on the size of the pass here ({found.backend}): promise (b), every token "
            "is drawn from the target's own logits, near ties may fall either way",
            *(f"  {line}" for line in against[:SHOWN]),
        ]
        if len(against) > SHOWN:
            lines.append(f"  and {len(against) - SHOWN} more; --json lists every operation")
        return [*lines, str(self._tax)]

    def _compared_line(self, compared: Compared) -> str:
        same = (
            "all texts equal"
            if not compared.parts
            else f"{len(compared.parts)} of {compared.texts} texts differ"
        )
        return (
            f"{compared.sampling:15} k = {compared.num_draft_tokens!s:5} {compared.tokens:8,} tokens compared equal, "
            f"{compared.tokens_per_round:.2f} a round; {same}"
        )

    def _flip_lines(self) -> list[str]:
        """The first difference of each comparison, and those that rounding cannot explain."""
        lines = []
        for compared in self._compared:
            shown = {part.prompt: part for part in (*compared.parts[:1], *compared.illegitimate[:3])}
            for part in shown.values():
                flip = part.flip
                off, on = (repr(self._text_of(token)) for token in (flip.off_token, flip.on_token))
                verdict = "within rounding" if flip.legitimate else "NOT explained by rounding"
                lines.append(
                    f"  {compared.sampling}, k = {compared.num_draft_tokens}, prompt {part.prompt}, "
                    f"token {flip.index}: {off} off, "
                    f"{on} on; gap {flip.gap:.3g}, largest logit difference {flip.difference:.3g}: {verdict}"
                )
        return lines

    def _text_of(self, token: int) -> str:
        return self._pair.prompt_format.tokenizer.token_text(token)

    def _agreement_lines(self) -> list[str]:
        found = self._agreed
        if found is None:
            return []
        return [
            f"mlx-lm's own model: its best token is ours at {found.agreed:,} of {found.tokens:,} positions "
            f"({100 * found.agreed / found.tokens:.2f} %); largest log-prob gap {found.largest_gap:.3g}, largest "
            f"difference of a log-prob {found.largest_difference:.3g}, mean {found.mean_difference:.2g} "
            f"(allowed {found.tolerance:g}, mean {found.tolerance / 10:g})"
        ]
