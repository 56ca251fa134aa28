"""Names of networks, and random weights from a seed."""

import pytest
import torch

from kdlib import build_model
from kdlib.errors import UnknownName
from kdlib.models.names import check_model, count_stages


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_stages_are_counted_by_name(family, network):
    assert count_stages(family) == count_stages(f"{family}@0123456789ab") == len(network.body)


@pytest.mark.parametrize(
    ("name", "widths"), [("resnet20-x0.5", [8, 16, 32]), ("wrn-10-4-x0.5", [32, 64, 128])]
)
def test_a_suffix_multiplies_every_width(name, widths):
    model = build_model(name, classes=10).eval()
    assert [f.shape[1] for f in model.stages(torch.zeros(1, 3, 8, 8))] == widths
    assert model.stem[0].weight.shape[0] == 8


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("wrn-10-2-x1", "wrn-10-2"),
        ("resnet20-x1", "resnet20"),
        ("mobilenetv2-t4-w0.7-x0.5", "mobilenetv2-t4-w0.35"),
    ],
)
def test_two_names_of_one_network(name, same):
    assert shapes(build_model(name, 10)) == shapes(build_model(same, 10))


@pytest.mark.parametrize(
    "name", ["resnet20-x0.01", "mobilenetv2-t4-w0.35-x0.1", "wrn-10-1-x0.01", "vgg13-x0.001"]
)
def test_no_suffix_leaves_a_layer_without_channels(name):
    assert build_model(name, classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet21", "resnet20"),
        ("mobilenet-t6-w0.5", "mobilenetv2-t6-w0.5"),
        ("mobilenetv2-t0-w0.5", "mobilenetv2-t10-w0.5"),
        ("mobilenetv2-t6-w0", "mobilenetv2-t6-w0.5"),
        ("resnet20-xbig", "resnet20"),
        ("resnet20-x0", "resnet20"),
        ("wrn-18-1", "wrn-16-1"),
        ("wrn-4-1", "wrn-40-1"),
        ("wrn-16-0", "wrn-16-1"),
        ("wrn-16", "wrn-16-1"),
        ("densenet-bc-9-4", "densenet-bc-"),
        ("vgg16", "vgg13"),
        ("", "resnet20"),
    ],
)
def test_an_unknown_name_names_the_closest(name, hint):
    for refuse in (lambda: build_model(name, 10), lambda: check_model(f"{name}@0123456789ab")):
        with pytest.raises(UnknownName, match=f"no model '{name}'.*{hint}"):
            refuse()


def test_checking_a_name_reads_no_file(family):
    check_model(family)
    check_model(f"{family}@0123456789ab")


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_randomness_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model("resnet8-x0.5", classes=10, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = build_model("resnet8-x0.5", classes=10, seed=3)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    other = build_model("resnet8-x0.5", classes=10, seed=4)
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)
    # without a seed, the caller's random state decides
    third, fourth = (build_model("resnet8-x0.5", classes=10) for _ in range(2))
    assert not torch.equal(third.stem[0].weight, fourth.stem[0].weight)
