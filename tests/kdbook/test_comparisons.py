"""Gains and margins of an exhibit's methods."""

import numpy as np
import pytest

from kdbook.comparisons import gains, row_gains
from kdbook.contrasts import interval
from kdbook.exhibits import Exhibit
from kdbook.profiles import open_profile


def exhibit(name, cells):
    made = Exhibit(name, open_profile("smoke"))
    made.cells.update(cells)
    return made


def test_gains_of_columns_are_paired_by_seed_and_positive_where_errors_fall():
    row = "resnet20<-resnet56"
    cells = {(row, "student"): {0: 8.0, 1: 9.0, 2: 7.0}, (row, "kd"): {1: 7.5, 0: 7.0}}
    table = gains(exhibit("stc/table1", cells), over="student")
    ours = np.array([8.0 - 7.0, 9.0 - 7.5])
    assert table.ours[row, "kd"] == pytest.approx(ours.mean())
    assert (table.low[row, "kd"], table.high[row, "kd"]) == pytest.approx(interval(ours))
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
    assert (table.low["KR"], table.high["KR"]) == pytest.approx(interval(np.array([1.0, 3.0])))
    assert table.paper["KR"] == pytest.approx(90.65 - 87.91)
    assert np.isnan(table.ours["FSP"])
    assert table.ours["own"] == -1
    assert np.isnan([table.paper["own"], table.low["own"]]).all()
    assert table.index[0] == "Teacher"
    assert table.index[-1] == "own"
