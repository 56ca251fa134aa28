"""Stages and layers of every family, and the parts that networks are made of."""

import pytest
import torch
from helpers import layers_by_hand

from kdlib import build_model
from kdlib.models import load_weights
from kdlib.models.staged import Classifier, adapter

# --- stages ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_resuming_from_any_stage_is_the_whole_network(network, x):
    logits, features = network.eval()(x), network.features(x)
    assert logits.shape == (4, 7)
    assert len(features) == len(network.body) + 1
    assert all(map(torch.equal, network.stages(x), features[1:]))
    for stage, expected in enumerate(features):
        feature = network.until(stage, x)
        assert torch.equal(feature, expected)
        assert torch.equal(network.resume(stage, feature), logits)
        assert torch.equal(feature, expected)


def test_in_training_too_no_feature_is_altered_by_what_follows(network, x):
    for stage in range(len(network.train().body) + 1):
        feature = network.until(stage, x)
        before = feature.detach().clone()
        network.resume(stage, feature).square().mean().backward()
        assert torch.equal(feature, before)
    features = network.stages(x)
    before = [feature.detach().clone() for feature in features]
    network.head(features[-1])
    assert all(map(torch.equal, features, before))


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_last_layer_of_a_stage_is_the_output_of_the_stage(network, x, training):
    found = network.train(training).layers(x)
    assert [len(found[0]), len(found)] == [1, len(network.body) + 1]
    for layers, feature in zip(found, network.features(x), strict=True):
        assert torch.equal(layers[-1], feature)


def test_no_layer_is_altered_by_what_follows_it(family, network, x):
    by_hand, feature = [], network.stem(x)
    for stage in network.body:
        by_hand.append([])
        for module in stage:
            feature = module(feature)
            by_hand[-1].append(feature.detach().clone())
    for layers, outputs in zip(network.layers(x)[1:], by_hand, strict=True):
        if family.startswith("resnet"):
            layers = layers[1::2] if "50" not in family else layers  # the ends of the blocks
            assert len(layers) == len(outputs)
        rest = iter(outputs)  # every layer is among them, in order
        assert all(any(torch.equal(layer, out) for out in rest) for layer in layers)
        assert layers


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("resnet8-x0.25", [1, 2, 2, 2]),  # two a block
        ("resnet26-x0.25", [1, 8, 8, 8]),
        ("resnet32-x0.25", [1, 10, 10, 10]),
        ("resnet50-x0.125", [1, 3, 4, 6, 3]),  # one a block
        ("wrn-16-2-x0.25", [1, 2, 2, 2]),
        ("vgg13-x0.125", [1, 1, 2, 2, 2, 2]),
        ("mobilenetv2-t4-w0.35", [1, 3, 3, 7, 4]),
        ("googlenet-x0.0625", [1, 2, 5, 2]),
    ],
)
def test_stages_have_as_many_layers_as_convolutions_or_blocks(name, counts, x):
    assert [len(layers) for layers in build_model(name, 7).layers(x)] == counts


@pytest.mark.parametrize("training", [False, True])
def test_layers_of_basic_blocks_are_their_convolutions_outputs(x, training):
    model = build_model("resnet14-x0.5", 7, seed=0).train(training)
    got, expected = model.layers(x), layers_by_hand(model, x)
    assert [len(layers) for layers in got] == [1, 4, 4, 4]
    for ours, theirs in zip(got, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "kinds"),
    [
        ((4, 8, 8), (4, 8, 8), ["Identity"]),
        ((4, 8, 8), (6, 8, 8), ["Conv2d", "BatchNorm2d"]),
        ((4, 8, 8), (4, 2, 2), ["AdaptiveAvgPool2d", "Conv2d", "BatchNorm2d"]),
        ((4, 2, 2), (6, 8, 8), ["Upsample", "Conv2d", "BatchNorm2d"]),
    ],
)
def test_an_adapter_goes_from_one_shape_to_another(ours, theirs, kinds):
    ours, theirs = torch.ones(2, *ours), torch.ones(2, *theirs)
    module = adapter(ours, theirs)
    assert module(ours).shape == theirs.shape
    assert [type(m).__name__ for m in module.modules() if not any(m.children())] == kinds


@torch.no_grad()
@pytest.mark.parametrize("inputs", [10, 16, 84])
def test_logits_do_not_depend_on_the_place_in_a_batch(inputs):
    torch.manual_seed(0)
    classifier, x = Classifier(inputs, 7).eval(), torch.randn(100, inputs)
    logits = classifier(x)
    torch.testing.assert_close(logits, x @ classifier.weight.T + classifier.bias)
    for k in range(100):
        assert torch.equal(classifier(x.roll(k, 0)), logits.roll(k, 0))
    torch.testing.assert_close(classifier.train()(x), logits)


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_loaded_in_place():
    source, target = (build_model("resnet8-x0.5", classes=10, seed=seed) for seed in (0, 1))
    places = [tensor.data_ptr() for tensor in target.state_dict().values()]
    load_weights(target, source.state_dict())
    assert [tensor.data_ptr() for tensor in target.state_dict().values()] == places
    assert all(map(torch.equal, target.state_dict().values(), source.state_dict().values()))
    assert all(p.requires_grad for p in target.parameters())


def test_weights_that_do_not_fit_are_refused_whole():
    model = build_model("resnet8-x0.5", classes=10, seed=0)
    before = model.stem[0].weight.clone()
    short = dict(list(build_model("resnet8-x0.5", classes=10, seed=1).state_dict().items())[:-1])
    for weights, odd in (
        (build_model("resnet8-x0.5", classes=9, seed=1).state_dict(), "head.2"),
        (build_model("resnet14-x0.5", classes=10, seed=1).state_dict(), "body.0.1"),
        (short, "head.2.bias"),
    ):
        with pytest.raises(ValueError, match=f"do not fit the model: .*{odd}"):
            load_weights(model, weights)
    assert torch.equal(model.stem[0].weight, before)
