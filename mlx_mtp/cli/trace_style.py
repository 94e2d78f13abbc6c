"""How tokens look by where they came from, in the trace of a chat and in a race."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_mtp.reply import Origin

# Told apart without colours too: kept drafts are bold, corrections underlined, extra tokens italic.
STYLES: "dict[Origin, str]" = {
    "prefill": "",
    "plain": "",
    "accepted": "bold green",
    "recovered": "underline yellow",
    "bonus": "italic cyan",
}
LEGEND: "tuple[tuple[Origin, str], ...]" = (
    ("accepted", "accepted draft"),
    ("recovered", "the target's own at a wrong draft"),
    ("bonus", "the target's extra token"),
)
