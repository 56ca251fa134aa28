"""Estimates of claims that compare cells: gaps, orderings, families, correlations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from kdbook.contrasts import CONFIDENCE, Contrast, Gaps, estimate_gaps
from kdbook.published import Cell, Cells, all_claims, cell_of


@dataclass(frozen=True)
class Estimate:
    """The estimate of a claim that compares cells; the fields are those of ``Verdict``."""

    estimate: float
    low: float
    high: float
    n: int
    agree: float
    detail: str = ""
    gaps: Gaps | None = None


def estimate(claim: dict, cells: Cells) -> Estimate | None:
    """The estimate of a claim that compares cells; None where a cell is missing.

    ``low`` is the smallest of the lower bounds: a claim on several gaps is found only if each of
    them is found, so no bound needs a correction (intersection–union test, Berger 1982). ``high``
    is the smallest of the upper bounds, which are corrected for their number (Bonferroni). A gain
    and an equality have a two-sided 95 % interval: they can fail on either side.
    """
    if claim["kind"] == "correlation":
        return _correlation(claim, cells)
    contrasts = contrasts_of(claim)
    if claim["kind"] == "family":
        contrasts = [c for c in contrasts if all(cells.get(cell) for cell in c)]
        if not contrasts:
            return None
        members, contrasts = contrasts, [_mean_of(contrasts)]
    if claim.get("log"):
        cells = _logarithms(cells, {column for c in contrasts for _, column in c})
    columns = None if claim.get("own_spread") else comparable(claim)
    gaps = estimate_gaps(contrasts, cells, columns)
    if gaps is None:
        return None
    weakest = int(gaps.mean.argmin())
    sides = 2 if claim["kind"] in ("gain", "equal") else 1
    low = (gaps.mean - gaps.width(sides)).min()  # NaN where one of the contrasts has no bound
    high = (gaps.mean + gaps.width(sides * len(contrasts))).min()
    exact = claim["kind"] == "equal" and np.ptp(gaps.by_seed) == 0  # counts that agree in all seeds
    if claim.get("deterministic") or exact:
        low = high = gaps.mean[weakest]
    detail = _names(contrasts[weakest]) if len(contrasts) > 1 else ""
    if claim["kind"] == "family":
        detail = _wins(members, cells, len(claim["pairs"]))
    agree = float((gaps.by_seed > 0).all(0).sum())
    numbers = (float(v) for v in (gaps.mean[weakest], low, high))
    return Estimate(*numbers, gaps.by_seed.shape[1], agree, detail, gaps)


def contrasts_of(claim: dict) -> list[Contrast]:
    """Weighted sums of cells; by the claim, each of them exceeds the margin.

    Raises ValueError for a claim of an unknown kind.
    """
    sign = 1 if claim.get("sense", "max") == "max" else -1
    match claim["kind"]:
        case "gap" | "equal" | "gain":
            return [{cell_of(name, claim): w for name, w in claim["contrast"].items()}]
        case "ordering":
            return [_difference(pair, claim, 1) for pair in pairwise(claim["order"])]
        case "best":
            return [_difference((claim["cell"], r), claim, sign) for r in claim["among"]]
        case "family":
            return [_difference(pair, claim, sign) for pair in claim["pairs"]]
        case "correlation" | "value":
            return []
    raise ValueError(
        f"Claim {claim['id']} has the unknown kind {claim['kind']!r}. Use value, gap, gain, equal, "
        f"ordering, best, family or correlation."
    )


def _difference(names: Sequence[str], claim: dict, sign: int) -> Contrast:
    higher, lower = (cell_of(name, claim) for name in names)
    return {higher: sign, lower: -sign}


def _logarithms(cells: Cells, columns: set[str]) -> Cells:
    """The logarithms of the cells of some columns: a gap of them is the logarithm of a ratio.

    A value that is not positive has no logarithm: its seed is left out.
    """
    return {
        cell: {seed: math.log(value) for seed, value in values.items() if value > 0}
        for cell, values in cells.items()
        if cell[1] in columns
    }


def comparable(claim: dict) -> set[str]:
    """The columns that claims on the same exhibit compare with the columns of this claim."""
    groups = [
        {column for _, column in contrast}
        for other in all_claims()
        if other["exhibit"] == claim["exhibit"] and other["kind"] != "value"
        for contrast in contrasts_of(other)
    ]
    found = {column for contrast in contrasts_of(claim) for _, column in contrast}
    while joined := [group for group in groups if group & found and not group <= found]:
        found = found.union(*joined)
    return found


def _names(contrast: Contrast) -> str:
    """The two cells as a difference, with the parts of their names that differ."""
    (row, column), (other_row, other_column) = sorted(contrast, key=contrast.get, reverse=True)
    if row == other_row:
        return f"{column} − {other_column}"
    if column == other_column:
        return f"{row} − {other_row}"
    return f"{row} @ {column} − {other_row} @ {other_column}"


# --- families and correlations --------------------------------------------------------------------


def _mean_of(contrasts: list[Contrast]) -> Contrast:
    mean: dict[Cell, float] = {}
    for contrast in contrasts:
        for cell, weight in contrast.items():
            mean[cell] = mean.get(cell, 0.0) + weight / len(contrasts)
    return mean


def _wins(contrasts: list[Contrast], cells: Cells, claimed: int) -> str:
    """The share of wins: a run of one cell against a run of the other, as a mean over the pairs.

    The interval is a bootstrap that draws the seeds of each cell (Agarwal et al. 2021). It only
    describes the runs: with few seeds it is too narrow for a test.
    """
    pairs = [sorted(contrast, key=contrast.get, reverse=True) for contrast in contrasts]
    names = list(dict.fromkeys(cell for pair in pairs for cell in pair))
    samples = [np.array(list(cells[cell].values())) for cell in names]

    def share(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        values = dict(zip(names, drawn, strict=True))
        return np.mean([_share(values[better], values[worse]) for better, worse in pairs], axis=0)

    text = f"wins {share(*samples):.0%}"
    if min(map(len, samples)) > 1:
        drawn = stats.bootstrap(
            samples, share, n_resamples=999, vectorized=True, method="percentile", rng=0
        ).confidence_interval
        text += f" [{drawn.low:.0%}, {drawn.high:.0%}]"
    return f"{text} of runs, {len(pairs)} of {claimed} pairs"


def _share(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one[..., :, None], other[..., None, :]
    return ((one > other) + 0.5 * (one == other)).mean((-1, -2))


def _correlation(claim: dict, cells: Cells) -> Estimate | None:
    """Pearson's r over rows, seed by seed, positive on the claimed side.

    The bounds are those of the mean over seeds of Fisher's z = artanh r.
    """
    rows = claim.get("rows") or dict.fromkeys(
        row for row, column in cells if column == claim["x"] and (row, claim["y"]) in cells
    )
    pairs = [(cells.get((row, claim["x"])), cells.get((row, claim["y"]))) for row in rows]
    if len(pairs) < 3 or not all(x and y for x, y in pairs):
        return None
    named = [cell for pair in pairs for cell in pair if None not in cell]
    seeds = sorted(set.intersection(*map(set, named))) if named else [None]
    sign, found = 1 if "at_least" in claim else -1, []
    for seed in seeds:
        x, y = np.array([[v.get(seed, v.get(None)) for v in pair] for pair in pairs], float).T
        if min(np.ptp(x), np.ptp(y)) > 0:  # r is undefined where all values are equal
            found.append(sign * stats.pearsonr(x, y).statistic)
    n = len(found)
    if n < len(seeds) or not seeds:
        return Estimate(math.nan, math.nan, math.nan, 0, math.nan) if seeds else None
    z = np.arctanh(np.clip(found, -0.999999, 0.999999))
    width = math.nan
    if n > 1 and z.std() > 0:
        width = stats.t.ppf(CONFIDENCE, n - 1) * stats.sem(z)
    low, high = (math.tanh(z.mean() + side * width) for side in (-1, 1))
    agree = float((np.array(found) > 0).sum())
    return Estimate(float(np.tanh(z.mean())), low, high, n, agree)
