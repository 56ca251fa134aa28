"""Gaps between cells, paired by seed: their bounds, and the power to find them.

A contrast is a weighted sum of cells, such as the accuracy of one method minus that of another.
Runs of one seed share their teacher, their initial weights and the order of their images, so the
contrast is computed seed by seed first.

Three seeds say little about a spread. So the spread is pooled over the table (see ``_pooled``), if
the contrast compares cells of one row or of one column. This is a two-way analysis of variance
with one value per cell and the seeds as blocks (Box, Hunter and Hunter 2005, chapter 4).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from kdbook.published import Cell, Cells

CONFIDENCE = 0.95
# Spreads count as different from this level on. A test at 5 % misses a spread that is three times
# as large: with three seeds it has two degrees of freedom.
UNEQUAL = 0.25
DRAWS = 4000  # of simulated experiments, for the power
Contrast = Mapping[Cell, float]


def interval(values: np.ndarray, tests: int = 1) -> tuple[float, float]:
    """Student's t-interval of a mean at 95 %, with Bonferroni's correction for ``tests`` tests.

    Both ends are NaN where there are fewer than two values.
    """
    if len(values) < 2:
        return math.nan, math.nan
    confidence = 1 - (1 - CONFIDENCE) / tests
    quantile = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    margin = quantile * stats.sem(values)
    return values.mean() - margin, values.mean() + margin


RANGES = {"%": (0.0, 100.0), "loss": (0.0, math.inf), "r": (-1.0, 1.0)}


def possible(low: float, high: float, unit: str, difference: bool = False) -> bool:
    """Whether an interval holds only values that a quantity of this unit can have.

    Few seeds with a large spread give an interval that does not: it says nothing and is not shown.

    Args:
        difference: whether the interval is one of a difference of two such quantities.
    """
    least, most = RANGES.get(unit, (-math.inf, math.inf))
    if difference:
        least, most = least - most, most - least
    return least <= low <= high <= most


@dataclass(frozen=True)
class Gaps:
    """Several contrasts of one table, from the same seeds.

    Attributes:
        by_seed: ``[k, n]``, each of k contrasts at each of n seeds.
        error: ``[k]``, the standard error of each contrast's mean. NaN where there is one seed, or
            no spread at all.
        df: ``[k]``, the degrees of freedom of this error.
        correlation: ``[k, k]``, between the means of the contrasts.
    """

    by_seed: np.ndarray
    error: np.ndarray
    df: np.ndarray
    correlation: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.by_seed.mean(1)

    def width(self, tests: int = 1) -> np.ndarray:
        """``[k]``: from each mean to its one-sided 95 % bound, corrected for ``tests`` tests."""
        return stats.t.ppf(1 - (1 - CONFIDENCE) / tests, self.df) * self.error

    def power(self, gaps: Sequence[float], margin: float = 0.0) -> float:
        """The probability that all lower bounds exceed ``margin``, if ``gaps`` were the truth.

        The spread is the one that was seen. NaN where a gap or an error is not known.
        """
        shift = (np.asarray(gaps) - margin) / self.error
        if not np.isfinite(shift).all():
            return math.nan
        random, df = np.random.default_rng(0), self.df.min()
        noise = random.multivariate_normal(np.zeros(len(shift)), self.correlation, DRAWS)
        scale = np.sqrt(random.chisquare(df, (DRAWS, 1)) / df)
        found = (shift + noise) / scale > stats.t.ppf(CONFIDENCE, self.df)
        return float(found.all(1).mean())


def estimate_gaps(
    contrasts: Sequence[Contrast], cells: Cells, comparable: Iterable[str] | None = ()
) -> Gaps | None:
    """The contrasts at all seeds that their cells share.

    None where a cell is missing, or where the cells share no seed.

    Args:
        comparable: columns that hold the same quantity, so that their spread may be pooled; None
            where each contrast keeps its own spread.
    """
    names = list(dict.fromkeys(cell for contrast in contrasts for cell in contrast))
    if not all(cells.get(cell) for cell in names):
        return None
    seeds = _shared_seeds(names, cells)
    if not seeds:
        return None
    values = np.array([_at(cells[cell], seeds) for cell in names])
    weights = np.array([[contrast.get(cell, 0.0) for cell in names] for contrast in contrasts])
    by_seed = weights @ values
    errors = [
        _error(contrast, own, cells, seeds, None if comparable is None else set(comparable))
        for contrast, own in zip(contrasts, by_seed, strict=True)
    ]
    trained = weights[:, [None not in cells[cell] for cell in names]]
    product = trained @ trained.T
    length = np.sqrt(np.diag(product))
    with np.errstate(invalid="ignore"):
        correlation = product / np.outer(length, length)
    return Gaps(by_seed, *np.array(errors).T, correlation)


def _shared_seeds(names: Iterable[Cell], cells: Cells) -> list[int | None]:
    seeded = [set(cells[cell]) for cell in names if None not in cells[cell]]
    return sorted(set.intersection(*seeded)) if seeded else [None]


def _at(values: Mapping[int | None, float], seeds: list[int | None]) -> list[float]:
    return [values.get(seed, values.get(None, math.nan)) for seed in seeds]


def _error(
    contrast: Contrast, by_seed: np.ndarray, cells: Cells, seeds: list, comparable: set[str] | None
) -> tuple[float, float]:
    """The standard error of a contrast's mean, and its degrees of freedom.

    The error comes from the pooled spread. If the contrast itself spreads more than the rest of the
    table (an F-test at 25 %), the error comes from the contrast alone.
    """
    n = len(seeds)
    if n < 2:
        return math.nan, math.nan
    own, own_df = by_seed.var(ddof=1), n - 1
    scale = sum(weight**2 for weight in contrast.values())
    if comparable is not None and (pooled := _pooled(contrast, cells, seeds, comparable)):
        others = {cell: values for cell, values in cells.items() if cell not in contrast}
        rest = _pooled(contrast, others, seeds, comparable)
        if rest is None or own <= scale * rest[0] * stats.f.ppf(1 - UNEQUAL, own_df, rest[1]):
            own, own_df = scale * pooled[0], pooled[1]
    rounding = 1e-12 * np.abs(by_seed).max()
    error = math.sqrt(own / n)
    return (error if error > rounding else math.nan), own_df


def _pooled(
    contrast: Contrast, cells: Cells, seeds: list, comparable: set[str]
) -> tuple[float, int] | None:
    """The variance of one cell within its block, pooled over a table; its degrees of freedom.

    Within a row, a block is the row's cells of one seed; all rows are pooled. Within a column, a
    block is the column's cells of one seed. None for other contrasts, and for contrasts whose
    weights do not sum to zero: what a block shares would not cancel in them.
    """
    rows, columns = ({cell[axis] for cell in contrast} for axis in (0, 1))
    if abs(sum(contrast.values())) > 1e-9 or (len(rows) > 1 and len(columns) > 1):
        return None
    if len(columns) > 1:
        groups = {cell[0]: comparable | columns for cell in cells}
        members = [[(row, column) for column in group] for row, group in groups.items()]
    else:
        members = [[cell for cell in cells if cell[1] in columns]]
    total, df = 0.0, 0
    for group in members:
        values = [_at(cells.get(cell, {}), seeds) for cell in group]
        values = np.unique([v for v in values if np.isfinite(v).all()] or [[]], axis=0)
        if len(values) > 1:  # one run that stands in two cells counts once
            residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
            total += (residuals**2).sum()
            df += (len(values) - 1) * (len(seeds) - 1)
    return (total / df, df) if df else None
