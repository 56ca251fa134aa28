"""The claims of the papers, and our verdicts on them. Every verdict is computed from cells.

A cell is a row and a column of an exhibit. Each of our cells has one value per seed. Differences
between methods are paired by seed; runs of one seed share their teacher.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd
import yaml
from scipy import special, stats

from kdlib import files

CONFIDENCE = 0.95
PUBLISHED = files.ROOT / "results" / "published"
# Cells of an exhibit: {(row, column): values by seed}. A counted value has the seed None.
Cells = Mapping[tuple[str, str], Mapping[int | None, float]]


@dataclass(frozen=True)
class Verdict:
    """Our verdict on one claim, or on one row of a claim of the kind ``value``.

    Attributes:
        verdict: ``reproduced``, ``inconclusive`` or ``differs`` for values; ``supported``,
            ``inconclusive`` or ``contradicted`` for all other kinds; ``direction only`` where the
            profile, the data set or the method is not the paper's; ``not run``.
        estimate: our number: for a value its difference from the paper's value, for a correlation
            the coefficient, otherwise the claimed gap (the smallest one of several gaps).
            ``low`` and ``high`` are its 95 % interval.
        paper: the same quantity, computed from the paper's numbers.
        as_claimed: whether the estimate lies on the claimed side; None for values.
        n: number of seeds; for a correlation, number of rows.
        reconstruction: whether the claim depends on a method or on data that this project had to
            reconstruct, because the paper's text has lost it.
    """

    id: str
    exhibit: str
    kind: str
    statement: str
    where: str
    unit: str
    verdict: str = "not run"
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    tolerance: float = math.nan
    paper: float = math.nan
    as_claimed: bool | None = None
    n: int = 0
    reconstruction: bool = False


@lru_cache
def published() -> pd.DataFrame:
    """All numbers in the four papers: exhibit, row, column, value, unit, note, digits."""
    paths = sorted(PUBLISHED.glob("*.csv"))
    table = pd.concat([pd.read_csv(path, dtype={"value": str}) for path in paths])
    table["digits"] = table.value.str.partition(".")[2].str.len()
    table["value"] = table.value.astype(float)
    return table.fillna({"unit": "", "note": ""}).reset_index(drop=True)


@lru_cache
def all_claims() -> list[dict]:
    """The claims of the four papers, from ``results/published/claims.yaml``."""
    return yaml.safe_load((PUBLISHED / "claims.yaml").read_text())


def paper_cells(exhibit: str) -> Cells:
    """The published cells of an exhibit."""
    rows = published()[published().exhibit == exhibit]
    return {(r.row, r.column): {None: r.value} for r in rows.itertuples()}


def judge(exhibit: str, ours: Cells, faithful: bool) -> list[Verdict]:
    """Verdicts on all claims of an exhibit.

    Args:
        ours: our cells.
        faithful: whether profile and data are the paper's. Verdicts on counted numbers do not
            depend on this.
    """
    verdicts = []
    for claim in all_claims():
        if claim["exhibit"] == exhibit:
            judge_claim = _judge_values if claim["kind"] == "value" else _judge_relation
            verdicts += judge_claim(claim, ours, faithful)
    return verdicts


def as_table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per verdict, one column per attribute."""
    return pd.DataFrame([asdict(v) for v in verdicts], columns=[f.name for f in fields(Verdict)])


def interval(values: np.ndarray, tests: int = 1) -> tuple[float, float]:
    """Student's t-interval of a mean at 95 %, with Bonferroni's correction for ``tests`` tests.

    Both ends are NaN where there are fewer than two values.
    """
    if len(values) < 2:
        return math.nan, math.nan
    quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / (2 * tests), len(values) - 1)
    margin = quantile * stats.sem(values)
    return values.mean() - margin, values.mean() + margin


# --- values ---------------------------------------------------------------------------------------


def _judge_values(claim: dict, ours: Cells, faithful: bool) -> list[Verdict]:
    printed = _printed(claim).set_index("row")
    rows = claim.get("rows", printed.index)
    return [_judge_value(claim, printed.loc[row], ours, faithful) for row in rows]


def _judge_value(claim: dict, printed: pd.Series, ours: Cells, faithful: bool) -> Verdict:
    row, tolerance = printed.name, claim["tolerance"]
    if tolerance == "printed":
        tolerance = 0.5 * 10.0**-printed.digits
    about = _about(claim) | {
        "id": f"{claim['id']}/{row}",
        "unit": printed.unit,
        "tolerance": tolerance,
        "paper": printed.value,
        "reconstruction": _is_reconstruction(claim, row),
    }
    values = np.array(list(ours.get((row, claim["column"]), {}).values()))
    if len(values) == 0:
        return Verdict(**about)
    difference = values.mean() - printed.value
    low, high = (bound - printed.value for bound in interval(values))
    if claim.get("deterministic"):
        # A difference of exactly the tolerance can be a little larger as a float.
        verdict = "reproduced" if abs(difference) <= tolerance * (1 + 1e-9) else "differs"
    elif not faithful or about["reconstruction"]:
        verdict = "direction only"
    elif -tolerance <= low and high <= tolerance:
        verdict = "reproduced"
    elif low > tolerance or high < -tolerance:
        verdict = "differs"
    else:
        verdict = "inconclusive"
    numbers = {"estimate": difference, "low": low, "high": high, "n": len(values)}
    return Verdict(**about, **numbers, verdict=verdict)


# --- gaps, orderings, correlations ----------------------------------------------------------------


def _judge_relation(claim: dict, ours: Cells, faithful: bool) -> list[Verdict]:
    units, paper = _printed(claim).unit, estimate(claim, paper_cells(claim["exhibit"]))
    about = _about(claim) | {
        "unit": units.iloc[0] if len(units) else "",
        "tolerance": claim.get("tolerance", math.nan),
        "paper": paper[0] if paper else math.nan,
        "reconstruction": _is_reconstruction(claim),
    }
    result = estimate(claim, ours)
    if result is None:
        return [Verdict(**about)]
    found, low, high, n = result
    if claim["kind"] == "equal":
        bound = claim["tolerance"]
        supported, contradicted = -bound < low and high < bound, low > bound or high < -bound
        as_claimed = abs(found) < bound
    elif claim["kind"] == "correlation":
        bound = abs(claim.get("at_least", claim.get("at_most")))
        supported, contradicted = low > 0 and found >= bound, high < bound
        as_claimed = found > 0
    else:
        margin = claim.get("margin", 0.0)
        supported, contradicted = low > margin, high < margin
        as_claimed = found > margin
    if not (claim.get("deterministic") or (faithful and not about["reconstruction"])):
        verdict = "direction only"
    else:
        verdict = "supported" if supported else "contradicted" if contradicted else "inconclusive"
    side = None if math.isnan(found) else bool(as_claimed)
    numbers = {"estimate": found, "low": low, "high": high, "n": n}
    return [Verdict(**about, **numbers, verdict=verdict, as_claimed=side)]


def estimate(claim: dict, cells: Cells) -> tuple[float, float, float, int] | None:
    """Estimate, low, high and number of seeds of a claim that compares cells.

    None where a cell is missing. Raises ValueError for a claim of an unknown kind.
    """
    if claim["kind"] == "correlation":
        return _correlation(claim, cells)
    samples = [_contrast_by_seed(contrast, claim, cells) for contrast in _contrasts(claim)]
    if any(sample is None for sample in samples):
        return None
    if claim.get("deterministic"):
        bounds = [(sample.mean(), sample.mean()) for sample in samples]
    else:
        bounds = [interval(sample, tests=len(samples)) for sample in samples]
    weakest = min(range(len(samples)), key=lambda k: samples[k].mean())
    low, high = np.min(bounds, axis=0)  # NaN where one of the contrasts has no interval
    return float(samples[weakest].mean()), float(low), float(high), len(samples[weakest])


def _contrasts(claim: dict) -> list[dict[str, float]]:
    """Weighted sums of cells; by the claim, each of them exceeds the margin."""
    match claim["kind"]:
        case "gap" | "equal":
            return [claim["contrast"]]
        case "ordering":
            return [{higher: 1, lower: -1} for higher, lower in pairwise(claim["order"])]
        case "best":
            sign = 1 if claim.get("sense", "max") == "max" else -1
            return [{claim["cell"]: sign, rival: -sign} for rival in claim["among"]]
    raise ValueError(
        f"Claim {claim['id']} has the unknown kind {claim['kind']!r}. Use value, gap, equal, "
        f"ordering, best or correlation."
    )


def _contrast_by_seed(contrast: dict[str, float], claim: dict, cells: Cells) -> np.ndarray | None:
    """The weighted sum for each seed that all cells of the contrast share."""
    terms = []
    for cell, weight in contrast.items():
        row, _, column = str(cell).partition(" @ ")
        values = cells.get((row, column or claim["column"]))
        if not values:
            return None
        terms.append((weight, values))
    seeded = [set(values) for _, values in terms if None not in values]
    seeds = sorted(set.intersection(*seeded)) if seeded else [None]
    if not seeds:
        return None
    return np.array(
        [sum(w * values.get(seed, values.get(None)) for w, values in terms) for seed in seeds]
    )


def _correlation(claim: dict, cells: Cells) -> tuple[float, float, float, int] | None:
    """Pearson's r over rows, positive on the claimed side, with Fisher's z-interval."""
    rows = [row for row, column in cells if column == claim["x"] and (row, claim["y"]) in cells]
    if len(rows) < 3:
        return None
    x, y = (
        [np.mean(list(cells[row, claim[axis]].values())) for row in rows] for axis in ("x", "y")
    )
    if min(np.ptp(x), np.ptp(y)) == 0:  # r is undefined where all values are equal
        return math.nan, math.nan, math.nan, len(rows)
    sign = 1 if "at_least" in claim else -1
    r = sign * float(np.corrcoef(x, y)[0, 1])
    if len(rows) < 4 or abs(r) >= 1:
        return r, math.nan, math.nan, len(rows)
    margin = special.ndtri((1 + CONFIDENCE) / 2) / math.sqrt(len(rows) - 3)
    return r, math.tanh(math.atanh(r) - margin), math.tanh(math.atanh(r) + margin), len(rows)


# --- what a claim says ----------------------------------------------------------------------------


def _about(claim: dict) -> dict:
    return {key: claim[key] for key in ("id", "exhibit", "kind", "statement", "where")}


def _printed(claim: dict) -> pd.DataFrame:
    """The published numbers in the claim's column."""
    table = published()
    return table[(table.exhibit == claim["exhibit"]) & (table.column == claim.get("column"))]


def _is_reconstruction(claim: dict, row: str | None = None) -> bool:
    """Whether a claim, or one row of a claim on values, depends on a reconstruction."""
    reconstruction = claim.get("reconstruction", False)
    return row in reconstruction if isinstance(reconstruction, list) else reconstruction
