"""How claims are judged, on a paper made for the test."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdbook import claims
from kdbook.claims import interval, judge


def seeds(*values):
    return dict(enumerate(values))


@pytest.fixture
def published(monkeypatch):
    """A paper: ``published(row=printed number, ...)`` in the column top1 of x/table1."""

    def publish(**cells):
        table = pd.DataFrame(
            [("x/table1", row, "top1", float(text), "%", "") for row, text in cells.items()],
            columns=["exhibit", "row", "column", "value", "unit", "note"],
        )
        table["digits"] = [len(text.partition(".")[2]) for text in cells.values()]
        monkeypatch.setattr(claims, "published", lambda: table)

    publish()
    return publish


@pytest.fixture
def verdicts(published, monkeypatch):
    """All verdicts on one claim; our cells by row (in the column top1) or by (row, column)."""

    def judged(claim, cells, faithful=True):
        about = {"id": "x/table1/claim", "exhibit": "x/table1", "statement": "", "where": ""}
        monkeypatch.setattr(claims, "all_claims", lambda: [{"column": "top1", **about, **claim}])
        cells = {k if isinstance(k, tuple) else (k, "top1"): v for k, v in cells.items()}
        return judge("x/table1", cells, faithful)

    return judged


@pytest.fixture
def verdict(verdicts):
    def only(*arguments, **options):
        (one,) = verdicts(*arguments, **options)
        return one

    return only


@pytest.mark.parametrize("tests", [1, 3])
def test_the_interval_is_students(tests):
    values = np.array([70.1, 71.3, 69.8, 70.6])
    scale = values.std(ddof=1) / 2
    expected = stats.t.interval(1 - 0.05 / tests, df=3, loc=values.mean(), scale=scale)
    assert interval(values, tests) == pytest.approx(expected)
    assert all(map(math.isnan, interval(values[:1], tests)))


# --- values ---------------------------------------------------------------------------------------

VALUE = {"kind": "value", "tolerance": 1.0}


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (seeds(70.0, 70.2, 70.1), "reproduced"),
        (seeds(69.5, 69.4, 69.6), "reproduced"),
        (seeds(75.0, 75.2, 75.1), "differs"),
        (seeds(65.0, 65.2, 65.1), "differs"),
        (seeds(70.5, 71.9, 70.9), "inconclusive"),
        (seeds(60.0, 70.0, 80.0), "inconclusive"),
        (seeds(70.0), "inconclusive"),
        (seeds(), "not run"),
    ],
)
def test_a_value_is_judged_by_its_whole_interval(verdict, published, ours, expected):
    published(a="70.0")
    assert verdict(VALUE, {"a": ours}).verdict == expected
    if expected != "not run":
        other = verdict(VALUE, {"a": ours}, faithful=False)
        assert (other.verdict, other.as_claimed) == ("direction only", None)


def test_the_estimate_of_a_value_is_its_difference_from_the_papers(verdict, published):
    published(a="70.0")
    ours = verdict(VALUE, {"a": seeds(71.0, 71.2, 71.4)})
    low, high = stats.t.interval(0.95, df=2, loc=1.2, scale=0.2 / math.sqrt(3))
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((1.2, low, high))
    assert (ours.paper, ours.tolerance, ours.unit, ours.n) == (70.0, 1.0, "%", 3)
    assert ours.as_claimed is None


def test_every_row_of_a_column_is_judged(verdicts, published):
    published(a="70.0", b="60.0", c="50.0")
    cells = {"a": seeds(70.0, 70.1), "b": seeds(65.0, 65.1)}
    assert {v.id: v.verdict for v in verdicts(VALUE, cells)} == {
        "x/table1/claim/a": "reproduced",
        "x/table1/claim/b": "differs",
        "x/table1/claim/c": "not run",
    }
    assert [v.id for v in verdicts(VALUE | {"rows": ["b"]}, cells)] == ["x/table1/claim/b"]


@pytest.mark.parametrize(
    ("printed", "ours", "expected"),
    [
        ("5.4", 5.449, "reproduced"),
        ("5.4", 5.45, "reproduced"),
        ("0.5", 0.55, "reproduced"),  # in floats 0.55 - 0.5 > 0.05
        ("5.4", 5.46, "differs"),
        ("11", 10.951, "reproduced"),
        ("11", 11.6, "differs"),
        ("0.25", 0.256, "differs"),
    ],
)
@pytest.mark.parametrize("faithful", [True, False])
def test_a_count_is_reproduced_to_the_printed_digit_in_every_profile(
    verdict, published, printed, ours, expected, faithful
):
    published(a=printed)
    claim = {"kind": "value", "tolerance": "printed", "deterministic": True}
    assert verdict(claim, {"a": {None: ours}}, faithful).verdict == expected


# --- gaps -----------------------------------------------------------------------------------------

GAP = {"kind": "gap", "contrast": {"a": 1, "b": -1}}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (seeds(71.0, 71.2, 71.1), seeds(70.0, 70.1, 70.2), "supported"),
        (seeds(69.0, 69.2, 69.1), seeds(70.0, 70.1, 70.2), "contradicted"),
        (seeds(71.0, 69.0, 71.1), seeds(70.0, 70.1, 70.2), "inconclusive"),
        (seeds(71.0), seeds(70.0), "inconclusive"),
        (seeds(71.0, 71.2), {}, "not run"),
        (seeds(71.0, 71.2), {7: 70.0, 8: 70.1}, "not run"),
    ],
)
def test_a_gap_is_judged_by_the_side_of_its_interval(verdict, a, b, expected):
    assert verdict(GAP, {"a": a, "b": b}).verdict == expected


def test_a_gap_is_paired_by_seed_and_has_the_papers_gap_beside_it(verdict, published):
    """Seeds differ by ten points, methods by one."""
    published(a="72.5", b="70.0")
    gap = verdict(GAP, {"a": seeds(60.9, 71.0, 81.1), "b": {2: 80.0, 1: 70.0, 0: 60.0}})
    assert (gap.verdict, gap.paper, gap.unit) == ("supported", 2.5, "%")
    assert gap.estimate == pytest.approx(1.0)
    assert (gap.low, gap.high) == pytest.approx(interval(np.array([0.9, 1.0, 1.1])))
    gap = verdict(GAP, {"a": seeds(70.9, 71.0, 71.1, 99.0), "b": seeds(70.0, 70.0, 70.0)})
    assert (gap.n, gap.estimate) == (3, pytest.approx(1.0))


def test_a_gap_must_exceed_its_margin(verdict):
    cells = {"a": seeds(70.4, 70.5, 70.45), "b": seeds(70.0, 70.0, 70.0)}
    assert verdict(GAP, cells).verdict == "supported"
    assert verdict(GAP | {"margin": 1.0}, cells).verdict == "contradicted"
    assert verdict(GAP | {"margin": -0.5}, cells).verdict == "supported"


@pytest.mark.parametrize(("a", "as_claimed"), [(71.0, True), (70.0, False), (69.0, False)])
def test_another_profile_gives_the_direction_only(verdict, a, as_claimed):
    gap = verdict(GAP, {"a": seeds(a, a), "b": seeds(70.0, 70.0)}, faithful=False)
    assert (gap.verdict, gap.as_claimed) == ("direction only", as_claimed)


def test_a_contrast_weighs_cells_of_several_columns(verdict):
    claim = {"kind": "gap", "contrast": {"a": 2, "a @ loss": -1, "b @ loss": 0.5}}
    cells = {"a": seeds(3.0, 4.0), ("a", "loss"): seeds(1.0, 1.0), ("b", "loss"): {None: 2.0}}
    gap = verdict(claim, cells)
    assert (gap.n, gap.estimate) == (2, pytest.approx(np.mean([2 * 3 - 1 + 1, 2 * 4 - 1 + 1])))


def test_a_counted_gap_is_judged_in_every_profile(verdict):
    cells, counted = {"a": {None: 3.0}, "b": {None: 2.0}}, GAP | {"deterministic": True}
    assert verdict(counted, cells, faithful=False).verdict == "supported"
    assert verdict(counted, cells | {"b": {None: 4.0}}, faithful=False).verdict == "contradicted"


# --- several gaps at once -------------------------------------------------------------------------

ORDER = {"kind": "ordering", "order": ["a", "b", "c"]}


def test_an_ordering_needs_every_step(verdict):
    a, b, c = seeds(72.0, 72.1, 72.2), seeds(71.0, 71.1, 71.0), seeds(69.0, 69.2, 69.1)
    ordering = verdict(ORDER, {"a": a, "b": b, "c": c})
    assert ordering.verdict == "supported"
    assert ordering.estimate == pytest.approx(np.mean([1.0, 1.0, 1.2]))
    assert verdict(ORDER, {"a": a, "b": c, "c": b}).verdict == "contradicted"
    assert verdict(ORDER, {"a": a, "b": b}).verdict == "not run"


def test_an_ordering_is_corrected_for_its_number_of_steps(verdict):
    """The first step is significant alone, but not as one of two."""
    step = np.array([0.5, 1.0, 1.1])
    assert interval(step, tests=2)[0] < 0 < interval(step)[0]
    cells = {"a": seeds(*step), "b": seeds(0.0, 0.0, 0.0), "c": seeds(-5.0, -5.1, -5.2)}
    assert verdict(ORDER, cells).verdict == "inconclusive"
    assert verdict(ORDER | {"order": ["a", "b"]}, cells).verdict == "supported"


@pytest.mark.parametrize(
    ("sense", "b", "c", "expected"),
    [
        ("max", 69.0, 68.0, "supported"),
        ("max", 69.0, 71.0, "contradicted"),
        ("min", 71.0, 72.0, "supported"),
        ("min", 69.0, 72.0, "contradicted"),
    ],
)
def test_the_best_beats_every_rival(verdict, sense, b, c, expected):
    claim = {"kind": "best", "cell": "a", "among": ["b", "c"], "sense": sense}
    cells = {"a": seeds(70.0, 70.1), "b": seeds(b, b + 0.1), "c": seeds(c, c + 0.1)}
    best = verdict(claim, cells)
    assert best.verdict == expected
    sign = 1 if sense == "max" else -1
    assert best.estimate == pytest.approx(min(sign * (70 - b), sign * (70 - c)))
    assert verdict(claim, {**cells, "c": {}}).verdict == "not run"


# --- equality and correlation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (seeds(70.0, 70.1, 70.2), "supported"),
        (seeds(71.0, 71.1, 71.2), "contradicted"),
        (seeds(69.0, 69.1, 69.2), "contradicted"),
        (seeds(70.4, 70.7, 70.1), "inconclusive"),
    ],
)
def test_equality_needs_the_interval_within_the_tolerance(verdict, a, expected):
    claim = GAP | {"kind": "equal", "tolerance": 0.5}
    equality = verdict(claim, {"a": a, "b": seeds(70, 70.1, 70.2)})
    assert (equality.verdict, equality.tolerance) == (expected, 0.5)


def points(x, y):
    cells = {(f"row {k}", "x"): seeds(value) for k, value in enumerate(x)}
    return cells | {(f"row {k}", "y"): seeds(value) for k, value in enumerate(y)}


CORRELATION = {"kind": "correlation", "x": "x", "y": "y"}
X = np.arange(12.0)
NOISE = np.random.default_rng(0).normal(size=12)


@pytest.mark.parametrize(
    ("bound", "y", "expected"),
    [
        ({"at_least": 0.8}, X + NOISE, "supported"),
        ({"at_least": 0.8}, X + 5 * NOISE, "inconclusive"),
        ({"at_least": 0.8}, -X + NOISE, "contradicted"),
        ({"at_most": -0.5}, -X + NOISE, "supported"),
        ({"at_most": -0.5}, X + NOISE, "contradicted"),
    ],
)
def test_a_correlation_is_judged_by_size_and_interval(verdict, bound, y, expected):
    found = verdict(CORRELATION | bound, points(X, y))
    pearson = stats.pearsonr(X, y if "at_least" in bound else -y)
    low, high = pearson.confidence_interval(0.95)
    assert (found.estimate, found.low, found.high) == pytest.approx((pearson.statistic, low, high))
    assert (found.verdict, found.as_claimed) == (expected, pearson.statistic > 0)
    assert found.n == 12


def test_a_correlation_needs_three_rows_an_interval_four(verdict):
    claim = CORRELATION | {"at_least": 0.8}
    assert verdict(claim, points(X[:2], X[:2])).verdict == "not run"
    three = verdict(claim, points(X[:3], [0, 2, 3]))
    assert (three.verdict, three.as_claimed) == ("inconclusive", True)
    assert math.isnan(three.low)


def test_a_correlation_with_equal_values_is_inconclusive(verdict):
    found = verdict(CORRELATION | {"at_least": 0.8}, points(X, 0 * X))
    assert (found.verdict, found.as_claimed, found.n) == ("inconclusive", None, 12)
    assert math.isnan(found.estimate)


def test_an_unknown_kind_of_claim_is_named(verdict):
    with pytest.raises(ValueError, match="x/table1/claim has the unknown kind 'guess'"):
        verdict({"kind": "guess"}, {})
