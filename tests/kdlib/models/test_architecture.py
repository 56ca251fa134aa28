"""Architectures: built by name, on file, damaged or missing."""

import json

import pytest
import torch
from gated import BOTTLENECKS, SMALL, close, gates_of, images, lively
from torch import nn

from kdlib import build_model
from kdlib.errors import StoreError, UnknownName
from kdlib.files import home, results
from kdlib.models import load_weights
from kdlib.models.architecture import MARK, Architecture, file_of, unsearched_architecture
from kdlib.models.channels import Channels
from kdlib.models.pruned import prune


def found(name="densenet-bc-16-4", closed=0.4, seed=0, classes=5, channels=1):
    """A random architecture, and its network with the weights of the larger one."""
    network = lively(name, seed, classes, channels)
    gates = gates_of(network, closed, seed)
    kept = gates.kept()
    return Architecture.of(name, gates.channels, kept), prune(network, gates.channels, kept)


def shapes(network):
    return {name: t.shape for name, t in network.state_dict().items()}


@pytest.mark.parametrize("name", [*SMALL, BOTTLENECKS])
def test_weights_of_a_pruned_network_fit_the_network_of_its_name(name):
    architecture, pruned = found(name)
    built = build_model(architecture.save(), classes=5, channels=1, seed=3)
    assert shapes(built) == shapes(pruned)
    load_weights(built, pruned.state_dict())
    x = images()
    assert torch.equal(built.eval()(x), pruned.eval()(x))
    assert torch.equal(built.train()(x), pruned.train()(x))


def test_an_architecture_takes_other_images_and_classes():
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
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


@pytest.mark.parametrize("name", ["densenet-bc-22-16", "vgg13-x0.5", "resnet20"])
def test_initial_weights_have_the_spread_for_the_smaller_layers(name):
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


def test_a_head_with_fewer_inputs_has_the_spread_for_these():
    network = lively("densenet-bc-22-16")
    gates = close(gates_of(network), *(f"body.2.{k}.conv1" for k in (4, 5, 6)))
    name = Architecture.of("densenet-bc-22-16", gates.channels, gates.kept()).save()
    (head,) = (m for m in build_model(name, 100, 1, seed=0).modules() if isinstance(m, nn.Linear))
    assert head.in_features == 44  # of 92
    assert 0.95 * 44**-0.5 < head.weight.abs().max() <= 44**-0.5


def test_the_name_depends_on_base_and_masks():
    (first, _), (again, _), (other, _) = found(seed=0), found(seed=0), found(seed=1)
    assert first.name == again.name != other.name
    assert first.name.startswith(f"densenet-bc-16-4{MARK}")
    elsewhere = Architecture("densenet-bc-16-4-x1.0", first.kept)
    assert elsewhere.name.partition(MARK)[2] != first.name.partition(MARK)[2]


def test_the_same_remaining_channels_have_the_same_name():
    network, names = lively("densenet-bc-16-4"), []
    for layers in (["body.0.1.conv1"], ["body.0.1.conv2"], ["body.0.1.conv1", "body.0.1.conv2"]):
        gates = close(gates_of(network), *layers)
        names.append(Architecture.of("densenet-bc-16-4", gates.channels, gates.kept()).name)
    assert len(set(names)) == 1


def test_the_file_is_plain_json():
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


def test_the_meta_device_computes_nothing():
    name = found()[0].save()
    with torch.device("meta"):
        network = build_model(name, classes=5, channels=1)
    assert {t.device.type for t in network.state_dict().values()} == {"meta"}
    assert shapes(network) == shapes(build_model(name, classes=5, channels=1, seed=0))


def test_an_architecture_is_found_in_committed_records():
    architecture, pruned = found()
    source = home() / file_of(architecture.save())
    committed = results() / "course" / "records" / source.name
    committed.parent.mkdir(parents=True)
    source.rename(committed)
    assert shapes(build_model(architecture.name, 5, 1, seed=0)) == shapes(pruned)
    assert not source.exists()


def test_a_missing_architecture_is_named():
    architecture, _ = found()
    with pytest.raises(StoreError, match=rf"{architecture.name} is not in .*{home()}"):
        build_model(architecture.name, 5, 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"base": "densenet-bc-16-4", "kept": []}',
        lambda text: text.replace("10", "01", 1),
        lambda text: text.replace("densenet-bc-16-4", "densenet-bc-22-4"),
        lambda text: found(seed=1)[0].text,
        lambda text: "\N{LATIN SMALL LETTER Y WITH DIAERESIS}",
    ],
)
def test_a_damaged_architecture_is_refused_and_mended(damage):
    name = found()[0].save()
    path = home() / file_of(name)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(StoreError, match="is not in"),
    ):
        build_model(name, 5, 1)
    assert found()[0].save() == name
    build_model(name, 5, 1)


def test_the_hash_of_another_network_is_refused():
    name = found()[0].save()
    with pytest.raises(UnknownName, match=name):
        build_model(name.replace("densenet-bc-16-4", "densenet-bc-16-5"), 5, 1)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_unsearched_architecture_has_the_cost_and_keeps_a_path(name, share):
    channels = Channels(build_model(name, 5, 1, seed=0), 8)
    macs = round(share * channels.total_macs)
    found = [unsearched_architecture(name, channels, macs, seed) for seed in (0, 1, 0)]
    assert found[0] == found[2]
    for cost in (channels.macs(channels.remaining(a.masks)) for a in found):
        assert 0.9 * macs < cost
        assert cost <= macs or not macs
    assert found[0] != found[1] or not macs
