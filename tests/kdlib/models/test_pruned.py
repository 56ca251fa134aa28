"""Smaller networks made of some channels of a larger one: exact, buildable by name, on file."""

import json
from copy import deepcopy
from itertools import count

import numpy as np
import pytest
import torch
from gated import BOTTLENECKS, SMALL, close, gated_logits, gates_of, images, lively, values_of
from torch import nn

from kdlib import build_model, count_cost
from kdlib.errors import StoreError, UnknownName
from kdlib.files import home, results
from kdlib.models import load_weights
from kdlib.models.architecture import MARK, Architecture, file_of
from kdlib.models.channels import Channels
from kdlib.models.names import count_stages
from kdlib.models.pruned import prune

# --- weights of the larger network ----------------------------------------------------------------


def extracted(network, gates):
    whole = deepcopy(network)
    load_weights(whole, network.state_dict() | gates(network))
    return prune(whole, gates.channels, gates.kept())


def assert_same(network, gates):
    """The gated network's logits are the pruned network's, in eval mode and in a training step."""
    x, pruned = images(count=8), extracted(network, gates)
    for training in (False, True):
        with torch.no_grad():
            expected = gated_logits(network.train(training), gates, x)
            got = pruned.train(training)(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * scale)
    return pruned


def some_gates(network, closed):
    """Gates that leave something of the network."""
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
def test_gradients_of_a_pruned_network_are_those_of_the_gated_one(name):
    """So both go on learning alike; here the image's gradient, which passes through all of it."""
    network = lively(name)
    gates, x = gates_of(network, closed=0.3), images()
    got, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    extracted(network, gates).train()(got).square().sum().backward()
    gated_logits(network.train(), gates, expected).square().sum().backward()
    scale = expected.grad.abs().max().item()
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-4 * scale)
    assert scale > 0


@pytest.mark.parametrize("name", SMALL)
def test_with_all_gates_open_it_is_the_whole_network_bit_for_bit(name):
    network, x = lively(name), images()
    channels = Channels(network, 8)
    everything = channels.settle(channels.split(np.ones(sum(channels.sizes), bool)))
    pruned = prune(network, channels, everything).eval()
    assert torch.equal(pruned(x), network(x))
    assert torch.equal(pruned.train()(x), network.train()(x))
    assert pruned.state_dict().keys() == network.state_dict().keys()
    assert count_cost(pruned, 8) == count_cost(network, 8)


@pytest.mark.parametrize("name", ["densenet-bc-16-4", "vgg13-x0.06"])
def test_of_closed_gates_alone_no_network_can_be_made(name):
    network = lively(name)
    gates = gates_of(network, closed=1.1)
    assert gates.macs() == 0
    with pytest.raises(ValueError, match="nothing is left of the network"):
        extracted(network, gates)


@pytest.mark.parametrize("layer", ["body.0.0", "body.2.1", "body.4.4"])
def test_a_chain_that_is_broken_anywhere_leaves_nothing(layer):
    network = lively("vgg13-x0.06")
    gates = close(gates_of(network), layer)
    with pytest.raises(ValueError, match="nothing is left"):
        extracted(network, gates)


def test_a_closed_transition_leaves_nothing():
    network = lively("densenet-bc-16-4")
    with pytest.raises(ValueError, match="nothing is left"):
        extracted(network, close(gates_of(network), "body.1.2"))


def test_residual_blocks_can_all_die_since_their_shortcuts_stay():
    network = lively("resnet8-x0.25")
    gates = gates_of(network, closed=1.1)
    pruned = assert_same(network, gates)
    convolutions = [name for name, m in pruned.named_modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == ["stem.0", "body.1.0.0.0", "body.2.0.0.0"]


@pytest.mark.parametrize("conv", ["conv1", "conv2"])
@pytest.mark.parametrize("layer", ["body.0.0", "body.0.1", "body.1.4", "body.2.5"])
def test_a_dense_layer_dies_with_either_of_its_convolutions(layer, conv):
    network = lively("densenet-bc-16-4")
    pruned = assert_same(network, close(gates_of(network, 0.2), f"{layer}.{conv}"))
    assert not list(pruned.get_submodule(layer).parameters())


@pytest.mark.parametrize("reader", ["body.0.1.conv1", "body.1.2"])
def test_a_connection_can_be_empty(reader):
    network = lively("densenet-bc-16-4")
    gates = close(gates_of(network, 0.1, seed=1), reader, source="stem.0")
    assert not gates.kept()[reader][:8].any()
    assert_same(network, gates)


def test_a_dense_layer_that_nobody_reads_dies():
    network = lively("densenet-bc-16-4")
    gates = gates_of(network)
    readers = [reader.name for reader in gates.channels.gated]
    close(gates, *readers, source="body.0.1.conv2")
    pruned = assert_same(network, gates)
    assert not list(pruned.get_submodule("body.0.1").parameters())
    assert pruned.get_submodule("body.1.2").in_channels == 12  # the stem's 8 and one layer's 4


def test_a_dense_layer_that_only_a_dead_one_reads_dies_with_it():
    network = lively("densenet-bc-22-4")
    gates = gates_of(network)
    close(gates, "body.0.2.conv2")
    close(gates, "body.1.2", source="body.0.1.conv2")
    pruned = assert_same(network, gates)
    for layer in ("body.0.1", "body.0.2"):
        assert not list(pruned.get_submodule(layer).parameters())
    assert list(pruned.get_submodule("body.0.0").parameters())


def test_growth_outputs_that_nobody_reads_are_not_computed():
    network, computed = lively("densenet-bc-16-4"), {}
    gates = gates_of(network)
    # Of the first layer's four outputs, which come after the stem's eight.
    layer, transition = (values_of(gates)[name] for name in ("body.0.1.conv1", "body.1.2"))
    layer[9] = transition[9] = transition[10] = 0
    pruned = extracted(network, gates)

    def note(module, _, output):
        computed[module] = output.shape[1]

    for module in pruned.modules():
        module.register_forward_hook(note)
    assert_same(network, gates)
    pruned(images())
    assert computed[pruned.get_submodule("body.0.0.conv2")] == 3
    assert computed[pruned.get_submodule("body.0.0")] == 8 + 3
    assert computed[pruned.get_submodule("body.0.1.norm1")] == 8 + 3
    assert computed[pruned.get_submodule("body.0.1")] == 8 + 3 + 4
    assert computed[pruned.get_submodule("body.1.0")] == 8 + 2 + 4


@pytest.mark.parametrize("layer", ["convs.0", "convs.1"])
@pytest.mark.parametrize("block", ["body.0.1", "body.1.0", "body.1.1"])
def test_of_a_dead_residual_block_its_shortcut_is_left(block, layer):
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
def test_a_bottleneck_block_dies_with_any_of_its_convolutions(k):
    network, block = lively(BOTTLENECKS), ("body.0.0", "body.1.1", "body.2.0")[k]
    pruned = assert_same(network, close(gates_of(network, 0.1), f"{block}.convs.{k}"))
    assert not isinstance(pruned.get_submodule(block), type(network.get_submodule(block)))


def test_the_larger_network_stays_as_it_was():
    network = lively("densenet-bc-16-4")
    before = {name: t.clone() for name, t in network.state_dict().items()}
    gates = gates_of(network, 0.5)
    prune(network, gates.channels, gates.kept())
    after = network.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert len(after) == len(before)


# --- by name --------------------------------------------------------------------------------------


def found(name="densenet-bc-16-4", closed=0.4, seed=0, classes=5, channels=1):
    """An architecture at random, and the network that it is, with weights of the whole one."""
    network = lively(name, seed, classes, channels)
    gates = gates_of(network, closed, seed)
    kept = gates.kept()
    return Architecture.of(name, gates.channels, kept), prune(network, gates.channels, kept)


def shapes(network):
    return {name: t.shape for name, t in network.state_dict().items()}


@pytest.mark.parametrize("name", [*SMALL, BOTTLENECKS])
def test_weights_of_a_pruned_network_fit_the_one_that_is_built_by_its_name(name):
    architecture, pruned = found(name)
    built = build_model(architecture.save(), classes=5, channels=1, seed=3)
    assert shapes(built) == shapes(pruned)
    load_weights(built, pruned.state_dict())
    x = images()
    assert torch.equal(built.eval()(x), pruned.eval()(x))
    assert torch.equal(built.train()(x), pruned.train()(x))


def test_stages_are_those_of_the_whole_network():
    architecture, pruned = found()
    x = images()
    assert count_stages(architecture.save()) == len(pruned.body) == 3
    for stage in range(4):
        assert torch.equal(pruned.eval().resume(stage, pruned.until(stage, x)), pruned(x))


def test_other_images_and_classes_are_no_other_architecture():
    architecture, _ = found()
    network = build_model(architecture.save(), classes=7, channels=3, seed=0)
    assert network(images(channels=3, size=16)).shape == (4, 7)


def test_initial_weights_depend_on_the_seed_alone():
    name = found()[0].save()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (build_model(name, 5, 1, seed=k).state_dict() for k in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if "norm" not in key and first[key].ndim > 1]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", ["densenet-bc-22-16", "vgg13-x0.5", "resnet20"])
def test_initial_weights_are_spread_as_the_smaller_layers_want_it(name):
    """He's √(2 / (outputs · k²)) for convolutions; ±1/√inputs for the linear layer."""
    architecture, _ = found(name, closed=0.5)
    network, ratios = build_model(architecture.save(), 100, 1, seed=0), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.weight[0, 0].numel())) ** 0.5
            if module.weight.numel() > 2000:
                ratios.append(module.weight.std().item() / expected)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            for tensor, value in (("weight", 1), ("bias", 0), ("running_mean", 0)):
                assert (getattr(module, tensor) == value).all()
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            assert module.weight.abs().max() <= bound
            assert module.weight.abs().max() > 0.95 * bound
            assert module.bias.abs().max() <= bound
            assert module.bias.any()
    assert len(ratios) > 3
    assert ratios == pytest.approx([1] * len(ratios), abs=0.06)


def test_a_head_with_fewer_inputs_draws_its_weights_for_these():
    network = lively("densenet-bc-22-16")
    gates = close(gates_of(network), *(f"body.2.{k}.conv1" for k in (4, 5, 6)))
    name = Architecture.of("densenet-bc-22-16", gates.channels, gates.kept()).save()
    (head,) = (m for m in build_model(name, 100, 1, seed=0).modules() if isinstance(m, nn.Linear))
    assert head.in_features == 44  # of 92
    assert 0.95 * 44**-0.5 < head.weight.abs().max() <= 44**-0.5


def test_a_network_is_named_by_what_it_keeps():
    (first, _), (again, _), (other, _) = found(seed=0), found(seed=0), found(seed=1)
    assert first.name == again.name != other.name
    assert first.name.startswith(f"densenet-bc-16-4{MARK}")
    elsewhere = Architecture("densenet-bc-16-4-x1.0", first.kept)
    assert elsewhere.name.partition(MARK)[2] != first.name.partition(MARK)[2]


def test_what_settles_to_the_same_network_has_the_same_name():
    network, names = lively("densenet-bc-16-4"), []
    for layers in (["body.0.1.conv1"], ["body.0.1.conv2"], ["body.0.1.conv1", "body.0.1.conv2"]):
        gates = close(gates_of(network), *layers)
        names.append(Architecture.of("densenet-bc-16-4", gates.channels, gates.kept()).name)
    assert len(set(names)) == 1


def test_an_architecture_file_says_all_in_plain_json():
    architecture, pruned = found()
    path = home() / file_of(architecture.save())
    content = json.loads(path.read_text())
    assert content["base"] == "densenet-bc-16-4"
    kept = content["kept"]["body.1.2"]
    assert set(kept) <= {"0", "1"}
    assert kept.count("1") == pruned.get_submodule("body.1.2").in_channels
    written = path.stat().st_mtime_ns
    assert architecture.save() == architecture.name
    assert path.stat().st_mtime_ns == written


def test_nothing_is_computed_under_the_meta_device():
    name = found()[0].save()
    with torch.device("meta"):
        network = build_model(name, classes=5, channels=1)
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}
    assert shapes(network) == shapes(build_model(name, classes=5, channels=1, seed=0))


def test_an_architecture_is_found_among_a_profiles_records():
    architecture, pruned = found()
    source = home() / file_of(architecture.save())
    committed = results() / "course" / "records" / source.name
    committed.parent.mkdir(parents=True)
    source.rename(committed)
    assert shapes(build_model(architecture.name, 5, 1, seed=0)) == shapes(pruned)
    assert not source.exists()


def test_an_architecture_that_is_nowhere_is_missed_by_name():
    architecture, _ = found()
    with pytest.raises(StoreError, match=rf"{architecture.name} is not in .*{home()}"):
        build_model(architecture.name, 5, 1)


@pytest.mark.parametrize(
    "damage",
    {
        "truncated": lambda text: text[: len(text) // 2],
        "empty": lambda text: "",
        "a list": lambda text: "[]",
        "without gates": lambda text: '{"base": "densenet-bc-16-4"}',
        "gates are a list": lambda text: '{"base": "densenet-bc-16-4", "kept": []}',
        "one gate moved": lambda text: text.replace("10", "01", 1),
        "another network": lambda text: text.replace("densenet-bc-16-4", "densenet-bc-22-4"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_architecture_is_refused(damage):
    name = found()[0].save()
    path = home() / file_of(name)
    path.write_text(damage[1](path.read_text()))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(StoreError, match="is not in"),
    ):
        build_model(name, 5, 1)
    assert found()[0].save() == name  # mends it
    build_model(name, 5, 1)


def test_an_architecture_file_that_is_no_text_is_refused():
    name = found()[0].save()
    (home() / file_of(name)).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(StoreError):
        build_model(name, 5, 1)


def test_a_file_under_another_architectures_name_is_refused():
    (first, _), (other, _) = found(seed=0), found(seed=1)
    (home() / file_of(first.save())).rename(home() / file_of(other.name))
    with (
        pytest.warns(UserWarning, match="its content changed"),
        pytest.raises(StoreError, match="is not in"),
    ):
        build_model(other.name, 5, 1)


def test_the_hash_of_another_networks_architecture_names_that():
    name = found()[0].save()
    with pytest.raises(UnknownName, match=name):
        build_model(name.replace("densenet-bc-16-4", "densenet-bc-16-5"), 5, 1)
