"""Labels and lines of figures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kdbook import figures


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("kd", "KD"),
        ("at_kd", "AT+KD"),
        ("softmax", "trained from scratch"),
        ("none, rate x2", "no penalty, rate ×2"),
        ("KR+KDGAN", "KR+KDGAN"),
    ],
)
def test_labels_are_the_names_of_the_field(key, name):
    assert figures.method_name(key) == name


def test_a_mean_has_a_band_from_the_smallest_seed_to_the_largest():
    table = pd.DataFrame({"epoch": [1, 2, 1, 2], "y": [1.0, 2.0, 3.0, 8.0], "seed": [0, 0, 1, 1]})
    figure, axes = plt.subplots()
    figures.draw_mean(axes, table, "epoch", "y", "KD", figures.LOOKS[1])
    (line,) = axes.get_lines()
    assert line.get_label() == "KD"
    assert line.get_color() == figures.OKABE_ITO[1]
    np.testing.assert_allclose(line.get_xydata(), [[1, 2], [2, 5]])
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} >= {(1, 1), (1, 3), (2, 2), (2, 8)}
    plt.close(figure)


def test_a_gain_far_from_the_papers_is_a_number_at_the_end_of_the_axis():
    gains = pd.DataFrame(
        {"paper": [1.0, 2.0, None], "ours": [0.5, -30.0, -3.0], "low": None, "high": None},
        index=["NST", "KR", "KD"],
        dtype=float,
    )
    _, axes = plt.subplots()
    figures.draw_gains(axes, gains)
    figures.break_axis(axes, gains)
    low, high = axes.get_xlim()
    assert -6 < low < -3
    assert 2 < high < 6
    assert [(t.get_text(), t.xy[1]) for t in axes.texts] == [("◂ -30.0", 1)]


def test_an_axis_without_such_a_gain_stays_whole():
    gains = pd.DataFrame({"paper": [1.0], "ours": [-1.5], "low": [-2.0], "high": [-1.0]}, ["KR"])
    _, axes = plt.subplots()
    figures.draw_gains(axes, gains)
    before = axes.get_xlim()
    figures.break_axis(axes, gains)
    assert axes.get_xlim() == before
    assert not axes.texts
