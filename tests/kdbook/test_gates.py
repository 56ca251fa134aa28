"""What decides which gates close: the measurements of search/figure5, on a tiny search."""

import numpy as np
import pytest
from found_students import MODEL, TEACHER, search

from kdbook import gates
from kdlib import measure, train
from kdlib.chains.found import architecture, channels_of, searched_modules
from kdlib.models.architecture import unsearched_architecture


@pytest.fixture
def trained():
    return train([TEACHER, search()])


def test_a_batch_norm_undoes_a_common_factor_but_no_choice_of_gates(trained):
    table = measure(trained[0], gates.shrinking, factors=[1, 0.5, 0.1]).set_index("gates")
    assert table.batch["all times 1"] == pytest.approx(0, abs=1e-6)
    uniform = table.batch[["all times 0.5", "all times 0.1"]].max()
    assert table.batch["a random half closed"] > 100 * uniform
    # running statistics still expect the old scale
    assert table.running["all times 0.1"] > 10 * table.batch["all times 0.1"]


def test_the_variance_of_gates_is_split_into_layers_and_the_rest(trained):
    row = gates.separation(trained[1], 6).iloc[0]
    found = searched_modules(trained[1], 6)["gates"]
    layers = [layer.numpy() for layer in found.values.split(found.channels.sizes)]
    assert row["within"] + row["between"] == pytest.approx(found.values.numpy().var(), rel=1e-5)
    inside = np.concatenate([layer - layer.mean() for layer in layers])
    assert row["within"] == pytest.approx((inside**2).mean(), rel=1e-5)
    assert row["share"] == pytest.approx(row["within"] / (row["within"] + row["between"]))


def test_agreement_is_the_share_of_closed_gates_in_common(trained):
    found = architecture(trained[1])
    assert gates.agreement(found, found) == 1
    channels = channels_of(TEACHER)
    whole = unsearched_architecture(MODEL, channels, channels.total_macs, 0)
    assert gates.agreement(found, whole) == 0
    other = gates.without_search(trained[1], by_savings=True)
    both, either = (
        f(gates.closed(found), gates.closed(other)).sum() for f in (np.minimum, np.maximum)
    )
    assert gates.agreement(found, other) == pytest.approx(both / either)


def test_the_share_of_a_search_that_ended_is_that_of_its_student(trained):
    share = gates.cost_share(trained[1])
    assert trained[1].final["macs_share"] < share <= trained[1].run.method.budget
    never = train([search(epochs=1, strength=1e-6)])[0]
    assert gates.cost_share(never) == 1
