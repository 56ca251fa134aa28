"""The forest plot: our numbers with their intervals beside the paper's, one line for each claim."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdbook import figures

VERDICTS = {
    "reproduced": figures.GREEN,
    "supported": figures.GREEN,
    "holds here": figures.GREEN,
    "inconclusive": figures.ORANGE,
    "unresolved here": figures.ORANGE,
    "differs": figures.VERMILION,
    "contradicted": figures.VERMILION,
    "reverses here": figures.VERMILION,
    "not comparable": figures.SKY,
    "no verdict": "#999999",
    "not run": "#999999",
}
MARKERS = {figures.GREEN: "o", figures.VERMILION: "X"}
# The panels of the forest plot: title, and the range of estimates that is drawn, in tolerances
# (values) or published gaps (gaps).
PANELS = {
    "value": ("values: difference from the paper ÷ tolerance", (-8, 8)),
    "gap": ("claims: our gap ÷ the paper's gap", (-3, 4)),
}


def forest(table: pd.DataFrame) -> Figure:
    """Estimates with their intervals: values beside the paper's, gaps as shares of the paper's.

    Left, 0 is the paper's number and the grey band is the tolerance. Right, 1 is the paper's gap
    and 0 is no gap. A triangle at the border is an estimate outside the panel. The plot leaves out
    claims without a verdict, claims of equality, values that are not comparable, and claims without
    a number in the paper. A panel without claims is left out.
    """
    is_value = table.kind.isin(["value", "gain"])  # estimates are differences from the paper
    incomparable = table.verdict.isin(["not run", "not comparable", "no verdict"])
    scale = table.paper.abs().mask(is_value, table.tolerance)
    drawn = table.assign(scale=scale, is_value=is_value)[
        ~incomparable & (scale > 0) & (table.kind != "equal")
    ]
    parts = {
        "value": drawn[drawn.is_value],
        "gap": drawn[~drawn.is_value],
    }
    parts = {kind: part for kind, part in parts.items() if len(part)} or parts
    height = 0.9 + 0.17 * max(map(len, parts.values()))
    size = (1 + 5 * len(parts), min(max(height, 2.5), 60))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (kind, part) in zip(panels, parts.items(), strict=True):
        _draw_panel(axes, kind, part)
    return figure


def _draw_panel(axes: Axes, kind: str, part: pd.DataFrame) -> None:
    title, (low, high) = PANELS[kind]
    axes.axvline(0, color="#555555", lw=0.8)
    if kind == "value":
        axes.axvspan(-1, 1, color="#000000", alpha=0.07, lw=0)
    else:
        axes.axvline(1, color="#555555", lw=0.8, ls=":")
    for y, claim in enumerate(part.itertuples()):
        x, color = claim.estimate / claim.scale, VERDICTS[claim.verdict]
        if np.isfinite(claim.low):
            bounds = np.clip([claim.low / claim.scale, claim.high / claim.scale], low, high)
            axes.plot(bounds, [y, y], color=color, lw=1.6, ls="-", marker="")
        marker = "<" if x < low else ">" if x > high else MARKERS.get(color, "D")
        axes.plot(np.clip(x, low, high), y, marker=marker, color=color, ms=5)
    if kind == "value" and len(part):
        high = np.clip(1.3 * (part.estimate / part.scale).abs().max(), 2, high)
        low = -high
    axes.set(xlim=(low * 1.05, high * 1.05), ylim=(len(part) - 0.4, -0.6), title=title)
    if part.empty:
        words = "nothing to draw: no claim here\nhas a verdict and a printed number"
        box = {"facecolor": "white", "lw": 0}
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", bbox=box)
    names = [
        f"{c.exhibit}  {c.id.removeprefix(c.exhibit + '/').removeprefix('value-')}"
        for c in part.itertuples()
    ]
    axes.set_yticks(range(len(part)), names, fontsize=6.5)
    axes.grid(axis="y", visible=False)
