import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdlib import build_model, count_cost, files
from kdlib.errors import UnknownName
from kdlib.models import load_weights

FAMILIES = ["resnet8", "resnet14-x0.5", "resnet50-x0.125", "mobilenetv2-t4-w0.35"]


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
        ("resnet56", 100, 861_620, None),
        ("resnet110", 100, 1_736_564, 253.2),
        ("resnet26", 10, 369_690, None),
        ("resnet8", 10, 78_042, None),
        ("resnet32", 100, 472_756, None),
        ("resnet14", 100, 181_108, None),
        ("mobilenetv2-t6-w0.5", 100, 812_836, 6.5),
    ],
)
def test_networks_have_their_known_sizes(name, classes, params, mega_macs):
    cost = count_cost(build_model(name, classes), image_size=32)
    assert cost.params == params
    assert mega_macs is None or round(cost.macs / 1e6, 1) == mega_macs


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2-t4-w0.35"])
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


# --- names ----------------------------------------------------------------------------------------


def test_a_suffix_multiplies_every_width():
    half = build_model("resnet20-x0.5", classes=10)
    widths = [feature.shape[1] for feature in half.eval().stages(torch.zeros(1, 3, 8, 8))]
    assert widths == [8, 16, 32]
    assert shapes(build_model("resnet20-x1", 10)) == shapes(build_model("resnet20", 10))
    assert shapes(build_model("mobilenetv2-t4-w0.7-x0.5", 10)) == shapes(
        build_model("mobilenetv2-t4-w0.35", 10)
    )


@pytest.mark.parametrize("name", ["resnet20-x0.01", "mobilenetv2-t4-w0.35-x0.1"])
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
