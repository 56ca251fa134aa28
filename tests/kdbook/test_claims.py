"""How claims are judged, on a paper made for the test."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdbook import claims, estimates, wording
from kdbook import published as published_module
from kdbook.claims import judge


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
        for module in (claims, published_module):
            monkeypatch.setattr(module, "published", lambda: table)

    publish()
    return publish


@pytest.fixture
def verdicts(published, monkeypatch):
    """All verdicts on one claim; our cells by row (in the column top1) or by (row, column)."""

    def judged(claim, cells, scale="full", failed=None):
        about = {"id": "x/table1/claim", "exhibit": "x/table1", "statement": "", "where": ""}
        for module in (claims, estimates):
            monkeypatch.setattr(
                module, "all_claims", lambda: [{"column": "top1", **about, **claim}]
            )
        cells = {k if isinstance(k, tuple) else (k, "top1"): v for k, v in cells.items()}
        return judge("x/table1", cells, scale, failed)

    return judged


@pytest.fixture
def verdict(verdicts):
    def only(*arguments, **options):
        (one,) = verdicts(*arguments, **options)
        return one

    return only


def t_bound(values):
    """From a mean to its one-sided 95 % bound."""
    return stats.t.ppf(0.95, len(values) - 1) * stats.sem(values)


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
        (seeds(70.0), "no verdict"),
        (seeds(), "not run"),
    ],
)
def test_a_value_is_judged_by_its_whole_interval(verdict, published, ours, expected):
    published(a="70.0")
    assert verdict(VALUE, {"a": ours}).verdict == expected
    if expected not in ("not run", "no verdict"):
        assert verdict(VALUE, {"a": ours}, "reduced").verdict == "not comparable"


def test_the_estimate_of_a_value_is_its_difference_from_the_papers(verdict, published):
    published(a="70.0")
    ours = verdict(VALUE, {"a": seeds(71.0, 71.2, 71.4)})
    low, high = stats.t.interval(0.95, df=2, loc=1.2, scale=0.2 / math.sqrt(3))
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((1.2, low, high))
    assert (ours.paper, ours.tolerance, ours.unit, ours.n) == (70.0, 1.0, "%", 3)


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
@pytest.mark.parametrize("scale", ["full", "reduced", "smoke"])
def test_a_count_is_reproduced_to_the_printed_digit_in_every_profile(
    verdict, published, printed, ours, expected, scale
):
    published(a=printed)
    claim = {"kind": "value", "tolerance": "printed", "deterministic": True}
    assert verdict(claim, {"a": {None: ours}}, scale).verdict == expected


# --- gaps -----------------------------------------------------------------------------------------

GAP = {"kind": "gap", "contrast": {"a": 1, "b": -1}}


@pytest.mark.parametrize(
    ("a", "b", "full", "reduced"),
    [
        (seeds(71.0, 71.2, 71.1), seeds(70.0, 70.1, 70.2), "supported", "holds here"),
        (seeds(69.0, 69.2, 69.1), seeds(70.0, 70.1, 70.2), "contradicted", "reverses here"),
        (seeds(71.0, 69.0, 71.1), seeds(70.0, 70.1, 70.2), "inconclusive", "unresolved here"),
        (seeds(71.0), seeds(70.0), "no verdict", "no verdict"),
        (seeds(71.0, 71.0), seeds(70.0, 70.0), "inconclusive", "unresolved here"),
        (seeds(71.0, 71.2), {}, "not run", "not run"),
        (seeds(71.0, 71.2), {7: 70.0, 8: 70.1}, "not run", "not run"),
    ],
)
def test_a_gap_is_judged_by_its_bounds(verdict, a, b, full, reduced):
    cells = {"a": a, "b": b}
    assert verdict(GAP, cells).verdict == full
    assert verdict(GAP, cells, "reduced").verdict == reduced
    if full != "not run":
        smoke = verdict(GAP, cells, "smoke")
        assert (smoke.verdict, smoke.detail) == ("no verdict", "a smoke run is no evidence")


def test_a_gap_is_paired_by_seed_and_has_the_papers_gap_beside_it(verdict, published):
    """Seeds differ by ten points, methods by one."""
    published(a="72.5", b="70.0")
    gap = verdict(GAP, {"a": seeds(60.9, 71.0, 81.1), "b": {2: 80.0, 1: 70.0, 0: 60.0}})
    assert (gap.verdict, gap.paper, gap.unit) == ("supported", 2.5, "%")
    width = t_bound([0.9, 1.0, 1.1])
    assert (gap.low, gap.estimate, gap.high) == pytest.approx((1 - width, 1, 1 + width))
    assert (gap.resolution, gap.agree, gap.n) == (pytest.approx(width), 3, 3)
    assert gap.power > 0.99
    gap = verdict(GAP, {"a": seeds(70.9, 71.0, 71.1, 99.0), "b": seeds(70.0, 70.0, 70.0)})
    assert (gap.n, gap.estimate) == (3, pytest.approx(1.0))


def test_a_gap_must_exceed_its_margin_at_full_scale(verdict):
    cells = {"a": seeds(70.4, 70.5, 70.45), "b": seeds(70.0, 70.0, 70.0)}
    assert verdict(GAP, cells).verdict == "supported"
    assert verdict(GAP | {"margin": 1.0}, cells).verdict == "contradicted"
    assert verdict(GAP | {"margin": -0.5}, cells).verdict == "supported"
    assert verdict(GAP | {"margin": 1.0}, cells, "reduced").verdict == "holds here"


def test_below_full_scale_a_gap_is_judged_once(published, monkeypatch):
    """Of two claims on one gap, the one with a margin asks nothing of its own there."""
    about = {"exhibit": "x/table1", "column": "top1", "statement": "", "where": ""}
    both = [about | GAP | {"id": "x/table1/over"}]
    both += [about | GAP | {"id": "x/table1/clearly", "margin": 0.5}]
    for module in (claims, estimates):
        monkeypatch.setattr(module, "all_claims", lambda: both)
    cells = {("a", "top1"): seeds(71.0, 71.2, 71.1), ("b", "top1"): seeds(70.0, 70.1, 70.2)}
    assert [v.verdict for v in judge("x/table1", cells, "full")] == ["supported", "supported"]
    over, clearly = judge("x/table1", cells, "reduced")
    assert (over.verdict, clearly.verdict) == ("holds here", "not comparable")
    assert wording.verdict_text(clearly) == (
        "not comparable: the sign of this gap is judged as x/table1/over"
    )


def test_at_most_half_a_point_below_can_be_asked_at_full_scale_alone(verdict):
    cells = {"a": seeds(69.89, 69.9, 69.87), "b": seeds(70.0, 70.0, 70.0)}
    assert verdict(GAP | {"margin": -0.5}, cells).verdict == "supported"
    assert verdict(GAP | {"margin": -0.5}, cells, "reduced").verdict == "not comparable"


def test_the_size_of_a_gap_is_compared_at_full_scale_alone(verdict, published):
    published(a="71.0", b="70.0")
    claim = GAP | {"kind": "gain", "tolerance": 0.5}
    close = {"a": seeds(51.1, 51.2, 51.15), "b": seeds(50.0, 50.0, 50.0)}
    far = {"a": seeds(53.1, 53.2, 53.15), "b": seeds(50.0, 50.0, 50.0)}
    assert verdict(claim, close).verdict == "reproduced"
    assert verdict(claim, close).estimate == pytest.approx(0.15)
    assert verdict(claim, far).verdict == "differs"
    assert verdict(claim, far, "reduced").verdict == "not comparable"


def test_a_claim_on_one_network_is_judged_by_its_own_spread(verdict):
    random = np.random.default_rng(0)
    cells = {f"row {k}": seeds(*(70 + random.normal(0, 0.1, 3))) for k in range(9)}
    cells |= {"a": seeds(70.1, 71.0, 71.4), "b": seeds(70.0, 70.0, 70.0)}
    own = verdict(GAP | {"own_spread": True}, cells)
    assert own.resolution == pytest.approx(t_bound([0.1, 1.0, 1.4]))
    calm = cells | {"a": seeds(70.1, 70.2, 70.1)}
    assert verdict(GAP, calm).resolution != verdict(GAP | {"own_spread": True}, calm).resolution


def test_a_ratio_is_compared_as_a_logarithm(verdict, published):
    published(a="1.45", b="1.59")
    claim = GAP | {"kind": "gain", "log": True, "tolerance": 0.05}
    losses = {"b": seeds(3.0, 3.2, 3.1), ("c", "gap"): {0: -1.0}}
    close = {"a": seeds(2.74, 2.91, 2.83)}
    ratio = verdict(claim, losses | close)
    assert ratio.verdict == "reproduced"
    assert ratio.paper == pytest.approx(math.log(1.45 / 1.59))
    own = np.log([2.74 / 3.0, 2.91 / 3.2, 2.83 / 3.1]).mean()
    assert ratio.estimate == pytest.approx(own - ratio.paper)
    assert verdict(claim, losses | {"a": seeds(3.0, 3.21, 3.1)}).verdict == "differs"
    assert verdict(claim, losses | {"a": seeds(2.74, 0.0, 2.83)}).n == 2  # 0 has no logarithm
    assert verdict(claim, losses | {"a": seeds(3.0, 3.21, 3.1)}, "reduced").verdict == (
        "not comparable"
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (None, "no verdict"),
        (["b"], "no verdict"),
        (["c"], "supported"),
        ([("b", "top1")], "no verdict"),
        ([("b", "loss")], "supported"),
    ],
)
def test_a_failed_check_withholds_verdicts(verdict, rows, expected):
    cells = {"a": seeds(71.0, 71.2, 71.1), "b": seeds(70.0, 70.1, 70.2)}
    found = verdict(GAP, cells, failed={"The teacher is better.": rows})
    assert found.verdict == expected
    assert ("The teacher is better." in found.detail) == (expected == "no verdict")


def test_a_failed_check_of_another_row_leaves_the_value_of_a_row(verdicts, published):
    published(a="70.0", b="60.0")
    cells = {"a": seeds(70.0, 70.1), "b": seeds(60.0, 60.1)}
    found = verdicts(VALUE | {"rows": ["a", "b"]}, cells, failed={"Above chance.": ["b"]})
    assert [v.verdict for v in found] == ["reproduced", "no verdict"]


def test_a_contrast_weighs_cells_of_several_columns(verdict):
    claim = {"kind": "gap", "contrast": {"a": 2, "a @ loss": -1, "b @ loss": 0.5}}
    cells = {"a": seeds(3.0, 4.0), ("a", "loss"): seeds(1.0, 1.0), ("b", "loss"): {None: 2.0}}
    gap = verdict(claim, cells)
    assert (gap.n, gap.estimate) == (2, pytest.approx(np.mean([2 * 3 - 1 + 1, 2 * 4 - 1 + 1])))


@pytest.mark.parametrize("scale", ["full", "reduced", "smoke"])
def test_a_counted_gap_is_judged_in_every_profile(verdict, scale):
    cells, counted = {"a": {None: 3.0}, "b": {None: 2.0}}, GAP | {"deterministic": True}
    assert verdict(counted, cells, scale).verdict == "supported"
    assert verdict(counted, cells | {"b": {None: 4.0}}, scale).verdict == "contradicted"


# --- several gaps at once -------------------------------------------------------------------------

ORDER = {"kind": "ordering", "order": ["a", "b", "c"]}


def test_an_ordering_needs_every_step(verdict):
    a, b, c = seeds(72.0, 72.1, 72.2), seeds(71.0, 71.1, 71.0), seeds(69.0, 69.2, 69.1)
    ordering = verdict(ORDER, {"a": a, "b": b, "c": c})
    assert ordering.verdict == "supported"
    assert ordering.estimate == pytest.approx(np.mean([1.0, 1.0, 1.2]))
    assert verdict(ORDER, {"a": a, "b": c, "c": b}).verdict == "contradicted"
    assert verdict(ORDER, {"a": a, "b": b}).verdict == "not run"


def test_support_needs_no_correction_for_the_number_of_rivals_but_refutation_does(verdict):
    """Ten rivals, all one point behind: each gap is found alone, so all are."""
    rivals = [f"rival {k}" for k in range(10)]
    noise = np.random.default_rng(0).normal(0, 0.3, (11, 3))
    claim = {"kind": "best", "cell": "a", "among": rivals}
    cells = {rival: seeds(*(70 + noise[k])) for k, rival in enumerate(rivals)}
    ahead = verdict(claim, cells | {"a": seeds(*(71.5 + noise[10]))})
    behind = verdict(claim, cells | {"a": seeds(*(69.6 + noise[10]))})
    assert ahead.verdict == "supported"
    assert ahead.detail.startswith("a − rival")
    assert behind.agree == 0


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
    cells = {"a": seeds(70.0, 70.1), "b": seeds(b, b + 0.12), "c": seeds(c, c + 0.08)}
    best = verdict(claim, cells)
    assert best.verdict == expected
    sign = 1 if sense == "max" else -1
    assert best.estimate == pytest.approx(min(sign * (70 - b), sign * (70 - c)), abs=0.02)
    assert verdict(claim, {**cells, "c": {}}).verdict == "not run"


# --- equality, correlation, families --------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (seeds(70.0, 70.1, 70.25), "supported"),
        (seeds(71.0, 71.1, 71.25), "contradicted"),
        (seeds(69.0, 69.1, 69.25), "contradicted"),
        (seeds(70.4, 70.7, 70.1), "inconclusive"),
    ],
)
def test_equality_needs_the_bounds_within_the_tolerance(verdict, a, expected):
    claim = GAP | {"kind": "equal", "tolerance": 0.5}
    equality = verdict(claim, {"a": a, "b": seeds(70, 70.1, 70.2)})
    assert (equality.verdict, equality.tolerance) == (expected, 0.5)
    same = verdict(claim, {"a": seeds(4, 4, 4), "b": seeds(4, 4, 4)})
    assert same.verdict == "supported"
    assert verdict(claim, {"a": a, "b": seeds(70, 70.1, 70.2)}, "reduced").verdict == (
        "not comparable"
    )


CORRELATION = {"kind": "correlation", "x": "x", "y": "y"}
X = np.arange(12.0)
NOISE = np.random.default_rng(0).normal(size=(3, 12))


def points(x, ys):
    """Rows with one counted x, and one y for each seed."""
    cells = {(f"row {k}", "x"): {None: value} for k, value in enumerate(x)}
    return cells | {(f"row {k}", "y"): seeds(*values) for k, values in enumerate(np.transpose(ys))}


@pytest.mark.parametrize(
    ("bound", "y", "full", "reduced"),
    [
        ({"at_least": 0.8}, X + NOISE, "supported", "holds here"),
        ({"at_least": 0.99}, X + 2 * NOISE, "contradicted", "holds here"),
        ({"at_least": 0.8}, 20 * NOISE, "inconclusive", "unresolved here"),
        ({"at_least": 0.8}, -X + NOISE, "contradicted", "reverses here"),
        ({"at_most": -0.5}, -X + NOISE, "supported", "holds here"),
        ({"at_most": -0.5}, X + NOISE, "contradicted", "reverses here"),
    ],
)
def test_a_correlation_is_one_number_per_seed(verdict, bound, y, full, reduced):
    found = verdict(CORRELATION | bound, points(X, y))
    sign = 1 if "at_least" in bound else -1
    z = [np.arctanh(sign * stats.pearsonr(X, one).statistic) for one in y]
    expected = np.tanh([np.mean(z) - t_bound(z), np.mean(z), np.mean(z) + t_bound(z)])
    if sign < 0:  # the page shows the coefficient itself
        expected = -expected[::-1]
    assert (found.low, found.estimate, found.high) == pytest.approx(expected)
    assert (found.verdict, found.n) == (full, 3)
    assert verdict(CORRELATION | bound, points(X, y), "reduced").verdict == reduced


def test_many_points_on_one_curve_are_one_seed(verdict):
    """The slopes of three seeds disagree: the mean curve rises, but nothing is found."""
    slopes = [2 * X + NOISE[0], -X + NOISE[1], -0.5 * X + NOISE[2]]
    found = verdict(CORRELATION | {"at_least": 0.8}, points(X, slopes), "reduced")
    assert (found.verdict, found.agree) == ("unresolved here", 1)
    assert verdict(CORRELATION | {"at_least": 0.8}, points(X, slopes[:1])).detail == "one seed"


def test_a_correlation_needs_three_rows_that_differ(verdict):
    claim = CORRELATION | {"at_least": 0.8}
    assert verdict(claim, points(X[:2], NOISE[:, :2])).verdict == "not run"
    equal = verdict(claim, points(X, 0 * NOISE))
    assert equal.verdict == "no verdict"
    assert math.isnan(equal.estimate)


FAMILY = {
    "kind": "family",
    "column": "rco",
    "pairs": [["a", "a @ kd"], ["b", "b @ kd"], ["c", "c @ kd"]],
}


def test_a_family_has_one_verdict_on_its_mean_gap(verdict):
    gains = {"a": (1.0, 1.2, 0.8), "b": (2.0, 1.8, 2.2), "c": (-0.2, 0.1, 0.2)}
    cells = {(row, "kd"): seeds(70, 71, 69) for row in gains}
    cells |= {(row, "rco"): seeds(70 + g[0], 71 + g[1], 69 + g[2]) for row, g in gains.items()}
    found = verdict(FAMILY, cells, "reduced")
    means = np.mean(list(gains.values()), axis=0)
    assert (found.verdict, found.estimate) == ("holds here", pytest.approx(means.mean()))
    assert found.low == pytest.approx(means.mean() - t_bound(means))
    assert found.detail.endswith("of runs, 3 of 3 pairs")
    errors = verdict(FAMILY | {"sense": "min"}, cells, "reduced")
    assert (errors.verdict, errors.estimate) == ("reverses here", pytest.approx(-means.mean()))
    some = {cell: values for cell, values in cells.items() if cell[0] != "b"}
    assert verdict(FAMILY, some, "reduced").detail.endswith("2 of 3 pairs")


def test_wins_compare_every_run_with_every_rival(verdict):
    cells = {("a", "rco"): seeds(1, 2, 3), ("a", "kd"): seeds(0, 2, 5)}
    found = verdict(FAMILY, cells)
    wins = stats.mannwhitneyu([1, 2, 3], [0, 2, 5]).statistic / 9
    assert found.detail.startswith(f"wins {wins:.0%} [")


def test_a_value_a_gain_and_an_equality_have_a_two_sided_interval(verdicts, published):
    """All three are two one-sided tests at 2.5 %: the mean and the spread are the same here."""
    published(a="70.0", b="70.0")
    cells = {"a": seeds(70.1, 70.4, 70.3), "b": seeds(70.0, 70.0, 70.0)}
    rules = [VALUE | {"rows": ["a"]}, GAP | {"kind": "gain", "tolerance": 1.0, "own_spread": True}]
    rules += [GAP | {"kind": "equal", "tolerance": 1.0, "own_spread": True}]
    found = {(round(v.low, 9), round(v.high, 9)) for rule in rules for v in verdicts(rule, cells)}
    scale = stats.sem([0.1, 0.4, 0.3])
    (interval,) = found
    assert interval == pytest.approx(stats.t.interval(0.95, df=2, loc=0.8 / 3, scale=scale))


def test_an_unknown_kind_of_claim_is_named(verdict):
    with pytest.raises(ValueError, match="x/table1/claim has the unknown kind 'guess'"):
        verdict({"kind": "guess"}, {})
