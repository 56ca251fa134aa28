"""KR's tables, against numpy."""

from types import SimpleNamespace

import numpy as np
import pytest

from kdbook.kr import kernel_sparsity, kernels, training_curve
from kdlib import Penalised, train


@pytest.mark.parametrize("term", ["ce", "base"])
def test_a_curve_is_read_from_the_record(term):
    curve = {"every": 4, term: [2.5, 1.25, 0.5]}
    table = training_curve(SimpleNamespace(summary={"curve": curve}))
    assert [*table.columns] == ["iteration", term]
    assert table.iteration.tolist() == [4, 8, 12]
    assert table[term].tolist() == [2.5, 1.25, 0.5]


def test_a_run_without_a_curve_is_refused(tiny):
    trained = train([tiny(epochs=1, model="lenet")])[0]
    with pytest.raises(ValueError, match=r"no curve. Train with Penalised\(\)"):
        training_curve(trained)


@pytest.fixture
def lenet(tiny):
    """A trained LeNet and the weights of its convolutions."""
    trained = train([tiny(epochs=1, model="lenet", method=Penalised())])[0]
    return trained, [w.detach().numpy() for w in trained.model().parameters() if w.ndim == 4]


def test_kernels_are_a_table_of_the_weights_of_one_convolution(lenet):
    trained, weights = lenet
    for layer, expected in enumerate(weights):
        table = kernels(trained, layer)
        assert [*table.columns] == ["output", "input", "row", "column", "weight"]
        places = table[["output", "input", "row", "column"]]
        assert not places.duplicated().any()
        assert (places.max() + 1).tolist() == [*expected.shape]
        found = expected[tuple(places.to_numpy().T)]
        np.testing.assert_allclose(table.weight, found, atol=6e-6)


def test_sparsity_is_counted_for_each_convolution(lenet):
    trained, weights = lenet
    table = kernel_sparsity(trained)
    assert table.layer.tolist() == ["stem.0.weight", "body.0.0.weight"]
    assert table.weights.tolist() == [w.size for w in weights] == [150, 2400]
    counts = [int((np.abs(w) < np.abs(w).max() / 100).sum()) for w in weights]
    assert table.negligible.tolist() == counts
    assert counts[1] > 0
    for measured, w in zip(table.hoyer, weights, strict=True):
        norm, root = np.sqrt((w.astype(float) ** 2).sum()), np.sqrt(w.size)
        by_hand = (root - np.abs(w).sum() / norm) / (root - 1)
        assert measured == pytest.approx(by_hand, abs=1e-5)
