"""Pruned networks against gated networks."""

from copy import deepcopy
from itertools import count

import numpy as np
import pytest
import torch
from gated import BOTTLENECKS, SMALL, close, gated_logits, gates_of, images, lively
from torch import nn

from kdlib import count_cost
from kdlib.models import load_weights
from kdlib.models.channels import Channels
from kdlib.models.pruned import prune


def extracted(network, gates):
    whole = deepcopy(network)
    load_weights(whole, network.state_dict() | gates(network))
    return prune(whole, gates.channels, gates.kept())


def assert_same(network, gates):
    """Gated and pruned network have the same logits, in eval mode and in a training step."""
    x, before = images(count=8), deepcopy(network.state_dict())
    pruned = extracted(network, gates)
    assert all(map(torch.equal, network.state_dict().values(), before.values()))
    for training in (False, True):
        with torch.no_grad():
            expected = gated_logits(network.train(training), gates, x)
            got = pruned.train(training)(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale)
    return pruned


def some_gates(network, closed):
    """Gates that leave a path to the logits."""
    for seed in count():
        gates = gates_of(network, closed, seed)
        if gates.kept()[gates.channels.readers[-1].name].any():
            return gates


@pytest.mark.parametrize("closed", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("name", [*SMALL, BOTTLENECKS])
def test_a_pruned_network_is_the_gated_network(name, closed):
    network = lively(name)
    gates = some_gates(network, closed)
    pruned = assert_same(network, gates)
    assert count_cost(pruned, 8).macs == gates.macs()
    assert count_cost(pruned, 8).params < count_cost(network, 8).params


@pytest.mark.parametrize("name", SMALL)
def test_with_all_gates_open_it_is_the_whole_network_bit_for_bit(name):
    network, x = lively(name), images()
    channels = Channels(network, 8)
    everything = channels.remaining(channels.split(np.ones(sum(channels.sizes), bool)))
    pruned = prune(network, channels, everything)
    assert not any(module.training for module in pruned.modules())
    assert torch.equal(pruned(x), network(x))
    assert torch.equal(pruned.train()(x), network.train()(x))
    assert pruned.state_dict().keys() == network.state_dict().keys()
    assert count_cost(pruned, 8) == count_cost(network, 8)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("densenet-bc-16-4", None),
        ("densenet-bc-16-4", ["body.1.2"]),  # a transition
        ("vgg13-x0.06", None),
        *(("vgg13-x0.06", [layer]) for layer in ("body.0.0", "body.2.1", "body.4.4")),
    ],
)
def test_a_network_without_a_path_from_image_to_logits_is_refused(name, layers):
    network = lively(name)
    gates = close(gates_of(network), *layers) if layers else gates_of(network, closed=1.1)
    assert gates.macs() == 0
    with pytest.raises(ValueError, match="nothing is left of the network"):
        extracted(network, gates)


def test_all_residual_blocks_can_be_removed_but_for_their_shortcuts():
    network = lively("resnet8-x0.25")
    gates = gates_of(network, closed=1.1)
    pruned = assert_same(network, gates)
    convolutions = [name for name, m in pruned.named_modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == ["stem.0", "body.1.0.0.0", "body.2.0.0.0"]


@pytest.mark.parametrize("conv", ["conv1", "conv2"])
@pytest.mark.parametrize("layer", ["body.0.0", "body.0.1", "body.1.4", "body.2.5"])
def test_a_dense_layer_without_one_convolution_is_removed(layer, conv):
    network = lively("densenet-bc-16-4")
    pruned = assert_same(network, close(gates_of(network, 0.2), f"{layer}.{conv}"))
    assert not list(pruned.get_submodule(layer).parameters())


@pytest.mark.parametrize("reader", ["body.0.1.conv1", "body.1.2"])
def test_a_connection_can_be_empty(reader):
    network = lively("densenet-bc-16-4")
    gates = close(gates_of(network, 0.1, seed=1), reader, source="stem.0")
    assert not gates.kept()[reader][:8].any()
    assert_same(network, gates)


def test_a_dense_layer_without_readers_is_removed():
    network = lively("densenet-bc-16-4")
    gates = gates_of(network)
    readers = [reader.name for reader in gates.channels.gated]
    close(gates, *readers, source="body.0.1.conv2")
    pruned = assert_same(network, gates)
    assert not list(pruned.get_submodule("body.0.1").parameters())
    assert pruned.get_submodule("body.1.2").in_channels == 12  # the stem's 8 and one layer's 4


def test_a_dense_layer_with_a_removed_reader_only_is_removed():
    network = lively("densenet-bc-22-4")
    gates = gates_of(network)
    close(gates, "body.0.2.conv2")
    close(gates, "body.1.2", source="body.0.1.conv2")
    pruned = assert_same(network, gates)
    for layer in ("body.0.1", "body.0.2"):
        assert not list(pruned.get_submodule(layer).parameters())
    assert list(pruned.get_submodule("body.0.0").parameters())


@pytest.mark.parametrize("layer", ["convs.0", "convs.1"])
@pytest.mark.parametrize("block", ["body.0.1", "body.1.0", "body.1.1"])
def test_a_removed_residual_block_keeps_its_shortcut(block, layer):
    network = lively("resnet14-x0.25")
    pruned = assert_same(network, close(gates_of(network, 0.2), f"{block}.{layer}"))
    shortcut = network.get_submodule(f"{block}.shortcut")
    left = pruned.get_submodule(block)
    assert list(map(len, left.parameters())) == list(map(len, shortcut.parameters()))
    x = images(channels={"body.0.1": 4, "body.1.0": 4, "body.1.1": 8}[block])
    before = x.clone()
    torch.testing.assert_close(left.eval()(x), shortcut.eval()(x).relu())
    assert torch.equal(x, before)


@pytest.mark.parametrize("k", range(3))
def test_a_bottleneck_block_without_one_convolution_is_removed(k):
    network, block = lively(BOTTLENECKS), ("body.0.0", "body.1.1", "body.2.0")[k]
    pruned = assert_same(network, close(gates_of(network, 0.1), f"{block}.convs.{k}"))
    assert not isinstance(pruned.get_submodule(block), type(network.get_submodule(block)))
