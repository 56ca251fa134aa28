"""Comparisons of the methods of one exhibit: gains over a baseline, margins over the best rival."""

from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pandas as pd
from scipy import stats

from kdbook.contrasts import estimate_gaps, interval
from kdbook.estimates import estimate
from kdbook.exhibits import Exhibit
from kdbook.published import paper_cells


def gains(exhibit: Exhibit, over: str) -> pd.DataFrame:
    """The error of the column ``over`` minus the error of each cell in the same row.

    Index: row, column. Columns: paper, ours, low, high. ``ours`` is the mean over seeds of the
    differences within a seed; ``low`` and ``high`` are its 95 % interval.
    """
    cells = dict.fromkeys([*paper_cells(exhibit.name), *exhibit.cells])
    rows = {(row, column): ((row, over), (row, column)) for row, column in cells}
    index = pd.MultiIndex.from_tuples(rows, names=["row", "column"])
    return _differences(exhibit, rows.values(), index)


def row_gains(exhibit: Exhibit, column: str, over: str) -> pd.DataFrame:
    """The accuracy of each row minus the accuracy of the row ``over``, in one column.

    Index: row. Columns as in ``gains``.
    """
    cells = dict.fromkeys([*paper_cells(exhibit.name), *exhibit.cells])
    rows = [row for row, own in cells if own == column]
    pairs = [((row, column), (over, column)) for row in rows]
    return _differences(exhibit, pairs, pd.Index(rows, name="row"))


def _differences(exhibit: Exhibit, pairs: Iterable[tuple], index: pd.Index) -> pd.DataFrame:
    """The first cell minus the second cell of each pair."""
    paper, rows = paper_cells(exhibit.name), []
    for pair in pairs:
        one, other = (exhibit.cells.get(cell, {}) for cell in pair)
        ours = np.array([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])
        printed, than = (paper.get(cell, {}).get(None, np.nan) for cell in pair)
        mean = ours.mean() if len(ours) else np.nan
        rows.append((printed - than, mean, *interval(ours)))
    return pd.DataFrame(rows, index, columns=["paper", "ours", "low", "high"])


def chances(exhibit: Exhibit, rows: Iterable[str], column: str) -> pd.DataFrame:
    """The probability that each row is better than each column, for rows of one column of cells.

    It is that of a positive mean difference over all possible seeds, given the differences at our
    seeds: Student's t around their mean, with the spread pooled over the table (``contrasts``),
    and nothing assumed beforehand. NaN where a cell is missing, or where there is one seed.
    """
    rows = list(rows)
    table = pd.DataFrame(np.nan, rows, rows)
    cells = {(row, column): exhibit.cells.get((row, column), {}) for row in rows}
    for row, other in permutations(rows, 2):
        gaps = estimate_gaps([{(row, column): 1.0, (other, column): -1.0}], cells)
        if gaps:
            table.loc[row, other] = stats.t.cdf(gaps.mean / gaps.error, gaps.df)[0]
    return table


def margin(
    exhibit: Exhibit, row: str, column: str, rivals: Iterable[str], against: str | None = None
) -> dict[str, str]:
    """The error of the best rival minus the error of one cell: ``paper`` and ``ours``, as text.

    ``ours`` has the one-sided 95 % bounds of a claim of the kind ``best``.

    Args:
        rivals: columns of the rivals.
        against: row of the rivals; None for the same row.
    """
    among = [f"{against or row} @ {rival}" for rival in rivals]
    claim = {"kind": "best", "sense": "min", "column": column, "cell": row, "among": among}
    claim["exhibit"] = exhibit.name
    found = {
        "paper": estimate(claim, paper_cells(exhibit.name)),
        "ours": estimate(claim, exhibit.cells),
    }
    return {
        source: _with_interval(e.estimate, e.low, e.high) if e else "–"
        for source, e in found.items()
    }


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f}" + ("" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")
