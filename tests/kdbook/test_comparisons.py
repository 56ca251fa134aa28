"""Gains and margins of an exhibit's methods."""

import numpy as np
import pytest
from scipy import stats

from kdbook.claims import judge
from kdbook.comparisons import chances, gains, row_gains
from kdbook.exhibits import Exhibit
from kdbook.profiles import open_profile


def exhibit(name, cells):
    made = Exhibit(name, open_profile("smoke"))
    made.cells.update(cells)
    return made


def bounds(values):
    """One-sided 95 % bounds of a mean."""
    width = stats.t.ppf(0.95, len(values) - 1) * stats.sem(values)
    return pytest.approx((np.mean(values) - width, np.mean(values) + width))


def test_gains_of_columns_are_paired_by_seed_and_positive_where_errors_fall():
    row = "resnet20<-resnet56"
    cells = {(row, "student"): {0: 8.0, 1: 9.0, 2: 7.0}, (row, "kd"): {1: 7.5, 0: 7.0}}
    table = gains(exhibit("stc/table1", cells), over="student")
    ours = np.array([8.0 - 7.0, 9.0 - 7.5])
    assert table.ours[row, "kd"] == pytest.approx(ours.mean())
    assert (table.low[row, "kd"], table.high[row, "kd"]) == bounds(ours)
    assert table.paper[row, "kd"] == pytest.approx(7.78 - 7.19)
    assert table.ours[row, "student"] == 0


def test_gains_of_rows_are_paired_by_seed_and_positive_where_accuracies_rise():
    cells = {
        ("Student", "accuracy"): {0: 80.0, 1: 82.0},
        ("KR", "accuracy"): {0: 81.0, 1: 85.0},
        ("own", "accuracy"): {0: 79.0},
        ("KR", "params"): {None: 0.06},
    }
    table = row_gains(exhibit("kr/table1", cells), "accuracy", over="Student")
    assert table.ours["KR"] == pytest.approx(2)
    assert (table.low["KR"], table.high["KR"]) == bounds([1.0, 3.0])
    assert table.paper["KR"] == pytest.approx(90.65 - 87.91)
    assert np.isnan(table.ours["FSP"])
    assert table.ours["own"] == -1
    assert np.isnan([table.paper["own"], table.low["own"]]).all()
    assert table.index[0] == "Teacher"
    assert table.index[-1] == "own"


def test_two_rows_have_the_probability_of_a_one_sided_paired_t_test():
    a, b = {0: 80.0, 1: 82.0, 2: 81.0}, {0: 79.5, 1: 80.0, 2: 80.8}
    cells = {("A", "accuracy"): a, ("B", "accuracy"): b}
    table = chances(exhibit("book/methods", cells), ["A", "B"], "accuracy")
    p = stats.ttest_rel([*a.values()], [*b.values()], alternative="greater").pvalue
    assert table.loc["A", "B"] == pytest.approx(1 - p)
    assert table.loc["B", "A"] == pytest.approx(p)
    assert np.isnan(table.loc["A", "A"])


def test_the_spread_of_a_probability_is_that_of_the_whole_table():
    random = np.random.default_rng(0)
    noise = {row: random.normal(0, 1, 3) for row in "ABCDEF"}
    cells = {
        (row, "accuracy"): dict(enumerate(values - values.mean() + (row == "A")))
        for row, values in noise.items()
    }
    made = exhibit("book/methods", cells)
    alone = chances(made, ["A", "B"], "accuracy").loc["A", "B"]
    together = chances(made, "ABCDEF", "accuracy").loc["A", "B"]
    assert 0.5 < alone != together > 0.5


def test_one_seed_or_a_missing_row_has_no_probability():
    cells = {("A", "accuracy"): {0: 80.0}, ("B", "accuracy"): {0: 81.0}}
    table = chances(exhibit("book/methods", cells), ["A", "B", "C"], "accuracy")
    assert table.isna().all(axis=None)


def test_a_gain_has_the_bounds_of_the_verdict_on_the_same_gap():
    """Several pairs: the spread is pooled over the table, for the gain as for the verdict."""
    random, row = np.random.default_rng(0), "resnet20<-resnet56"
    columns = ("student", "ft", "ft_kd", "stc")
    rows = (row, "resnet20<-wrn40-1")
    values = {(r, c): random.normal(8, 0.3, 3) for r in rows for c in columns}
    made = exhibit("stc/table1", {cell: dict(enumerate(v)) for cell, v in values.items()})
    table = gains(made, over="ft_kd")
    claim = "stc/table1/kd-hurts-ft-resnet20-from-resnet56"
    (verdict,) = (v for v in judge("stc/table1", made.cells, "reduced") if v.id == claim)
    ours = table.loc[row, "ft"]
    assert (ours.ours, ours.low, ours.high) == (verdict.estimate, verdict.low, verdict.high)
    assert (ours.low, ours.high) != bounds(values[row, "ft_kd"] - values[row, "ft"])
