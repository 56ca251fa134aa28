"""The spread of contrasts is pooled where it may be; power is what an experiment would find."""

import numpy as np
import pytest
from scipy import stats

from kdbook.contrasts import estimate_gaps, interval, possible


def table(rows, columns, seeds):
    """Cells whose rows share an effect of the seed."""
    random = np.random.default_rng(1)
    shared = random.normal(0, 5, (rows, 1, seeds))
    values = shared + random.normal(size=(rows, columns, seeds))
    cells = {
        (f"r{r}", f"c{c}"): dict(enumerate(values[r, c]))
        for r in range(rows)
        for c in range(columns)
    }
    return cells, values


@pytest.mark.parametrize("tests", [1, 3])
def test_the_interval_is_students(tests):
    values = np.array([70.1, 71.3, 69.8, 70.6])
    scale = values.std(ddof=1) / 2
    expected = stats.t.interval(1 - 0.05 / tests, df=3, loc=values.mean(), scale=scale)
    assert interval(values, tests) == pytest.approx(expected)
    assert np.isnan(interval(values[:1], tests)).all()


def test_within_a_row_the_spread_of_all_rows_is_pooled():
    """By least squares: one parameter for each cell, and one for each row and seed."""
    cells, values = table(rows=3, columns=4, seeds=3)
    columns = {f"c{c}" for c in range(4)}
    gaps = estimate_gaps([{("r0", "c0"): 1, ("r0", "c1"): -1}], cells, columns)
    design = []
    for r, c, s in np.ndindex(values.shape):
        line = np.zeros((2, 3, 4))
        line[0, r, c] = line[1, r, s] = 1
        design.append(line.ravel())
    _, _, rank, _ = np.linalg.lstsq(np.array(design), values.ravel(), rcond=None)
    fitted = np.array(design) @ np.linalg.lstsq(np.array(design), values.ravel(), rcond=None)[0]
    df = values.size - rank
    variance = ((values.ravel() - fitted) ** 2).sum() / df
    assert gaps.df[0] == df == 3 * 3 * 2
    assert gaps.error[0] == pytest.approx(np.sqrt(2 * variance / 3))
    assert gaps.width()[0] == pytest.approx(stats.t.ppf(0.95, df) * gaps.error[0])


def test_within_a_column_only_the_column_is_pooled():
    cells, _ = table(rows=4, columns=2, seeds=3)
    gaps = estimate_gaps([{("r0", "c0"): 1, ("r1", "c0"): -1}], cells, {"c0", "c1"})
    assert gaps.df[0] == 3 * 2


@pytest.mark.parametrize(
    "contrast",
    [
        {("r0", "c0"): 1},
        {("r0", "c0"): 1, ("r0", "c1"): -1, ("r1", "c0"): -1, ("r1", "c1"): 1},
        {("r0", "c0"): 2, ("r0", "c1"): -1},
    ],
)
def test_other_contrasts_have_their_own_spread(contrast):
    cells, values = table(rows=2, columns=3, seeds=4)
    gaps = estimate_gaps([contrast], cells, {"c0", "c1", "c2"})
    own = sum(w * values[int(r[1]), int(c[1])] for (r, c), w in contrast.items())
    assert (gaps.error[0], gaps.df[0]) == (pytest.approx(stats.sem(own)), 3)


def test_a_contrast_that_spreads_more_than_the_table_keeps_its_own_spread():
    cells, values = table(rows=1, columns=6, seeds=3)
    wild = values[0, 0] + np.array([-40.0, 0.0, 40.0])
    cells["r0", "c0"] = dict(enumerate(wild))
    contrasts = [{("r0", f"c{c}"): 1, ("r0", f"c{c + 1}"): -1} for c in (0, 3)]
    wide, narrow = estimate_gaps(contrasts, cells, {f"c{c}" for c in range(6)}).df
    assert (wide, narrow) == (2, 2 * 5)


def test_measurements_of_one_network_keep_their_own_spread():
    """Levels of noise: all losses of a network move together, the strongest one most."""
    moves = np.random.default_rng(2).normal(0, 1, 4)
    cells = {(f"delta {k}", "loss"): dict(enumerate(k * moves)) for k in range(11)}
    ends = {("delta 10", "loss"): 1, ("delta 0", "loss"): -1}
    own = estimate_gaps([ends], cells, None)
    assert (own.error[0], own.df[0]) == (pytest.approx(stats.sem(10 * moves)), 3)
    middle = {("delta 6", "loss"): 1, ("delta 5", "loss"): -1}
    assert estimate_gaps([middle], cells, None).df[0] == 3
    assert estimate_gaps([middle], cells).df[0] == 10 * 3  # as if the levels were independent


def test_one_run_in_two_cells_counts_once():
    cells, _ = table(rows=1, columns=3, seeds=3)
    cells["r0", "c3"] = cells["r0", "c2"]
    gaps = estimate_gaps([{("r0", "c0"): 1, ("r0", "c1"): -1}], cells, {"c0", "c1", "c2", "c3"})
    assert gaps.df[0] == 2 * 2


def test_without_a_spread_there_is_no_bound():
    cells = {("a", "x"): {0: 0.3, 1: 0.1}, ("b", "x"): {0: 0.2, 1: 0.0}}
    gaps = estimate_gaps([{("a", "x"): 1, ("b", "x"): -1}], cells)
    assert np.isnan(gaps.width()).all()
    assert np.isnan(gaps.power([1.0]))
    assert estimate_gaps([{("a", "x"): 1, ("c", "x"): -1}], cells) is None


def test_the_power_of_one_gap_is_that_of_the_t_test():
    cells, _ = table(rows=1, columns=2, seeds=5)
    gaps = estimate_gaps([{("r0", "c0"): 1, ("r0", "c1"): -1}], cells, {"c0", "c1"})
    shift, critical = 1.5 / gaps.error[0], stats.t.ppf(0.95, 4)
    assert gaps.power([2.0], margin=0.5) == pytest.approx(
        stats.nct.sf(critical, 4, shift), abs=0.03
    )


@pytest.mark.parametrize(
    ("bounds", "unit", "difference", "expected"),
    [
        ((-1, 50), "%", False, False),
        ((1, 99), "%", False, True),
        ((-99, 99), "%", True, True),
        ((-175, 143), "%", True, False),
        ((-0.1, 2), "loss", False, False),
        ((-0.1, 2), "loss", True, True),
        ((0.5, 1.1), "r", False, False),
        ((-9, 9), "", False, True),
        ((np.nan, np.nan), "", False, False),
    ],
)
def test_an_interval_holds_possible_values(bounds, unit, difference, expected):
    assert possible(*bounds, unit, difference) is expected
