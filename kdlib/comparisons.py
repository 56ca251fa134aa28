"""Methods of one exhibit against each other: gains over a column, margins over rivals."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from kdlib.claims import estimate, interval, paper_cells
from kdlib.exhibits import Exhibit


def gains(exhibit: Exhibit, over: str) -> pd.DataFrame:
    """How far every cell lies below that of the column ``over`` in its row, as errors gain.

    Index: row, column. Columns: paper, ours, low, high; ours is the mean over seeds of differences
    within a seed, with its 95 % interval.
    """
    paper, rows = paper_cells(exhibit.name), {}
    for row, column in dict.fromkeys([*paper, *exhibit.cells]):
        base, cell = (exhibit.cells.get((row, name), {}) for name in (over, column))
        ours = np.array([base[seed] - cell[seed] for seed in sorted(base.keys() & cell.keys())])
        base, cell = (paper.get((row, name), {}).get(None, np.nan) for name in (over, column))
        mean = ours.mean() if len(ours) else np.nan
        rows[row, column] = (base - cell, mean, *interval(ours))
    index = pd.MultiIndex.from_tuples(rows, names=["row", "column"])
    return pd.DataFrame(rows.values(), index, columns=["paper", "ours", "low", "high"])


def margin(
    exhibit: Exhibit, row: str, column: str, rivals: Iterable[str], against: str | None = None
) -> dict[str, str]:
    """By how much an error is below that of its best rival: ``paper`` and ``ours``, as text.

    Ours with its 95 % interval, widened for the number of rivals as a claim "best of" is.

    Args:
        rivals: columns.
        against: the row of the rivals; None for the same.
    """
    among = [f"{against or row} @ {rival}" for rival in rivals]
    claim = {"kind": "best", "sense": "min", "column": column, "cell": row, "among": among}
    found = {
        "paper": estimate(claim, paper_cells(exhibit.name)),
        "ours": estimate(claim, exhibit.cells),
    }
    return {source: _worded(*result[:3]) if result else "–" for source, result in found.items()}


def _worded(value: float, low: float, high: float) -> str:
    return f"{value:+.2f}" + ("" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")
