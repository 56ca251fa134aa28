"""The text of claims, verdicts and numbers."""

from types import SimpleNamespace

import pytest

from kdbook.claims import Verdict
from kdbook.wording import (
    cell_text,
    claim_text,
    estimate_text,
    own_text,
    rule_text,
    unit_text,
    verdict_table,
    verdict_text,
)


def verdict(kind="gap", estimate=0.7, **others):
    about = {"id": "x/table1/value-top1/a row", "exhibit": "x/table1", "statement": "All values."}
    others = {"where": "§1", "unit": "%", "verdict": "inconclusive", **others}
    return Verdict(**about, kind=kind, estimate=estimate, **others)


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"verdict": "supported", "detail": "a − b"}, "supported"),
        ({"verdict": "contradicted", "detail": "a − b"}, "contradicted (smallest gap: a − b)"),
        ({"verdict": "no verdict", "detail": "one seed"}, "no verdict: one seed"),
        (
            {"verdict": "unresolved here", "agree": 2, "n": 3, "resolution": 0.71, "paper": 0.5},
            "unresolved here (2 of 3 seeds agree; resolution ±0.71; the paper's gap is 0.5)",
        ),
        (
            {"verdict": "inconclusive", "agree": 2, "n": 3, "resolution": 0.71, "paper": 0.5},
            "inconclusive (2 of 3 seeds agree; resolution ±0.71; the paper's gap is 0.5)",
        ),
        (
            {"kind": "value", "verdict": "inconclusive", "n": 3, "resolution": 1.2, "paper": 70.0},
            "inconclusive (3 seeds; resolution ±1.2)",
        ),
        (
            {
                "kind": "family",
                "verdict": "holds here",
                "detail": "wins 90%, 4 of 16 pairs",
            },
            "holds here (wins 90%, 4 of 16 pairs)",
        ),
        ({"verdict": "not run", "detail": float("nan")}, "not run"),
    ],
)
def test_a_verdict_says_what_is_needed_beside_it(about, text):
    assert verdict_text(verdict(**about)) == text


@pytest.mark.parametrize(
    ("kind", "unit", "text"),
    [
        ("value", "%", "%"),
        ("gap", "%", "points"),
        ("gap", "loss", "loss"),
        ("correlation", "%", "r"),
        ("gap", float("nan"), ""),
    ],
)
def test_a_gap_of_percentages_is_in_points(kind, unit, text):
    assert unit_text(verdict(kind, unit=unit)) == text


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (None, "no claim"),
        ("The rule.", "The rule."),
        ({}, "not set"),
        ({"margin": 0.5, "headline": None}, "by more than 0.5; not a headline"),
        ({"margin": None}, "no margin"),
        ({"kind": "gap", "contrast": {"KD": -4, "GS": 1, "A": 1}}, "kind gap; GS + A − 4 · KD"),
        ({"order": ["a", "b"], "sense": "min"}, "a > b; the smallest is the best"),
        ({"cell": "a", "among": ["b", "c"]}, "a is better; than b, c"),
        ({"reconstruction": ["a"]}, "on our reading for a"),
        ({"pairs": [["a", "b"]] * 5}, "a over b, a over b, a over b, 2 more pairs"),
        ({"x": "delta", "y": "gap", "at_least": 0}, "between delta; and gap; r above 0"),
    ],
)
def test_a_rule_is_told_in_words(rule, text):
    assert rule_text(rule) == text


def test_a_reconstruction_has_a_column_of_its_own():
    own = verdict(verdict="supported", reconstruction=True)
    table = verdict_table([own, verdict(verdict="supported", headline=True, power=0.815)])
    assert table["our reading"].tolist() == ["supported", ""]
    assert table.verdict.tolist() == ["", "supported"]
    assert table.power.tolist() == ["", "82%"]
    assert table.index.tolist() == ["All values.", "★ All values."]
    assert "our reading" not in verdict_table([verdict(verdict="supported")])


def test_a_value_names_its_row():
    assert claim_text(verdict("value")) == "All values: a row"
    assert claim_text(verdict("gap")) == "All values."
    assert claim_text(verdict("family")) == "All values, on average over the pairs."


def test_an_estimate_has_its_interval():
    bounds = {"low": -0.25, "high": 1.5, "paper": 70.0}
    value, gap = verdict("value", **bounds), verdict("gap", **bounds)
    assert estimate_text(value) == "+0.7 from paper [-0.25, +1.5]"
    assert estimate_text(gap) == "+0.7 [-0.25, +1.5]"
    assert own_text(value) == "70.7 [69.75, 71.5]"
    assert own_text(gap) == "0.7 [-0.25, 1.5]"
    assert (estimate_text(verdict()), own_text(verdict())) == ("+0.7", "0.7")
    assert (estimate_text(verdict(estimate=float("nan")))) == ""


def test_an_impossible_interval_is_not_shown():
    assert estimate_text(verdict(low=-175.0, high=143.0)) == "+0.7"
    assert own_text(verdict("value", low=-1.0, high=2.0, paper=99.0)) == "99.7"


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
