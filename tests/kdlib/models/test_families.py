"""Families of networks against their formulas, and how their weights start."""

import pytest
import torch
import torch.nn.functional as F
from gated import images, lively
from torch import nn

from kdlib import build_model
from kdlib.models.densenet import DenseLayer
from kdlib.models.shufflenet import Unit


def calls(network, x):
    """The kinds of the modules without children, in the order in which they are called."""
    order = []
    for module in network.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, *_: order.append(type(m).__name__))
    with torch.no_grad():
        network.eval()(x)
    return order


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "sizes"),
    [
        ("resnet20", [16, 32, 64], [32, 16, 8]),
        ("wrn-16-2-x0.5", [16, 32, 64], [32, 16, 8]),
        ("mobilenetv2-t6-w0.5", [12, 16, 48, 160], [16, 8, 4, 2]),
        ("mobilenetv2-x0.5", [12, 16, 48, 160], [32, 16, 8, 4]),
        ("vgg13-x0.0625", [4, 8, 16, 32, 32], [32, 16, 8, 4, 2]),
        ("densenet-bc-22-4", [20, 22, 23], [32, 16, 8]),
        ("googlenet-x0.0625", [30, 52, 64], [32, 16, 8]),
        ("shufflenetv2-x0.5", [58, 116, 232], [16, 8, 4]),
    ],
)
def test_stages_have_the_usual_sizes(name, channels, sizes):
    features = build_model(name, 10).eval().stages(torch.zeros(1, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, s, s) for c, s in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "size", "sizes"),
    [
        ("vgg13-x0.0625", 8, [8, 4, 2, 1, 1]),
        ("vgg13-x0.0625", 28, [28, 14, 7, 4, 2]),
        ("densenet-bc-16-4", 7, [7, 4, 2]),
        ("lenet", 8, [5]),
        ("lenet", 28, [5]),
        ("lenet", 32, [5]),
    ],
)
def test_small_and_odd_images_keep_a_pixel(name, size, sizes):
    model, x = build_model(name, 10, channels=1).eval(), torch.zeros(2, 1, size, size)
    assert [f.shape[2] for f in model.stages(x)] == sizes
    assert model(x).shape == (2, 10)


# --- formulas -------------------------------------------------------------------------------------


def residual(model, x):
    """A ResNet by its formula."""
    x = model.stem(x)
    for block in (block for stage in model.body for block in stage):
        out = x
        for convolution, norm in zip(block.convs, block.norms, strict=True):
            out = norm(convolution(out))
            out = out + block.shortcut(x) if norm is block.norms[-1] else out
            out = torch.where(out > 0, out, 0)  # no gradient at 0
        x = out
    return model.head(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet8-x0.25", "resnet50-x0.125"])
def test_residual_networks_equal_their_formula_to_the_bit(name, training, x):
    model = build_model(name, 7, seed=0).train(training)
    gradients = []
    for forward in (model, lambda x: residual(model, x)):
        model.zero_grad()
        logits = forward(x)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *gradients))


def preactivation(block, x):
    """BN, ReLU, convolution, twice; the shortcut from the activated input where shapes change."""

    def active(norm, z):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        z = (z - norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        return (z + norm.bias.view(1, -1, 1, 1)).clamp(min=0)

    first, stride = active(block.norm1, x), block.conv1.stride
    inner = F.conv2d(first, block.conv1.weight, stride=stride, padding=1)
    out = F.conv2d(active(block.norm2, inner), block.conv2.weight, padding=1)
    if block.shortcut is None:
        return out + x
    return out + F.conv2d(first, block.shortcut.weight, stride=stride)


@pytest.mark.parametrize(("name", "first"), [("wrn-16-2-x0.25", True), ("wrn-16-1", False)])
def test_wrn_blocks_equal_their_formula(name, first):
    """As wide as its stem, a network has no shortcut in its first stage."""
    model = lively(name, channels=3).double()
    x, shortcuts = model.stem(images(2, 16, channels=3, dtype=torch.float64)), []
    for block in (block for stage in model.body for block in stage):
        expected, x = preactivation(block, x), block(x)
        torch.testing.assert_close(x, expected)
        shortcuts.append(block.shortcut is not None)
    assert shortcuts == [first, False, True, False, True, False]


def test_a_wrn_normalises_before_it_convolves():
    twice = ["BatchNorm2d", "Conv2d"] * 2
    stage = [*twice, "Conv2d", *twice]  # the first block's shortcut is convolved
    head = ["BatchNorm2d", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Classifier"]
    model = build_model("wrn-16-2-x0.5", 10)
    assert calls(model, torch.zeros(1, 3, 8, 8)) == ["Conv2d", *stage * 3, *head]


def test_a_vgg_has_convolutions_with_bias_and_pools_between_its_stages():
    model = build_model("vgg13-x0.0625", 10)
    layer = ["Conv2d", "BatchNorm2d", "ReLU"]
    body = 2 * layer + 4 * (["MaxPool2d"] + 2 * layer)
    head = ["MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Classifier"]
    assert calls(model, torch.zeros(1, 3, 32, 32)) == body + head
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_blocks_of_densenet_and_shufflenet_compute_what_torchvisions_do():
    from torchvision.models.densenet import _DenseLayer
    from torchvision.models.shufflenetv2 import InvertedResidual

    x = torch.randn(2, 8, 6, 6, generator=torch.manual_seed(0))
    dense, halving, plain = DenseLayer(8, 3), Unit(8, 12, 2), Unit(8, 8, 1)
    theirs = [_DenseLayer(8, 3, bn_size=4, drop_rate=0), InvertedResidual(8, 12, 2)]
    theirs.append(InvertedResidual(8, 8, 1))
    # torchvision names the branch that passes first, and so does a sorted state
    order = {0: list(dense.state_dict()), 1: None, 2: list(plain.state_dict())}
    order[1] = sorted(halving.state_dict(), key=lambda name: not name.startswith("beside"))
    for k, (ours, other) in enumerate(zip([dense, halving, plain], theirs, strict=True)):
        names = [n for n in other.state_dict() if not n.endswith("num_batches_tracked")]
        state = dict(zip(names, (ours.state_dict()[n] for n in order[k]), strict=True))
        other.load_state_dict(state, strict=False)
        expected = other(x) if k else torch.cat([x, other(x)], 1)
        torch.testing.assert_close(ours(x), expected)


def test_a_lenet_computes_its_layers():
    model = build_model("lenet", 10, channels=1, seed=0).eval()
    x = torch.randn(2, 1, 28, 28, generator=torch.manual_seed(0))
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    out = x
    for conv, pooled in zip(convs, (14, 5), strict=True):
        out = F.conv2d(out, conv.weight, conv.bias, padding=2).clamp(min=0)
        out = F.adaptive_max_pool2d(out, pooled)
    out = out.flatten(1)
    for linear in linears:
        out = out @ linear.weight.T + linear.bias
        out = out if linear is linears[-1] else out.clamp(min=0)
    torch.testing.assert_close(model(x), out)


# --- random weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-4", "vgg13-x0.5", "mobilenetv2-t6-w0.5"])
def test_convolutions_start_normal_with_the_deviation_of_he_by_outputs(name):
    for module in build_model(name, 10, seed=0).modules():
        if isinstance(module, nn.Conv2d):
            fan = module.weight.shape[0] * module.weight[0, 0].numel()
            spread = 4 / module.weight.numel() ** 0.5
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=spread)
            assert module.bias is None or not module.bias.any()


def test_lenets_differ_in_how_they_start():
    he, glorot = (build_model(name, 10, channels=1, seed=0) for name in ("lenet", "lenet-glorot"))
    for name, weight in he.named_parameters():
        other = glorot.get_parameter(name)
        assert weight.shape == other.shape
        if weight.ndim == 1:
            assert not weight.any()
            assert not other.any()
            continue
        spread = 6 / weight.numel() ** 0.5
        field = weight[0, 0].numel()
        inputs, outputs = weight.shape[1] * field, weight.shape[0] * field
        assert weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=spread), name
        bound = (6 / (inputs + outputs)) ** 0.5
        assert 0.9 * bound < other.abs().max() <= bound, name
        assert other.std().item() == pytest.approx(bound / 3**0.5, rel=spread), name
