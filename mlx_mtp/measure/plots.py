"""Three pictures of a run: speed-up by workload, acceptance by position, what a round costs by its drafts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_mtp.errors import ParameterError, StorageError
from mlx_mtp.measure.plan import PLAIN
from mlx_mtp.measure.results import Document
from mlx_mtp.measure.summary import Row, rows_of
from mlx_mtp.measure.tables import machine_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#7a5c00")
WIDTH, PANEL = 9.0, 3.6  # inches
PALE = 0.4  # of what is too noisy to pass a check


def check_plot(path: Path) -> None:
    """Refuse before anything is measured: another kind of file, or no matplotlib."""
    if path.suffix.lower() not in FORMATS:
        raise ParameterError(f"--plot writes {' or '.join(FORMATS)}, got {path.name!r}; choose such a name")
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ParameterError(
            "--plot needs matplotlib, which is not installed; run: pip install 'mlx-mtp[plot]', or leave --plot out"
        )


def write_plots(document: Document, path: Path) -> None:
    """Draw a run into one file. Raises StorageError where it cannot be written."""
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(document) if row.trouble is None]
    figure = Figure(figsize=(WIDTH, 3 * PANEL + 0.6), layout="constrained")
    axes = figure.subplots(3, 1)
    _draw_speedups(axes[0], rows)
    _draw_acceptance(axes[1], rows)
    _draw_costs(axes[2], rows)
    where, _, versions = machine_line(document).partition(", computed by")
    figure.suptitle(f"{where},\ncomputed by{versions}", fontsize=8)
    try:
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=150)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from None


def _draw_speedups(axes: "Axes", rows: Sequence[Row]) -> None:
    """Bars by case, one colour an arm, with 95 % intervals; 1 is our plain decoding."""
    from matplotlib.colors import to_rgba

    shown = [row for row in rows if row.arm != PLAIN and row.speedup is not None]
    arms, cases = list(dict.fromkeys(r.arm for r in shown)), list(dict.fromkeys(r.case for r in shown))
    width = 0.8 / max(len(arms), 1)
    for i, arm in enumerate(arms):
        for row in shown:
            if row.arm != arm or row.speedup is None:
                continue
            at, ratio = cases.index(row.case) + (i - (len(arms) - 1) / 2) * width, row.speedup
            error = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
            colour = to_rgba(_colour(i), PALE if row.is_noisy else 1.0)
            axes.bar(at, ratio.value, width, yerr=error, color=colour, error_kw={"lw": 0.8}, capsize=2)
    # An interval of a few bad samples may reach anywhere; it would press all bars to the ground.
    axes.set_ylim(0, 1.5 * max((row.speedup.value for row in shown if row.speedup), default=1.0))
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_xticks(range(len(cases)), [_named(case, cases) for case in cases], fontsize=7)
    axes.set_ylabel("decode speed over plain")
    axes.set_title("Speed-up by workload, with 95 % intervals (pale: too noisy to tell)", fontsize=10)
    for i, arm in enumerate(arms):
        axes.bar(0, 0, color=_colour(i), label=arm)
    _legend(axes, arms)


def _draw_acceptance(axes: "Axes", rows: Sequence[Row]) -> None:
    """A line a case: the share of drafts kept at each position, of the fixed arm with the most drafts."""
    fixed = [row for row in rows if row.arm.startswith("k=") and row.acceptance_by_position]
    most = max((int(row.arm[2:]) for row in fixed), default=0)
    shown = [row for row in fixed if row.arm == f"k={most}"]
    cases = [row.case for row in shown]
    for i, row in enumerate(shown):
        places = range(1, len(row.acceptance_by_position) + 1)
        axes.plot(
            places, row.acceptance_by_position, "o-", color=_colour(i), label=_named(row.case, cases), ms=4
        )
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(1, most + 1))
    axes.set_xlabel("position of the draft in its round")
    axes.set_ylabel("share kept")
    axes.set_title(f"Acceptance by position, {most} drafts a round", fontsize=10)
    _legend(axes, shown)


def _draw_costs(axes: "Axes", rows: Sequence[Row]) -> None:
    """A line a case: a round's time in plain rounds by its drafts, with the tokens that it gave for comparison."""
    fixed = [row for row in rows if row.arm.startswith("k=") and row.round_cost is not None]
    cases = list(dict.fromkeys(row.case for row in fixed))
    for i, case in enumerate(cases):
        own = sorted((int(row.arm[2:]), row) for row in fixed if row.case == case)
        drafts = [0, *(k for k, _ in own)]
        axes.plot(
            drafts,
            [1.0, *(row.round_cost or 0.0 for _, row in own)],
            "o-",
            color=_colour(i),
            ms=4,
            label=_named(case, cases),
        )
        axes.plot(
            drafts, [1.0, *(row.tokens_per_round or 0.0 for _, row in own)], "x:", color=_colour(i), ms=4
        )
    axes.set_xlabel("drafts a round")
    axes.set_ylabel("plain rounds, or tokens")
    axes.set_title(
        "Cost of a round in plain rounds (line), tokens that it gives (dots): above the line pays",
        fontsize=10,
    )
    axes.set_xticks(sorted({0, *(int(row.arm[2:]) for row in fixed)}))
    _legend(axes, cases)


def _named(case: Any, cases: Sequence[Any]) -> str:
    """Only what tells the cases apart."""
    parts = [case.workload]
    for name in ("sampling", "context", "batch"):
        if len({getattr(other, name) for other in cases}) > 1:
            parts.append(
                {"context": f"{case.context} tok", "batch": f"x{case.batch}"}.get(name, case.sampling)
            )
    return "\n".join(parts) if len(parts) < 3 else f"{parts[0]}\n{' '.join(parts[1:])}"


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _legend(axes: "Axes", shown: Sequence[Any]) -> None:
    if shown:
        axes.legend(fontsize=6, ncols=2 if len(shown) > 5 else 1, loc="best")
    else:
        axes.text(0.5, 0.5, "nothing measured", ha="center", transform=axes.transAxes)
    axes.spines[["top", "right"]].set_visible(False)
