"""One style for every figure: safe for colour-blind readers, and legible in print."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# The palette of Okabe and Ito without yellow, which is hard to read on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK = OKABE_ITO
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# A line differs from the others in colour, dashes and marker.
LOOKS = tuple(
    {"color": c, "ls": line, "marker": m}
    for c, line, m in zip(OKABE_ITO, LINES, MARKERS, strict=True)
)
# Our numbers, and our numbers under another recipe than the paper's.
OURS = {"marker": "o", "color": VERMILION}
OTHER = {"marker": "s", "mfc": "none", "color": GREEN}
# Widths in inches of one column and of two columns of a printed page.
COLUMN, PAGE = 3.4, 7.0

# The field's names, for titles, axes and legends. Tables and claims keep the short keys.
METHODS = {
    "student": "trained from scratch",
    "softmax": "trained from scratch",
    "scratch": "trained from scratch",
    "kd": "KD",
    "kd-x4": "KD×4",
    "kd-equal": "KD, epochs of RCO",
    "rco": "RCO",
    "at": "AT",
    "ft": "FT",
    "stc": "STC",
    "none": "no penalty",
    "l1": "L1",
    "l2": "L2",
    "sparse": "sparse recoding",
}

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
    """Use the book's style for the figures of this block."""
    with mpl.rc_context(STYLE):
        yield


def use_style() -> None:
    """Use the book's style for all later figures. Tables show long text without a cut."""
    mpl.rcParams.update(STYLE)
    pd.set_option("display.max_colwidth", None)


def method_name(key: str) -> str:
    """The field's name of a row or column: ``at_kd`` is "AT+KD", ``l1`` is "L1"."""
    method, *details = key.split(", ")
    name = "+".join(METHODS.get(part, part) for part in method.split("_"))
    return ", ".join([name, *details]).replace(" x", " ×")


def epoch_axis(axes: Axes, label: str = "epoch") -> None:
    """Label the x axis, with ticks at whole epochs only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_axis(axes: Axes, which: str = "y") -> None:
    """Make the x or y axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def name_lines(axes: Axes) -> None:
    """Write the label of each line at its right end, without overlap, instead of a legend."""
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


def draw_mean(axes: Axes, table: pd.DataFrame, x: str, y: str, label: str, look: Mapping) -> None:
    """Draw the mean over seeds as a line, and a band from the smallest seed to the largest.

    Args:
        table: one row for each seed and each value of ``x``.
        look: colour, dashes and marker, such as one of ``LOOKS``.
    """
    import seaborn  # almost a second, for two figures of the book

    look = {"mec": look["color"], **look}  # the default of seaborn is a white edge
    band = {"errorbar": ("pi", 100), "err_kws": {"alpha": 0.15, "lw": 0}}
    seaborn.lineplot(table, x=x, y=y, label=label, ax=axes, legend=False, **band, **look)


def draw_gains(
    axes: Axes, gains: pd.DataFrame, copied: Collection[str] = (), other: pd.DataFrame | None = None
) -> None:
    """Gains of several methods, one below the other: the paper's, and ours with intervals.

    Args:
        gains: a table of ``comparisons``, indexed by method.
        copied: methods whose numbers the paper copied from other papers: hollow diamonds.
        other: our gains under another recipe, the same columns as ``gains``: squares.
    """
    y = range(len(gains))
    faces = ["none" if method in copied else BLUE for method in gains.index]
    axes.scatter(gains.paper, y, marker="D", s=26, c=faces, edgecolors=BLUE)
    for table, mark in ((gains, OURS), (other, OTHER)):
        if table is not None:
            bars = [table.ours - table.low, table.high - table.ours]
            axes.errorbar(table.ours, y, xerr=bars, ls="", lw=1, **mark)
    axes.axvline(0, c=BLACK, lw=0.8, marker="")
    axes.set_xlabel("test error below the student's, points")
    axes.set_yticks(y, [method_name(method) for method in gains.index])
    axes.set_ylim(len(gains) - 0.5, -0.5)


def draw_chances(axes: Axes, table: pd.DataFrame) -> None:
    """A matrix of ``comparisons.chances``: probabilities in %, from one colour to another."""
    axes.imshow(table, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto")
    for (row, column), p in np.ndenumerate(table.to_numpy()):
        if np.isfinite(p):
            dark = abs(p - 0.5) > 0.35
            text = f"{100 * p:.0f}"
            look = {"ha": "center", "va": "center", "fontsize": 5.5}
            axes.text(column, row, text, color="white" if dark else BLACK, **look)
    axes.set_xticks(range(len(table.columns)), table.columns, rotation=90, fontsize=6)
    axes.set_yticks(range(len(table)), table.index, fontsize=6)
    axes.grid(False)


def break_axis(axes: Axes, gains: pd.DataFrame) -> None:
    """End the x axis of ``draw_gains`` near the paper's gains; write what lies beyond as numbers.

    Near is within twice the paper's range, which includes 0.
    """
    low, high = min(0, gains.paper.min()), max(0, gains.paper.max())
    room = 2 * (high - low)
    ours = gains.ours.dropna()
    near = ours.between(low - room, high + room)
    if near.all():
        return
    shown = [low, high, *ours[near]]
    space = 0.25 * (max(shown) - min(shown))
    axes.set_xlim(min(shown) - space, max(shown) + space)
    for method, gain in ours[~near].items():
        left = gain < low
        axes.annotate(
            f"◂ {gain:+.1f}" if left else f"{gain:+.1f} ▸",
            (0.01 if left else 0.99, gains.index.get_loc(method)),
            xycoords=("axes fraction", "data"),
            ha="left" if left else "right",
            va="center",
            fontsize=7,
            color=OURS["color"],
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )


def name_gains(figure: Figure, copied: str = "", other: str = "") -> None:
    """The legend of ``draw_gains``, with labels for ``copied`` and ``other`` if they are drawn."""
    paper = {"marker": "D", "mfc": BLUE, "mec": BLUE}
    marks = {"paper": paper, copied: paper | {"mfc": "none"}, "ours": OURS, other: OTHER}
    handles = [Line2D([], [], ls="", label=label, **mark) for label, mark in marks.items() if label]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)


def name_points(axes: Axes, x: pd.Series, y: pd.Series, colors: Iterable[str]) -> None:
    """Write the name of each point to the right of the axes, in the order of y, with a line."""
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
    """Write a text above all axes, with a frame, so that every copy of the figure has the text."""
    strip = 0.2 / figure.get_figheight()
    if engine := figure.get_layout_engine():
        engine.set(rect=(0, 0, 1, 1 - strip))
    # At the left: the layout does not move a legend that stands above the axes.
    place = {"ha": "left", "va": "center", "fontsize": 6}
    figure.text(0.01, 1 - strip / 2, text, color=VERMILION, weight="bold", **place)
    figure.patch.set(edgecolor=VERMILION, linewidth=2)
