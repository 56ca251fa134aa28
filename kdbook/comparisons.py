"""Methods of one exhibit against each other: gains over a column, margins over rivals."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from kdbook.claims import estimate, interval, paper_cells
from kdbook.exhibits import Exhibit


def gains(exhibit: Exhibit, over: str) -> pd.DataFrame:
    """How far every cell lies below that of the column ``over`` in its row, as errors gain.

    Index: row, column. Columns: paper, ours, low, high; ours is the mean over seeds of differences
    within a seed, with its 95 % interval.
    """
    cells = dict.fromkeys([*paper_cells(exhibit.name), *exhibit.cells])
    rows = {(row, column): ((row, over), (row, column)) for row, column in cells}
    index = pd.MultiIndex.from_tuples(rows, names=["row", "column"])
    return _differences(exhibit, rows.values(), index)


def row_gains(exhibit: Exhibit, column: str, over: str) -> pd.DataFrame:
    """How far every row's cell of a column lies above that of the row ``over``, as accuracies gain.

    Index: row. Columns as those of ``gains``.
    """
    cells = dict.fromkeys([*paper_cells(exhibit.name), *exhibit.cells])
    rows = [row for row, own in cells if own == column]
    pairs = [((row, column), (over, column)) for row in rows]
    return _differences(exhibit, pairs, pd.Index(rows, name="row"))


def _differences(exhibit: Exhibit, pairs: Iterable[tuple], index: pd.Index) -> pd.DataFrame:
    """The first cell less the second, of each pair."""
    paper, rows = paper_cells(exhibit.name), []
    for pair in pairs:
        one, other = (exhibit.cells.get(cell, {}) for cell in pair)
        ours = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
        printed, than = (paper.get(cell, {}).get(None, np.nan) for cell in pair)
        mean = ours.mean() if len(ours) else np.nan
        rows.append((printed - than, mean, *interval(ours)))
    return pd.DataFrame(rows, index, columns=["paper", "ours", "low", "high"])


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
