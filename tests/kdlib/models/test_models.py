import pandas as pd
import pytest
import torch
from helpers import layers_by_hand
from torch.utils.flop_counter import FlopCounterMode

from kdlib import build_model, count_cost, files
from kdlib.errors import UnknownName
from kdlib.models import load_weights
from kdlib.models.densenet import DenseLayer
from kdlib.models.shufflenet import Unit

FAMILIES = [
    "resnet8",
    "resnet14-x0.5",
    "resnet50-x0.125",
    "mobilenetv2-t4-w0.35",
    "wrn-10-1",
    "wrn-16-2-x0.25",
    "vgg13-x0.125",
    "densenet-bc-22-4",
    "googlenet-x0.0625",
    "shufflenetv2-x0.125",
    "lenet",
]


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- sizes ----------------------------------------------------------------------------------------


def test_flops_of_rco_table3_to_the_printed_digit():
    published = pd.read_csv(files.published() / "rco.csv", dtype=str)
    table = published[published.exhibit == "rco/table3"]
    assert len(table) == 16
    for name, printed in zip(table.row, table.value, strict=True):
        with torch.device("meta"):
            cost = count_cost(build_model(name, classes=100), image_size=32)
        digits = len(printed.partition(".")[2])
        assert f"{cost.flops / 1e6:.{digits}f}" == printed, name


def test_resnet50_has_the_size_of_rcos_teacher():
    with torch.device("meta"):
        cost = count_cost(build_model("resnet50", classes=100), image_size=32)
    assert cost.params == 23_705_252
    assert round(cost.macs / 1e6, 2) == 1298.01
    assert round(cost.flops / 1e6, 1) == 2602.9


@pytest.mark.parametrize(
    ("name", "classes", "params", "mega_macs"),
    [
        ("resnet20", 10, 272_474, 40.8),
        ("resnet20", 100, 278_324, 40.8),
        ("resnet56", 10, 855_770, 125.7),
        ("resnet56", 100, 861_620, 125.8),
        ("resnet110", 100, 1_736_564, 253.2),
        ("wrn-16-1", 10, 175_066, 26.7),
        ("wrn-16-2", 10, 691_674, 101.1),
        ("wrn-40-1", 10, 563_930, 83.3),
        ("wrn-46-4", 10, 10_499_290, 1525.1),
        ("vgg13", 10, 9_416_010, 228.3),
        ("resnet26", 10, 369_690, None),
        ("resnet8", 10, 78_042, None),
        ("resnet32", 100, 472_756, None),
        ("resnet14", 100, 181_108, None),
        ("mobilenetv2-t6-w0.5", 100, 812_836, 6.5),
        ("mobilenetv2", 10, 2_237_770, 89.0),
        ("densenet-bc-100-12", 10, 769_162, 287.9),
        ("densenet-bc-100-12", 100, 800_032, 288.0),
        ("densenet-bc-100-7", 10, 268_221, 98.1),
        ("densenet-bc-75-9", 10, 241_606, 92.8),
        ("densenet-bc-50-12", 10, 218_470, 88.5),
        ("densenet-bc-100-7", 100, 286_221, None),
        ("densenet-bc-75-9", 100, 257_626, None),
        ("densenet-bc-50-12", 100, 232_330, None),
    ],
)
def test_networks_have_their_known_sizes(name, classes, params, mega_macs):
    with torch.device("meta"):
        cost = count_cost(build_model(name, classes), image_size=32)
    assert cost.params == params
    assert mega_macs is None or round(cost.macs / 1e6, 1) == mega_macs


@pytest.mark.parametrize("name", [*FAMILIES[:4], *FAMILIES[-5:]])
def test_cost_equals_an_independent_count(name):
    model, x = build_model(name, classes=10, channels=1).eval(), torch.zeros(1, 1, 16, 16)
    norms = []
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda *call: norms.append(call[2].numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counted = sum(norms)
    cost = count_cost(model, image_size=16)
    assert 2 * cost.macs == counter.get_total_flops()
    assert cost.norms == counted
    assert cost.flops == counter.get_total_flops() + 2 * counted
    assert cost.params == sum(p.numel() for p in model.parameters())


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


def test_counting_leaves_the_model_as_it_was():
    model = build_model("resnet8", classes=10, seed=0)
    count_cost(model, image_size=32)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    twin = build_model("resnet8", classes=10, seed=0)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


# --- stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_from_any_stage_is_the_whole_network(name):
    model = build_model(name, classes=7, seed=0).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.manual_seed(0))
    with torch.no_grad():
        logits, features = model(x), model.stages(x)
        assert logits.shape == (2, 7)
        assert len(features) == len(model.body)
        for stage in range(len(model.body) + 1):
            feature = model.until(stage, x)
            assert stage == 0 or torch.equal(feature, features[stage - 1])
            kept = feature.clone()
            assert torch.equal(model.resume(stage, feature), logits)
            assert torch.equal(feature, kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_training_too_no_feature_is_altered_by_what_follows(name):
    model = build_model(name, classes=7, seed=0).train()
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    for stage in range(len(model.body) + 1):
        feature = model.until(stage, x)
        kept = feature.detach().clone()
        model.resume(stage, feature).square().mean().backward()
        assert torch.equal(feature, kept)
    features = model.stages(x)
    kept = [feature.detach().clone() for feature in features]
    model.head(features[-1])
    assert all(map(torch.equal, features, kept))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_passes_gradients(name):
    model = build_model(name, classes=7, seed=0).train()
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    sum(feature.square().mean() for feature in model.stages(x)).backward()
    inner = [*model.stem.parameters(), *model.body.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in inner)


def test_stages_have_the_usual_sizes():
    x = torch.zeros(1, 3, 32, 32)
    resnet = build_model("resnet20", 10).eval().stages(x)
    assert [tuple(f.shape[1:]) for f in resnet] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    mobile = build_model("mobilenetv2-t6-w0.5", 10).eval().stages(x)
    assert [f.shape[2] for f in mobile] == [16, 8, 4, 2]
    wide = build_model("wrn-16-2-x0.5", 10).eval().stages(x)
    assert [tuple(f.shape[1:]) for f in wide] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    vgg = build_model("vgg13-x0.0625", 10).eval().stages(x)
    assert [f.shape[1] for f in vgg] == [4, 8, 16, 32, 32]
    assert [f.shape[2] for f in vgg] == [32, 16, 8, 4, 2]


@pytest.mark.parametrize(("size", "sizes"), [(8, [8, 4, 2, 1, 1]), (28, [28, 14, 7, 4, 2])])
def test_a_vgg_of_small_images_keeps_a_pixel(size, sizes):
    model = build_model("vgg13-x0.0625", 10, channels=1).eval()
    x = torch.zeros(1, 1, size, size)
    assert [f.shape[2] for f in model.stages(x)] == sizes
    assert model(x).shape == (1, 10)


# --- what layers put out --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_of_a_stage_is_what_the_stage_puts_out(name, training):
    model = build_model(name, classes=7, seed=0).train(training)
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    stem, *found = model.layers(x)
    stages = model.stages(x)
    assert len(stem) == 1
    assert torch.equal(stem[0], model.stem(x))
    assert len(found) == len(stages) == len(model.body)
    for layers, stage in zip(found, stages, strict=True):
        assert torch.equal(layers[-1], stage)


def called_by_hand(model, x):
    """Copies of what the modules of every stage put out, one after another, as they are called."""
    x, found = model.stem(x), []
    for stage in model.body:
        outputs = []
        for module in stage:
            x = module(x)
            outputs.append(x.detach().clone())
        found.append(outputs)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_is_altered_by_what_follows_it(name):
    model = build_model(name, classes=7, seed=0).train()
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    by_hand = called_by_hand(model, x)
    _, *found = model.layers(x)
    for layers, outputs in zip(found, by_hand, strict=True):
        if name.startswith("resnet"):
            layers = layers[1::2] if "50" not in name else layers  # the ends of the blocks
            assert len(layers) == len(outputs)
        rest = iter(outputs)  # every layer is among them, in order
        assert all(any(torch.equal(layer, out) for out in rest) for layer in layers)
        assert layers


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_passes_gradients(name):
    model = build_model(name, classes=7, seed=0).train()
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    sum(feature.square().mean() for layers in model.layers(x) for feature in layers).backward()
    inner = [*model.stem.parameters(), *model.body.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in inner)
    assert all(p.grad is None for p in model.head.parameters())


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
def test_stages_have_as_many_layers_as_convolutions_or_blocks(name, counts):
    model = build_model(name, classes=7).eval()
    with torch.no_grad():
        assert [len(layers) for layers in model.layers(torch.zeros(1, 3, 16, 16))] == counts


@pytest.mark.parametrize("training", [False, True])
def test_layers_of_basic_blocks_are_their_convolutions_outputs(training):
    model = build_model("resnet14-x0.5", 7, seed=0).train(training)
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    got, expected = model.layers(x), layers_by_hand(model, x)
    assert [len(layers) for layers in got] == [1, 4, 4, 4]
    for ours, theirs in zip(got, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def residual(block, x):
    out = x
    for convolution, norm in zip(block.convs, block.norms, strict=True):
        out = norm(convolution(out))
        out = out + block.shortcut(x) if norm is block.norms[-1] else out
        out = out.clamp(min=0)
    return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet8-x0.25", "resnet50-x0.125"])
def test_residual_networks_equal_their_formula_to_the_bit(name, training):
    model = build_model(name, 7, seed=0).train(training)
    x = torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
    gradients = []
    for forward in (model, lambda x: model.head(by_blocks(model, x))):
        model.zero_grad()
        logits = forward(x)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *gradients))


def by_blocks(model, x):
    x = model.stem(x)
    for stage in model.body:
        for block in stage:
            x = residual(block, x)
    return x


# --- layers ---------------------------------------------------------------------------------------


def calls(network, x):
    """The kinds of the modules without children, in the order in which they are called."""
    order = []
    for module in network.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, *_: order.append(type(m).__name__))
    with torch.no_grad():
        network.eval()(x)
    return order


def test_a_wrn_normalises_before_it_convolves():
    model = build_model("wrn-16-2-x0.5", 10)
    twice = ["BatchNorm2d", "Conv2d"] * 2
    stage = [*twice, "Conv2d", *twice]  # the first block's shortcut is convolved
    head = ["BatchNorm2d", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Classifier"]
    assert calls(model, torch.zeros(1, 3, 8, 8)) == ["Conv2d", *stage * 3, *head]


def preactivation(block, x):
    """BN, ReLU, convolution, twice; the shortcut from the activated input where shapes change."""

    def active(norm, z):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        z = (z - norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        return (z + norm.bias.view(1, -1, 1, 1)).clamp(min=0)

    first = active(block.norm1, x)
    stride = block.conv1.stride
    inner = torch.nn.functional.conv2d(first, block.conv1.weight, stride=stride, padding=1)
    inner = active(block.norm2, inner)
    out = torch.nn.functional.conv2d(inner, block.conv2.weight, padding=1)
    if block.shortcut is None:
        return out + x
    return out + torch.nn.functional.conv2d(first, block.shortcut.weight, stride=stride)


def test_wrn_blocks_equal_their_formula():
    model = build_model("wrn-16-2-x0.25", 10, seed=0).double().eval()
    generator = torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)
    x = model.stem(x)
    shortcuts = []
    for stage in model.body:
        for block in stage:
            expected = preactivation(block, x)
            x = block(x)
            torch.testing.assert_close(x, expected)
            shortcuts.append(block.shortcut is not None)
    assert shortcuts == [True, False] * 3


def test_a_wrn_as_wide_as_its_stem_has_no_shortcut_in_its_first_stage():
    model = build_model("wrn-16-1", 10)
    found = [[block.shortcut is not None for block in stage] for stage in model.body]
    assert found == [[False, False], [True, False], [True, False]]


def test_a_vgg_has_convolutions_with_bias_and_pools_between_its_stages():
    model = build_model("vgg13-x0.0625", 10)
    layer = ["Conv2d", "BatchNorm2d", "ReLU"]
    expected = 2 * layer + 4 * (["MaxPool2d"] + 2 * layer)
    assert calls(model, torch.zeros(1, 3, 32, 32)) == [
        *expected,
        *("MaxPool2d", "AdaptiveAvgPool2d", "Flatten", "Classifier"),
    ]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-4", "vgg13-x0.5"])
def test_convolutions_start_normal_with_the_deviation_of_he_by_outputs(name):
    for module in build_model(name, 10, seed=0).modules():
        if isinstance(module, torch.nn.Conv2d):
            fan = module.weight.shape[0] * module.weight[0, 0].numel()
            spread = 4 / module.weight.numel() ** 0.5
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=spread)
            assert module.bias is None or not module.bias.any()


# --- LeNet ----------------------------------------------------------------------------------------


def test_a_lenet_has_its_known_size():
    with torch.device("meta"):
        cost = count_cost(build_model("lenet", 10, channels=1), image_size=28)
    assert cost.params == 61_706
    # 5x5 of 28x28 and of 14x14, then three linear layers and the classifier
    macs = 28**2 * 6 * 25 + 14**2 * 16 * 6 * 25 + 400 * 120 + 120 * 84 + 84 * 10
    assert cost.macs == macs


@pytest.mark.parametrize("size", [8, 28, 32])
def test_a_lenet_takes_images_of_any_size(size):
    model = build_model("lenet", 10, channels=1).eval()
    x = torch.zeros(2, 1, size, size)
    assert model(x).shape == (2, 10)
    assert model.stages(x)[-1].shape == (2, 16, 5, 5)


def test_a_lenet_computes_its_layers():
    model = build_model("lenet", 10, channels=1, seed=0).eval()
    x = torch.randn(2, 1, 28, 28, generator=torch.manual_seed(0))
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    out = x
    for conv, pooled in zip(convs, (14, 5), strict=True):
        out = torch.nn.functional.conv2d(out, conv.weight, conv.bias, padding=2).clamp(min=0)
        out = torch.nn.functional.adaptive_max_pool2d(out, pooled)
    out = out.flatten(1)
    for linear in linears:
        out = out @ linear.weight.T + linear.bias
        out = out if linear is linears[-1] else out.clamp(min=0)
    torch.testing.assert_close(model(x), out)


def test_lenets_differ_in_how_they_start():
    he, glorot = (build_model(name, 10, channels=1, seed=0) for name in ("lenet", "lenet-glorot"))
    assert shapes(he) == shapes(glorot)
    for name, weight in he.named_parameters():
        other = glorot.get_parameter(name)
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


# --- names ----------------------------------------------------------------------------------------


def test_a_suffix_multiplies_every_width():
    half = build_model("resnet20-x0.5", classes=10)
    widths = [feature.shape[1] for feature in half.eval().stages(torch.zeros(1, 3, 8, 8))]
    assert widths == [8, 16, 32]
    wide = build_model("wrn-10-4-x0.5", classes=10)
    widths = [feature.shape[1] for feature in wide.eval().stages(torch.zeros(1, 3, 8, 8))]
    assert widths == [32, 64, 128]
    assert wide.stem[0].weight.shape[0] == 8
    assert shapes(build_model("wrn-10-2-x1", 10)) == shapes(build_model("wrn-10-2", 10))
    assert shapes(build_model("resnet20-x1", 10)) == shapes(build_model("resnet20", 10))
    assert shapes(build_model("mobilenetv2-t4-w0.7-x0.5", 10)) == shapes(
        build_model("mobilenetv2-t4-w0.35", 10)
    )


@pytest.mark.parametrize(
    "name", ["resnet20-x0.01", "mobilenetv2-t4-w0.35-x0.1", "wrn-10-1-x0.01", "vgg13-x0.001"]
)
def test_no_suffix_leaves_a_layer_without_channels(name):
    assert build_model(name, classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet21", "resnet20"),
        ("restnet20", "resnet20"),
        ("mobilenet-t6-w0.5", "mobilenetv2-t6-w0.5"),
        ("mobilenetv2-t6-w", "mobilenetv2-t6-w0.5"),
        ("mobilenetv2-t0-w0.5", "mobilenetv2-t10-w0.5"),
        ("resnet20-xbig", "resnet20"),
        ("resnet20-x0", "resnet20"),
        ("wrn-15-1", "wrn-16-1"),
        ("wrn-18-1", "wrn-16-1"),
        ("wrn-4-1", "wrn-40-1"),
        ("wrn-16-0", "wrn-16-1"),
        ("wrn-16", "wrn-16-1"),
        ("wrn-16-1.5", "wrn-16-1"),
        ("wrn16-2", "wrn-16-2"),
        ("vgg16", "vgg13"),
        ("vgg13-xwide", "vgg13"),
        ("", "resnet20"),
    ],
)
def test_an_unknown_name_names_the_closest(name, hint):
    with pytest.raises(UnknownName, match=f"no model '{name}'.*{hint}"):
        build_model(name, classes=10)


# --- weights --------------------------------------------------------------------------------------


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


def test_without_a_seed_the_callers_randomness_decides():
    first, second = (build_model("resnet8-x0.5", classes=10) for _ in range(2))
    assert not torch.equal(first.stem[0].weight, second.stem[0].weight)


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
