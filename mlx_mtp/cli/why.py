"""`/why`: what MTP does with this text and why, in the figures that the policy decides by."""

from typing import TYPE_CHECKING

from mlx_mtp.cli.layout import table

if TYPE_CHECKING:
    from mlx_mtp.policy import Policy
    from mlx_mtp.stats import Stats


def explanation(policy: "Policy", stats: "Stats | None", columns: int | None) -> str:
    """What is played, the expected gain of each number of drafts, and where the figures come from."""
    from mlx_mtp.policy import CANDIDATES, AutoPolicy

    if not isinstance(policy, AutoPolicy):
        return (
            policy.reason
            or f"a fixed number of drafts is played; /mtp auto lets the program choose{_played(stats)}"
        )
    measured = policy.times.measured()
    rows = []
    for k in CANDIDATES[1:]:
        cost, tokens = policy.times.ratio(k), policy.expected_tokens(k)
        source = "measured" if k in measured else "expected"
        rows.append((str(k), f"{tokens:.2f}", f"{cost:.2f}", source, f"×{policy.gain(k):.2f}"))
    header = ("drafts", "tokens a round", "cost in plain rounds", "cost is", "gain")
    first = policy.reason or "drafting: it pays on this text"
    return f"{first}{_played(stats)}\n{table(header, rows, columns, title=0)}"


def _played(stats: "Stats | None") -> str:
    if stats is None or not stats.rounds:
        return ""
    counts = {k: stats.num_draft_tokens.count(k) for k in sorted(set(stats.num_draft_tokens))}
    return "; the last reply had " + ", ".join(f"{n} rounds with {k}" for k, n in counts.items()) + " drafts"
