"""Channels: readers, costs, and what remains when gates are closed."""

import numpy as np
import pytest
import torch
from gated import BOTTLENECKS, SMALL

from kdlib import build_model, count_cost
from kdlib.models.channels import Channels, read_channels
from kdlib.models.pruned import prune


def channels_of(name, size=8, classes=5, images=1):
    network = build_model(name, classes, images, seed=0)
    return network, Channels(network, size)


def at_random(channels, closed, seed):
    return np.random.default_rng(seed).random(sum(channels.sizes)) >= closed


def remaining(channels, flat):
    return channels.remaining(channels.split(flat))


def without(channels, *gates):
    flat = np.ones(sum(channels.sizes), bool)
    flat[list(gates)] = False
    return remaining(channels, flat)


def cost(network, channels, kept, size=8):
    return count_cost(prune(network, channels, kept), size).macs


# --- cost of a pruned network ---------------------------------------------------------------------


@pytest.mark.parametrize(("size", "closed"), [(8, 0.2), (32, 0.6), (7, 0.4)])
@pytest.mark.parametrize("name", [*SMALL, "resnet8-x0.25", BOTTLENECKS])
def test_the_cost_is_that_of_the_pruned_network(name, size, closed):
    network, channels = channels_of(name, size)
    assert channels.total_macs == count_cost(network, size).macs
    kept = remaining(channels, at_random(channels, closed, seed=1))
    left = kept[channels.readers[-1].name].any()
    assert channels.macs(kept) == (cost(network, channels, kept, size) if left else 0)


def test_the_papers_teacher_has_its_gates_and_its_cost():
    """8832 inputs of dense layers, 48 · 48 bottlenecks, 516 inputs of transitions."""
    network, channels = channels_of("densenet-bc-100-12", 32, classes=10, images=3)
    counts = {"conv1": 0, "conv2": 0, "transition": 0}
    for reader in channels.gated:
        kind = reader.name.split(".")[-1]
        counts[kind if kind in counts else "transition"] += reader.channels
    assert counts == {"conv1": 8832, "conv2": 2304, "transition": 516}
    assert [r.channels for r in channels.readers if not r.gated] == [3, 342]
    assert channels.total_macs == count_cost(network, 32).macs
    assert channels.total_macs / 1e6 == pytest.approx(287.9, abs=0.05)


# --- savings of a gate ----------------------------------------------------------------------------


LOOKED_AT = {BOTTLENECKS: "1.convs.1"}  # of many alike


@pytest.mark.parametrize("name", ["resnet8-x0.25", BOTTLENECKS, "vgg13-x0.06"])
def test_a_gate_saves_the_difference_in_cost(name):
    network, channels = channels_of(name)
    savings = channels.savings()
    assert savings.shape == (sum(channels.sizes),)
    begin = 0
    for reader in channels.gated:
        gate = begin + reader.channels // 2
        begin += reader.channels
        if reader.name.endswith(LOOKED_AT.get(name, "")) and reader.channels > 1:
            left = cost(network, channels, without(channels, gate))
            assert channels.total_macs - left == savings[gate], reader.name


def test_gates_of_a_densenet_save_the_difference_unless_an_output_has_no_other_reader():
    """The transition is the only reader of the layer before it."""
    network, channels = channels_of("densenet-bc-16-4")
    savings, gate, differ = channels.savings(), 0, set()
    for reader in channels.gated:
        for connection in reader.inputs:
            for k in range(connection.channels):
                saved = channels.total_macs - channels.macs(without(channels, gate))
                if k == 0:
                    assert saved == channels.total_macs - cost(
                        network, channels, without(channels, gate)
                    )
                if saved != savings[gate]:
                    differ.add((reader.name, connection.source))
                    assert (
                        saved - savings[gate]
                        == 16 * 9 * {"body.1.2": 64, "body.2.2": 16}[reader.name]
                    )
                gate += 1
    assert differ == {("body.1.2", "body.0.1.conv2"), ("body.2.2", "body.1.5.conv2")}


def test_gates_of_the_papers_teacher_save_by_closed_forms():
    """4k·HW at a dense layer, (C_in + 9k)·HW at a bottleneck, C_out·HW at a transition."""
    _, channels = channels_of("densenet-bc-100-12", 32, classes=10, images=3)
    inputs, growth, expected = 24, 12, []
    for block, area in enumerate((32**2, 16**2, 8**2)):
        if block:
            expected += [inputs // 2 * 4 * area] * inputs
            inputs //= 2
        for _ in range(16):
            expected += [4 * growth * area] * inputs
            expected += [(inputs + 9 * growth) * area] * 4 * growth
            inputs += growth
    assert channels.savings().tolist() == expected


# --- remaining channels ---------------------------------------------------------------------------


def test_remaining_channels_remain():
    _, channels = channels_of("densenet-bc-22-4")
    for seed in range(5):
        kept = remaining(channels, at_random(channels, 0.6, seed))
        again = channels.remaining(kept)
        assert all((again[name] == kept[name]).all() for name in kept)


def test_readers_have_the_inputs_of_their_layers():
    network, channels = channels_of("densenet-bc-22-4")
    for reader in channels.readers:
        layer = network.get_submodule(reader.name)
        inputs = getattr(layer, "in_channels", None) or layer.in_features
        assert reader.channels == inputs
        if reader.norm:
            assert network.get_submodule(reader.norm).num_features == inputs
    (transition,) = (r for r in channels.readers if r.name == "body.1.2")
    assert [c.source for c in transition.inputs] == [
        "stem.0",
        "body.0.0.conv2",
        "body.0.1.conv2",
        "body.0.2.conv2",
    ]


def test_a_network_on_the_meta_device_has_the_same_cost():
    with torch.device("meta"):
        network = build_model("densenet-bc-16-4", 5, 1)
    _, channels = channels_of("densenet-bc-16-4")
    assert Channels(network, 8).total_macs == channels.total_macs


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wrn-10-1-x0.25", "Block"),
        ("googlenet-x0.05", "Inception"),
        ("shufflenetv2-x0.1", "Unit"),
        ("mobilenetv2-x0.1", "InvertedResidual"),
    ],
)
def test_a_network_without_gates_is_refused(name, kind):
    with pytest.raises(ValueError, match=rf"no gates for a {kind} \(body.0.0\)"):
        read_channels(build_model(name, 5, 1, seed=0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet8-x0.25", []),
        ("densenet-bc-16-4", [("body.1.2", 8), ("body.2.2", 8)]),  # transitions read the stem's 8
        ("vgg13-x0.06", None),
    ],
)
def test_one_gate_must_stay_open_where_no_other_path_is_left(name, expected):
    _, channels = channels_of(name)
    begins = np.cumsum([0, *channels.sizes]).tolist()
    names = dict(zip(begins, [reader.name for reader in channels.gated], strict=False))
    got = [(names[begin], end - begin) for begin, end in channels.keep_one]
    assert got == ([(r.name, r.channels) for r in channels.gated] if expected is None else expected)
    for begin, _ in channels.keep_one:
        closed = range(begin, begin + channels.sizes[list(names).index(begin)])
        assert channels.macs(without(channels, *closed)) == 0
        assert channels.macs(without(channels, *closed[1:])) > 0
