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
