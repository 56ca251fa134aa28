"""The search's tables and pictures."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kdbook import search
from kdbook.profiles import PROFILES, Profile
from kdlib import Recipe, Run, build_model, count_cost
from kdlib.models.architecture import Architecture
from kdlib.models.channels import Channels

MODEL = "densenet-bc-16-4"
RUN = Run("digits", MODEL, Recipe(2, 16, 0.05), images=128)


@pytest.fixture
def found():
    """A random architecture inside a DenseNet."""
    channels, random = Channels(build_model(MODEL, classes=10), 32), np.random.default_rng(0)
    kept = channels.remaining({r.name: random.random(r.channels) < 0.6 for r in channels.gated})
    return Architecture.of(MODEL, channels, kept)


def test_gates_close_in_fewer_steps_in_a_shorter_profile():
    found = {n: search.gate_settings(p, strength=1e-3, rate=0.01) for n, p in PROFILES.items()}
    assert found["smoke"] == {"strength": 0.8, "rate": 0.05}
    assert found["course"] == {"strength": 0.003, "rate": 0.03}
    assert found["paper"] == {"strength": 1e-3, "rate": 0.01}
    own = Profile(name="own", epoch_scale=1, seeds=(0,))
    with pytest.raises(KeyError):  # no factors without a choice
        search.gate_settings(own, 1e-3, 0.01)


def test_drop_rates_are_sorted_into_blocks(found):
    rates = search.drop_rates(found)
    blocks = search.dense_blocks(rates)
    assert len(blocks) == 3
    kinds = rates.layer.str.split(".").str[-1]
    assert sum(len(b.inputs) for b in blocks) == (kinds == "conv1").sum()
    assert sum(len(b.bottlenecks) for b in blocks) == (kinds == "conv2").sum()
    assert [b.transition.empty for b in blocks] == [False, False, True]
    assert (blocks[0].skips.source >= 0).all()
    assert blocks[0].into_last.layer.nunique() == 1


def test_a_heat_map_shows_every_drop_rate(found):
    blocks = search.dense_blocks(search.drop_rates(found))
    figure = plt.figure()
    search.draw_dense_blocks(figure, blocks)
    shown = [a.collections[0].get_array() for a in figure.axes[:3] if a.collections]
    for rates, block in zip(shown, blocks, strict=True):
        inputs = block.inputs.pivot(index="source", columns="layer", values="drop_rate")
        np.testing.assert_array_equal(np.ma.filled(rates, np.nan), inputs.to_numpy())
    plt.close(figure)


def test_the_pareto_front_has_no_point_that_another_beats():
    cost = pd.Series({"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 1.0})
    error = pd.Series({"a": 9.0, "b": 5.0, "c": 6.0, "d": 5.0, "e": 9.0})
    assert search.pareto(cost, error) == ["a", "e", "b"]


def test_costs_and_latencies_are_those_of_each_network():
    runs = {"one": RUN, "two": replace(RUN, model="resnet8-x0.25")}
    models = [build_model(run.model, classes=10, channels=1) for run in runs.values()]
    costs = [count_cost(model, 8) for model in models]
    assert [search.cost_of(run) for run in runs.values()] == costs
    table = search.latencies(runs, batch=8, rounds=2)
    cpu = table[table.device == "cpu"]
    assert cpu.index.tolist() == ["one", "two"]
    assert cpu["MACs, M"].tolist() == pytest.approx([c.macs / 1e6 for c in costs], abs=1e-3)
    assert cpu["parameters, M"].tolist() == pytest.approx([c.params / 1e6 for c in costs], abs=1e-3)
    assert (cpu["ms a batch"] > 0).all()
