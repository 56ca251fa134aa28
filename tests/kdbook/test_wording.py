"""The text of claims, verdicts and numbers."""

from types import SimpleNamespace

import pytest

from kdbook.claims import Verdict
from kdbook.wording import cell_text, claim_text, estimate_text, own_text, verdict_text


def verdict(kind="gap", estimate=0.7, **others):
    about = {"id": "x/table1/value-top1/a row", "exhibit": "x/table1", "statement": "All values."}
    others = {"where": "§1", "unit": "%", "verdict": "direction only", **others}
    return Verdict(**about, kind=kind, estimate=estimate, **others)


@pytest.mark.parametrize(
    ("kind", "estimate", "as_claimed", "side"),
    [
        ("gap", 0.7, True, ": as claimed"),
        ("gap", 0.3, False, ": weaker than claimed"),
        ("best", 0.0, False, ": a tie"),
        ("best", -0.1, False, ": opposite"),
        ("equal", 0.4, False, ": not equal"),
        ("value", 0.4, None, ""),
        ("value", 0.4, float("nan"), ""),
    ],
)
def test_a_direction_has_a_side(kind, estimate, as_claimed, side):
    one = verdict(kind, estimate, as_claimed=as_claimed)
    assert verdict_text(one) == f"direction only{side}"
    one = verdict(kind, estimate, as_claimed=as_claimed, reconstruction=True)
    assert verdict_text(one) == f"reconstruction, direction only{side}"
    assert verdict_text(verdict(verdict="supported", as_claimed=True)) == "supported"


def test_a_value_names_its_row():
    assert claim_text(verdict("value")) == "All values: a row"
    assert claim_text(verdict("gap")) == "All values."


def test_an_estimate_has_its_interval():
    bounds = {"low": -0.25, "high": 1.5, "paper": 70.0}
    value, gap = verdict("value", **bounds), verdict("gap", **bounds)
    assert estimate_text(value) == "+0.7 from paper [-0.25, +1.5]"
    assert estimate_text(gap) == "+0.7 [-0.25, +1.5]"
    assert own_text(value) == "70.7 [69.75, 71.5]"
    assert own_text(gap) == "0.7 [-0.25, 1.5]"
    assert (estimate_text(verdict()), own_text(verdict())) == ("+0.7", "0.7")
    assert (estimate_text(verdict(estimate=float("nan")))) == ""


@pytest.mark.parametrize(
    ("ours", "spread", "n", "counted", "text"),
    [
        (71.234, 0.5, 3, False, "71.23 ± 0.50 (3)"),
        (0.1234, 0.0056, 3, False, "0.123 ± 0.006 (3)"),
        (71.234, float("nan"), 1, False, "71.23 (1)"),
        (1234567, float("nan"), 1, True, "1.23457e+06"),
        (13.512345, float("nan"), 1, True, "13.512"),
    ],
)
def test_a_cell_has_mean_spread_and_seeds_unless_it_is_counted(ours, spread, n, counted, text):
    cell = SimpleNamespace(ours=ours, spread=spread, n=n, counted=counted)
    assert cell_text(cell) == text
