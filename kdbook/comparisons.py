"""Comparisons of the methods of one exhibit: gains over a baseline, margins over the best rival."""

from collections.abc import Iterable
from itertools import permutations

import numpy as np
import pandas as pd
from scipy import stats

from kdbook.contrasts import estimate_gaps
from kdbook.estimates import estimate
from kdbook.exhibits import Exhibit
from kdbook.published import Cell, paper_cells


def gains(exhibit: Exhibit, over: str) -> pd.DataFrame:
    """The error of the column ``over`` minus the error of each cell in the same row.

    Index: row, column. Columns: paper, ours, low, high. ``ours`` is the mean over seeds of the
    differences within a seed; ``low`` and ``high`` are its one-sided 95 % bounds, by the rule of
    the verdicts: those of a claim on this gap alone.
    """
    cells = dict.fromkeys([*paper_cells(exhibit.name), *exhibit.cells])
    rows = {(row, column): ((row, over), (row, column)) for row, column in cells}
    index = pd.MultiIndex.from_tuples(rows, names=["row", "column"])
    return _differences(exhibit, rows.values(), index)


def row_gains(exhibit: Exhibit, column: str, over: str) -> pd.DataFrame:
    """The value of each row minus the value of the row ``over``, in one column.

    Index: row. Columns as in ``gains``.
    """
    cells = dict.fromkeys([*paper_cells(exhibit.name), *exhibit.cells])
    rows = [row for row, own in cells if own == column]
    pairs = [((row, column), (over, column)) for row in rows]
    return _differences(exhibit, pairs, pd.Index(rows, name="row"))


def _differences(
    exhibit: Exhibit, pairs: Iterable[tuple[Cell, Cell]], index: pd.Index
) -> pd.DataFrame:
    """The first cell minus the second cell of each pair."""
    paper, rows = paper_cells(exhibit.name), []
    for one, other in pairs:
        if one == other:
            zeros = [0.0 if one in cells else np.nan for cells in (paper, exhibit.cells)]
            rows.append((*zeros, np.nan, np.nan))
            continue
        contrast = {" @ ".join(one): 1, " @ ".join(other): -1}
        claim = {"kind": "gap", "exhibit": exhibit.name, "contrast": contrast}
        printed, ours = (estimate(claim, cells) for cells in (paper, exhibit.cells))
        numbers = (ours.estimate, ours.low, ours.high) if ours else [np.nan] * 3
        rows.append((printed.estimate if printed else np.nan, *numbers))
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
