"""Our verdicts on the claims of the papers. Every verdict is computed from cells.

``docs/verdicts.md`` explains the rule, and how often it errs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import pandas as pd

from kdbook.contrasts import interval
from kdbook.estimates import contrasts_of, estimate
from kdbook.published import Cells, all_claims, paper_cells, published, unit_of

# The scales of an exhibit's runs, and the verdicts on a relation: for the claim, against it, open.
WORDS = {
    "full": ("supported", "contradicted", "inconclusive"),
    "reduced": ("holds here", "reverses here", "unresolved here"),
}
SMOKE = "smoke"  # the scale of runs that are no evidence


@dataclass(frozen=True)
class Verdict:
    """Our verdict on one claim, or on one row of a claim of the kind ``value``.

    Attributes:
        verdict: of a value ``reproduced``, ``inconclusive`` or ``differs``; of a relation one of
            ``WORDS``; ``not comparable`` for numbers that only a run at full scale can test;
            ``no verdict``, for the reason in ``detail``; ``not run``.
        detail: the rival or the step with the smallest gap; for a family the share of wins; the
            reason of ``no verdict``; the claim that asks for the sign of the same gap.
        estimate: our number: for a value its difference from the paper's value, for a correlation
            the coefficient, otherwise the claimed gap (the smallest one of several).
        low, high: one-sided 95 % bounds of a relation; the two-sided 95 % interval of a value, of
            the size of a gap and of an equality.
        resolution: the distance from the estimate to its bound; a smaller gap is not found.
        paper: the same quantity, computed from the paper's numbers.
        power: the probability of ``supported`` or ``holds here`` if the paper's gap were the truth
            and the spread were ours.
        n: number of seeds.
        agree: number of seeds in which all claimed gaps have the claimed sign.
        headline: whether the claim is one of the few that the paper stands for.
        reconstruction: whether the claim depends on a part that this project had to reconstruct.
            Its verdict is on our reading, not on the paper.
    """

    id: str
    exhibit: str
    kind: str
    statement: str
    where: str
    unit: str = ""
    verdict: str = "not run"
    detail: str = ""
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    resolution: float = math.nan
    tolerance: float = math.nan
    paper: float = math.nan
    power: float = math.nan
    n: int = 0
    agree: float = math.nan
    headline: bool = False
    reconstruction: bool = False


def judge(
    exhibit: str, ours: Cells, scale: str, failed: Mapping[str, Iterable | None] | None = None
) -> list[Verdict]:
    """Verdicts on all claims of an exhibit.

    Args:
        ours: our cells.
        scale: ``full`` where profile and data are the paper's, ``reduced`` where they are not,
            ``smoke`` where the runs are no evidence. Counted numbers do not depend on it.
        failed: checks that failed, with the rows and the cells that they concern; None for all.
    """
    verdicts = []
    for claim in all_claims():
        if claim["exhibit"] == exhibit:
            rows = _value_rows(claim) if claim["kind"] == "value" else [None]
            verdicts += [
                _signed(claim, _judge(claim, row, ours, scale, failed or {})) for row in rows
            ]
    return verdicts


def as_table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per verdict, one column per attribute."""
    return pd.DataFrame([asdict(v) for v in verdicts], columns=[f.name for f in fields(Verdict)])


def _judge(
    claim: dict, row: str | None, ours: Cells, scale: str, failed: Mapping[str, Iterable | None]
) -> Verdict:
    value = claim["kind"] == "value"
    measured = _measure_value(claim, row, ours) if value else _measure(claim, ours, scale)
    if measured.verdict == "not run":
        return measured
    if claim.get("deterministic"):
        return replace(measured, verdict=_counted(measured, claim))
    if reason := _withheld(claim, row, measured, scale, failed):
        return replace(measured, verdict="no verdict", detail=reason, power=math.nan)
    if scale != "full" and (_needs_full_scale(claim) or without_margin(claim)):
        same = without_margin(claim)
        detail = f"the sign of this gap is judged as {same}" if same else ""
        return replace(measured, verdict="not comparable", detail=detail, power=math.nan)
    return replace(measured, verdict=_word(measured, claim, scale))


def _withheld(claim: dict, row: str | None, measured: Verdict, scale: str, failed) -> str:
    """Why there is no verdict; empty if there is one."""
    if scale == SMOKE:
        return "a smoke run is no evidence"
    cells = _cells(claim, row)
    named = cells | {name for name, _ in cells}
    for text, rows in failed.items():
        if rows is None or not named or named & set(rows):
            return f"a check failed: {text}"
    if measured.n < 2:
        return "one seed"
    return ""


def _cells(claim: dict, row: str | None) -> set[tuple[str, str]]:
    """The cells that a claim, or one row of it, reads; none if they are all rows of a column."""
    rows = [row] if row else claim.get("rows", ())
    columns = [claim[key] for key in ("x", "y") if key in claim] or [claim.get("column")]
    listed = {(name, column) for name in rows for column in columns}
    return listed | {cell for contrast in contrasts_of(claim) for cell in contrast}


def _signed(claim: dict, verdict: Verdict) -> Verdict:
    """A correlation that the paper claims to be negative is judged with the other sign."""
    if "at_most" not in claim:
        return verdict
    flipped = {"estimate": -verdict.estimate, "low": -verdict.high, "high": -verdict.low}
    return replace(verdict, **flipped)


def _needs_full_scale(claim: dict) -> bool:
    """Whether a claim is about a size in points, which another data set or schedule changes.

    A margin above 0 is not needed to ask for the sign of a gap. "At most 0.5 points below" has no
    sign to ask for.
    """
    return claim["kind"] in ("value", "gain", "equal") or claim.get("margin", 0.0) < 0


def without_margin(claim: dict) -> str:
    """The claim that compares the same cells without a margin; empty where there is none.

    Margins are 0 below full scale, so both claims would ask the same question there.
    """
    if claim.get("margin", 0.0) <= 0:
        return ""
    same = (
        other["id"]
        for other in all_claims()
        if (other["exhibit"], other["kind"]) == (claim["exhibit"], claim["kind"])
        and not other.get("margin")
        and contrasts_of(other) == contrasts_of(claim)
    )
    return next(same, "")


def _counted(measured: Verdict, claim: dict) -> str:
    if claim["kind"] in ("value", "gain"):
        # A difference of exactly the tolerance can be a little larger as a float.
        close = abs(measured.estimate) <= measured.tolerance * (1 + 1e-9)
        return "reproduced" if close else "differs"
    if claim["kind"] == "equal":
        true = abs(measured.estimate) < claim["tolerance"]
    else:
        true = measured.estimate > claim.get("margin", 0.0)
    return "supported" if true else "contradicted"


def _word(measured: Verdict, claim: dict, scale: str) -> str:
    """The verdict on a trained quantity. Bounds that are not known decide nothing."""
    low, high, tolerance = measured.low, measured.high, measured.tolerance
    kind, (yes, no, unclear) = claim["kind"], WORDS[scale]
    if kind in ("value", "gain"):
        yes, no = "reproduced", "differs"
    if kind in ("value", "gain", "equal"):
        found, refuted = -tolerance < low and high < tolerance, low > tolerance or high < -tolerance
    else:
        found, refuted = low > _margin(claim, scale), high < _margin(claim, scale)
    return yes if found else no if refuted else unclear


def _margin(claim: dict, scale: str) -> float:
    """What an estimate must exceed. Margins are points at full scale: below it, they are 0."""
    if scale != "full":
        return 0.0
    if claim["kind"] == "correlation":
        return abs(claim.get("at_least", claim.get("at_most")))
    return claim.get("margin", 0.0)


# --- values ---------------------------------------------------------------------------------------


def _value_rows(claim: dict) -> list[str]:
    return claim.get("rows") or list(_printed(claim).row)


def _measure_value(claim: dict, row: str, ours: Cells) -> Verdict:
    printed = _printed(claim).set_index("row").loc[row]
    tolerance = claim["tolerance"]
    if tolerance == "printed":
        tolerance = 0.5 * 10.0**-printed.digits
    empty = replace(
        _about(claim, row),
        id=f"{claim['id']}/{row}",
        unit=printed.unit,
        tolerance=tolerance,
        paper=printed.value,
    )
    values = np.array(list(ours.get((row, claim["column"]), {}).values()))
    if not len(values):
        return empty
    low, high = (bound - printed.value for bound in interval(values))
    numbers = {"estimate": values.mean() - printed.value, "low": low, "high": high}
    return replace(empty, verdict="", n=len(values), resolution=(high - low) / 2, **numbers)


# --- relations ------------------------------------------------------------------------------------


def _measure(claim: dict, ours: Cells, scale: str) -> Verdict:
    unit = unit_of(claim["exhibit"], claim["column"]) if "column" in claim else ""
    if claim.get("log"):
        unit = "log of ratio"
    printed = estimate(claim, paper_cells(claim["exhibit"]))
    paper = printed.estimate if printed else math.nan
    tolerance = claim.get("tolerance", math.nan)
    empty = replace(_about(claim), unit=unit, paper=paper, tolerance=tolerance)
    found = estimate(claim, ours)
    if found is None:
        return empty
    shift = paper if claim["kind"] == "gain" else 0.0
    if math.isnan(shift):
        return empty
    power = math.nan
    if printed and printed.gaps and claim["kind"] not in ("equal", "gain"):
        power = found.gaps.power(printed.gaps.mean, _margin(claim, scale))
    return replace(
        empty,
        verdict="",
        detail=found.detail,
        estimate=found.estimate - shift,
        low=found.low - shift,
        high=found.high - shift,
        resolution=found.estimate - found.low,
        power=power,
        n=found.n,
        agree=found.agree,
    )


# --- what a claim says ----------------------------------------------------------------------------


def _about(claim: dict, row: str | None = None) -> Verdict:
    reconstruction = claim.get("reconstruction", False)
    return Verdict(
        **{key: claim[key] for key in ("id", "exhibit", "kind", "statement", "where")},
        headline=claim.get("headline", False),
        reconstruction=row in reconstruction
        if isinstance(reconstruction, list)
        else reconstruction,
    )


def _printed(claim: dict) -> pd.DataFrame:
    """The published numbers in the claim's column."""
    table = published()
    return table[(table.exhibit == claim["exhibit"]) & (table.column == claim.get("column"))]
