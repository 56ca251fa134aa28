"""One style for every figure: colour-blind safe, never colour alone, legible in print."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe & Ito's palette, darkest contrasts first; yellow is left out, being unreadable on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK = OKABE_ITO
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# One look after the other, for lines that several panels share.
LOOKS = tuple(
    {"color": c, "ls": line, "marker": m}
    for c, line, m in zip(OKABE_ITO, LINES, MARKERS, strict=True)
)
# How our numbers look beside the paper's, and those of ours that are not like for like.
OURS = {"marker": "o", "color": VERMILION}
OTHER = {"marker": "s", "mfc": "none", "color": GREEN}
# Widths in inches of one and of two columns of a printed page.
COLUMN, PAGE = 3.4, 7.0

STYLE = {
    "axes.prop_cycle": cycler(color=OKABE_ITO, linestyle=LINES, marker=MARKERS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "font.size": 8.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.figsize": (PAGE * 0.62, 2.9),
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "kdlib",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@contextmanager
def style() -> Iterator[None]:
    """The book's style, for the figures made inside."""
    with mpl.rc_context(STYLE):
        yield


def use_style() -> None:
    """The book's style, for the rest of the process; tables show their sentences whole."""
    mpl.rcParams.update(STYLE)
    pd.set_option("display.max_colwidth", None)


def epoch_axis(axes: Axes, label: str = "epoch") -> None:
    """Whole epochs on the x axis."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_axis(axes: Axes, which: str = "y") -> None:
    """A logarithmic axis, x or y, with plain numbers at 1, 2 and 5 of every decade."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def name_lines(axes: Axes) -> None:
    """Write each line's label at its right end instead of a legend, apart from each other."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    low, high = axes.get_ylim()
    step = (high - low) * 0.075
    position = low - step
    for line in sorted(lines, key=lambda line: line.get_ydata()[-1]):
        position = max(line.get_ydata()[-1], position + step)
        axes.annotate(
            line.get_label(),
            (line.get_xdata()[-1], position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )


def draw_gains(
    axes: Axes, gains: pd.DataFrame, copied: Collection[str] = (), other: pd.DataFrame | None = None
) -> None:
    """Gains of several methods, downwards: the paper's, those it copied, ours with intervals.

    Args:
        gains: of ``comparisons``, indexed by method.
        copied: columns that the paper took from elsewhere: hollow diamonds.
        other: the same columns of ours under other circumstances: squares.
    """
    y = range(len(gains))
    faces = ["none" if column in copied else BLUE for column in gains.index]
    axes.scatter(gains.paper, y, marker="D", s=26, c=faces, edgecolors=BLUE)
    for table, mark in ((gains, OURS), (other, OTHER)):
        if table is not None:
            bars = [table.ours - table.low, table.high - table.ours]
            axes.errorbar(table.ours, y, xerr=bars, ls="", lw=1, **mark)
    axes.axvline(0, c=BLACK, lw=0.8, marker="")
    axes.set_xlabel("points of error below the student")
    axes.set_yticks(y, [column.replace("_", "+") for column in gains.index])
    axes.set_ylim(len(gains) - 0.5, -0.5)


def name_gains(figure: Figure, copied: str = "", other: str = "") -> None:
    """The legend of ``draw_gains``, with words for what the paper copied and what is other."""
    paper = {"marker": "D", "mfc": BLUE, "mec": BLUE}
    marks = {"paper": paper, copied: paper | {"mfc": "none"}, "ours": OURS, other: OTHER}
    handles = [Line2D([], [], ls="", label=label, **mark) for label, mark in marks.items() if label]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)


def name_points(axes: Axes, x: pd.Series, y: pd.Series, colors: Iterable[str]) -> None:
    """Write each point's name to the right of the axes, in the order of y, with a line to it."""
    order = y.sort_values().index
    places = np.linspace(0.02, 0.98, len(order)) if len(order) > 1 else [0.5]
    colored = dict(zip(y.index, colors, strict=True))
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            name,
            (x[name], y[name]),
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            fontsize=6,
            color=colored[name],
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.3,
                "color": colored[name],
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def stamp(figure: Figure, text: str) -> None:
    """A word across the figure that goes wherever the figure goes."""
    figure.text(
        0.5, 0.5, text, ha="center", va="center", rotation=20, fontsize=22, color="#000000",
        alpha=0.10, zorder=10,
    )  # fmt: skip
