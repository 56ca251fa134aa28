"""Claims of the papers, and the verdicts that our numbers support. Computed, never typed.

A cell is a row and a column of an exhibit. Ours holds one value per seed, so that differences
between methods are paired by seed (and by the teacher, which shares it).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd
import yaml
from scipy import special

from kdlib import files

CONFIDENCE = 0.95
# cells of an exhibit: {(row, column): values by seed}; a counted value stands under the seed None
Cells = Mapping[tuple[str, str], Mapping[int | None, float]]


@dataclass(frozen=True)
class Verdict:
    """One claim, or one row of a claim on values, and what our numbers say of it.

    Attributes:
        verdict: reproduced, inconclusive or differs for values; supported, inconclusive or
            contradicted for gaps and orderings; ``direction only`` where the profile, the data set
            or the method is not the paper's; ``not run``.
        estimate: ours: of a value its difference from the paper's, of other claims the claimed
            gap (of several, the smallest) or correlation. ``low`` and ``high`` bound it at 95 %.
        paper: the same quantity by the paper's own numbers.
        as_claimed: whether the estimate lies on the claimed side; None for values.
        n: seeds; rows of a correlation.
    """

    id: str
    exhibit: str
    kind: str
    says: str
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
    # whether the claim is about a method or data that the paper's text no longer tells
    reconstruction: bool = False


@lru_cache
def published() -> pd.DataFrame:
    """Every number the four papers print: exhibit, row, column, value, unit, note, digits."""
    paths = sorted(files.published().glob("*.csv"))
    table = pd.concat([pd.read_csv(path, dtype={"value": str}) for path in paths])
    table["digits"] = table.value.str.partition(".")[2].str.len()
    table["value"] = table.value.astype(float)
    return table.fillna({"unit": "", "note": ""}).reset_index(drop=True)


@lru_cache
def all_claims() -> list[dict]:
    """The claims of the four papers, as ``results/published/claims.yaml`` holds them."""
    return yaml.safe_load((files.published() / "claims.yaml").read_text())


def paper_cells(exhibit: str) -> Cells:
    rows = published()[published().exhibit == exhibit]
    return {(r.row, r.column): {None: r.value} for r in rows.itertuples()}


def judge(exhibit: str, ours: Cells, faithful: bool) -> list[Verdict]:
    """Verdicts on all claims of an exhibit.

    Args:
        ours: our cells.
        faithful: whether profile and data are the paper's; counted values need neither.
    """
    verdicts = []
    for claim in all_claims():
        if claim["exhibit"] == exhibit:
            verdicts += (
                _values(claim, ours, faithful)
                if claim["kind"] == "value"
                else [_relation(claim, ours, faithful)]
            )
    return verdicts


def interval(values: np.ndarray, tests: int = 1) -> tuple[float, float]:
    """t-interval of a mean at 95 %, Bonferroni-corrected for ``tests``; NaNs for one value."""
    if len(values) < 2:
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    margin = special.stdtrit(len(values) - 1, 1 - (1 - CONFIDENCE) / (2 * tests)) * error
    return values.mean() - margin, values.mean() + margin


# --- values ---------------------------------------------------------------------------------------


def _values(claim: dict, ours: Cells, faithful: bool) -> list[Verdict]:
    known = published()[
        (published().exhibit == claim["exhibit"]) & (published().column == claim["column"])
    ].set_index("row")
    verdicts = []
    for row in claim.get("rows", known.index):
        cell = known.loc[row]
        tolerance = claim["tolerance"]
        if tolerance == "printed":
            tolerance = 0.5 * 10.0**-cell.digits
        head = _head(claim) | {
            "id": f"{claim['id']}/{row}", "unit": cell.unit, "tolerance": tolerance,
            "paper": cell.value, "reconstruction": _is_rebuilt(claim, row),
        }  # fmt: skip
        values = np.array(list(ours.get((row, claim["column"]), {}).values()))
        if len(values) == 0:
            verdicts.append(Verdict(**head))
            continue
        difference = values.mean() - cell.value
        low, high = (bound - cell.value for bound in interval(values))
        if claim.get("deterministic"):
            # a count that rounds to the printed digits, give or take the last bit of a float
            verdict = "reproduced" if abs(difference) <= tolerance * (1 + 1e-9) else "differs"
        elif not faithful or head["reconstruction"]:
            verdict = "direction only"
        elif -tolerance <= low and high <= tolerance:
            verdict = "reproduced"
        elif low > tolerance or high < -tolerance:
            verdict = "differs"
        else:
            verdict = "inconclusive"
        numbers = {"estimate": difference, "low": low, "high": high, "n": len(values)}
        verdicts.append(Verdict(**head, **numbers, verdict=verdict))
    return verdicts


# --- gaps, orderings, correlations ----------------------------------------------------------------


def _relation(claim: dict, ours: Cells, faithful: bool) -> Verdict:
    rebuilt = _is_rebuilt(claim)
    head = _head(claim) | {"unit": _unit(claim), "tolerance": claim.get("tolerance", math.nan)}
    head["reconstruction"] = rebuilt
    paper = estimate(claim, paper_cells(claim["exhibit"]))
    head["paper"] = paper[0] if paper else math.nan
    result = estimate(claim, ours)
    if result is None:
        return Verdict(**head)
    found, low, high, n = result
    margin = claim.get("margin", 0.0)
    if claim["kind"] == "equal":
        bound = claim["tolerance"]
        yes, no = -bound < low and high < bound, low > bound or high < -bound
        as_claimed = abs(found) < bound
    elif claim["kind"] == "correlation":
        bound = abs(claim.get("at_least", claim.get("at_most")))
        yes, no = low > 0 and found >= bound, high < bound
        as_claimed = found > 0
    else:
        yes, no = low > margin, high < margin
        as_claimed = found > margin
    verdict = "supported" if yes else "contradicted" if no else "inconclusive"
    judged = (faithful and not rebuilt) or claim.get("deterministic")
    return Verdict(
        **head,
        verdict=verdict if judged else "direction only",
        estimate=found,
        low=low,
        high=high,
        as_claimed=None if math.isnan(found) else bool(as_claimed),
        n=n,
    )


def estimate(claim: dict, cells: Cells) -> tuple[float, float, float, int] | None:
    """Of a claim that relates cells: estimate, low, high, seeds; None where a cell is missing."""
    if claim["kind"] == "correlation":
        return _correlation(claim, cells)
    samples = [_combine(contrast, claim, cells) for contrast in _contrasts(claim)]
    if any(sample is None for sample in samples):
        return None
    if claim.get("deterministic"):
        bounds = [(sample.mean(), sample.mean()) for sample in samples]
    else:
        bounds = [interval(sample, tests=len(samples)) for sample in samples]
    weakest = min(range(len(samples)), key=lambda k: samples[k].mean())
    low, high = np.min(bounds, axis=0)  # NaN where any step has no interval
    return float(samples[weakest].mean()), float(low), float(high), len(samples[weakest])


def _contrasts(claim: dict) -> list[dict[str, float]]:
    """What the claim says exceeds its margin: weighted sums of cells, all of them."""
    match claim["kind"]:
        case "gap" | "equal":
            return [claim["contrast"]]
        case "ordering":
            order = claim["order"]
            return [{a: 1, b: -1} for a, b in pairwise(order)]
        case "best":
            sign = 1 if claim.get("sense", "max") == "max" else -1
            return [{claim["cell"]: sign, rival: -sign} for rival in claim["among"]]
    raise ValueError(f"{claim['id']}: unknown kind {claim['kind']!r}")


def _combine(contrast: dict[str, float], claim: dict, cells: Cells) -> np.ndarray | None:
    """The weighted sum per seed, over the seeds that all its cells share."""
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
    """Pearson's r over rows, sign turned to the claimed one; interval by Fisher's z."""
    rows = [row for row, column in cells if column == claim["x"] and (row, claim["y"]) in cells]
    if len(rows) < 3:
        return None
    x, y = (
        [np.mean(list(cells[row, claim[axis]].values())) for row in rows] for axis in ("x", "y")
    )
    if min(np.ptp(x), np.ptp(y)) == 0:  # all alike: there is no correlation to speak of
        return math.nan, math.nan, math.nan, len(rows)
    sign = 1 if "at_least" in claim else -1
    r = sign * float(np.corrcoef(x, y)[0, 1])
    if len(rows) < 4 or math.isnan(r) or abs(r) >= 1:
        return r, math.nan, math.nan, len(rows)
    margin = special.ndtri((1 + CONFIDENCE) / 2) / math.sqrt(len(rows) - 3)
    return r, math.tanh(math.atanh(r) - margin), math.tanh(math.atanh(r) + margin), len(rows)


def _is_rebuilt(claim: dict, row: str | None = None) -> bool:
    """Whether a claim, or the row of one on values, is about a reconstruction."""
    rebuilt = claim.get("reconstruction", False)
    return row in rebuilt if isinstance(rebuilt, list) else rebuilt


def _head(claim: dict) -> dict:
    return {key: claim[key] for key in ("id", "exhibit", "kind", "says", "where")}


def _unit(claim: dict) -> str:
    rows = published()[published().exhibit == claim["exhibit"]]
    units = rows[rows.column == claim.get("column")].unit
    return units.iloc[0] if len(units) else ""


def as_table(verdicts: list[Verdict]) -> pd.DataFrame:
    return pd.DataFrame([asdict(v) for v in verdicts], columns=[f.name for f in fields(Verdict)])
