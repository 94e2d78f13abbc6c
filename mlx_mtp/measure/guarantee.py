"""Whether MTP kept its word: never slower than the faster plain decoding, and not a token other.

Slower means: the whole time is more than 1.02 times that of the faster of our plain decoding and mlx-lm's, on the same
text, beyond noise. What is too noisy to tell is not shown, and does not pass.
"""

from dataclasses import dataclass
from typing import Literal

from mlx_mtp.measure.plan import AUTO, PEER, PLAIN, Case
from mlx_mtp.measure.results import Document
from mlx_mtp.measure.summary import Row, rows_of, skipped_of

NEVER_SLOWER = 1.02


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check of one case said."""

    case: Case
    arm: str
    check: Literal["time", "text", "played"]
    holds: bool
    said: str


def check_guarantee(document: Document) -> list[Finding]:
    """Every case: `auto` against the faster plain arm, and the text of every arm with drafts."""
    rows = rows_of(document)
    findings = [
        Finding(case, "", "played", False, f"not played: {why}") for case, why in skipped_of(document)
    ]
    skipped = {finding.case for finding in findings}
    for row in rows:
        if row.case in skipped or row.arm in (PLAIN, PEER):
            continue
        if row.arm == AUTO:
            findings.append(_time(row))
        findings.append(_text(row))
    if not any(finding.check == "time" for finding in findings):
        findings += [
            Finding(case, AUTO, "time", False, "auto was not measured")
            for case in dict.fromkeys(row.case for row in rows if row.case not in skipped)
        ]
    return findings


def keeps_its_word(findings: list[Finding], document: Document) -> bool:
    """Whether the run is complete and every check of it holds; nothing measured is no yes."""
    return bool(findings) and bool(document["complete"]) and all(finding.holds for finding in findings)


def _time(row: Row) -> Finding:
    def found(holds: bool, said: str) -> Finding:
        return Finding(row.case, row.arm, "time", holds, said)

    if row.trouble is not None or row.total is None:
        return found(False, f"not shown: {row.trouble or 'no plain arm to compare with'}")
    ratio = row.total
    if not row.is_clean:
        return found(False, f"not shown: the machine was not at rest ({_counted(row)})")
    figures = f"{ratio.value:.3f} x the time of {row.faster_plain} ({ratio.low:.3f} to {ratio.high:.3f})"
    if ratio.low > NEVER_SLOWER:
        return found(False, f"SLOWER: {figures}, and {NEVER_SLOWER} x is the most")
    if ratio.high <= NEVER_SLOWER:
        return found(True, figures)
    return found(False, f"not shown, too noisy to tell: {figures}")


def _counted(row: Row) -> str:
    return "of its samples " + ", ".join(f"{count} {mark}" for mark, count in row.marked.items())


def _text(row: Row) -> Finding:
    verdict = row.verdict
    if verdict is None:
        return Finding(
            row.case, row.arm, "text", False, f"text not compared: {row.trouble or 'not measured yet'}"
        )
    if verdict["parted"]:
        first = verdict["first"][0]
        said = (
            f"OTHER TEXT: {verdict['parted']} of {verdict['texts']} texts part, {verdict['per_1000']:.2f} in 1000 "
            f"tokens; the first at token {first['index']}: {first['why']}"
        )
        return Finding(row.case, row.arm, "text", False, said)
    if row.unsteady:
        return Finding(row.case, row.arm, "text", False, f"OTHER TEXT in {row.unsteady} of its repeats")
    return Finding(row.case, row.arm, "text", True, f"{verdict['tokens']} tokens the same")
