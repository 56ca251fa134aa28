"""Costs against published numbers and PyTorch's own counter."""

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdlib import build_model, count_cost, files


def cost_of(name, classes=100, channels=3, size=32):
    with torch.device("meta"):
        return count_cost(build_model(name, classes, channels), size)


def test_flops_of_rco_table3_to_the_printed_digit():
    published = pd.read_csv(files.ROOT / "results/published/rco.csv", dtype=str)
    table = published[(published.exhibit == "rco/table3") & (published.column == "mflops")]
    assert len(table) == 16
    for name, printed in zip(table.row, table.value, strict=True):
        digits = len(printed.partition(".")[2])
        assert f"{cost_of(name).flops / 1e6:.{digits}f}" == printed, name


def test_resnet50_has_the_size_of_rcos_teacher():
    cost = cost_of("resnet50")
    assert cost.params == 23_705_252
    assert round(cost.macs / 1e6, 2) == 1298.01
    assert round(cost.flops / 1e6, 1) == 2602.9


def test_a_lenet_has_its_known_size():
    # 5x5 of 28x28 and of 14x14, then three linear layers and the classifier
    macs = [28**2 * 6 * 25, 14**2 * 16 * 6 * 25, 400 * 120, 120 * 84, 84 * 10]
    cost = cost_of("lenet", 10, 1, 28)
    assert (cost.params, cost.macs, list(cost.layers.values())) == (61_706, sum(macs), macs)


@pytest.mark.parametrize(
    ("name", "classes", "params", "mega_macs"),
    [
        ("resnet20", 10, 272_474, 40.8),
        ("resnet110", 100, 1_736_564, 253.2),
        ("wrn-16-1", 10, 175_066, 26.7),
        ("wrn-46-4", 10, 10_499_290, 1525.1),
        ("vgg13", 10, 9_416_010, 228.3),
        ("mobilenetv2-t6-w0.5", 100, 812_836, 6.5),
        ("mobilenetv2", 10, 2_237_770, 89.0),
        ("densenet-bc-100-12", 100, 800_032, 288.0),
        ("densenet-bc-75-9", 10, 241_606, 92.8),
    ],
)
def test_networks_have_their_known_sizes(name, classes, params, mega_macs):
    cost = cost_of(name, classes)
    assert cost.params == params
    assert round(cost.macs / 1e6, 1) == mega_macs


def test_cost_equals_an_independent_count_and_leaves_the_model_as_it_was(family):
    model, x = build_model(family, 10, 1, seed=0).train(), torch.zeros(1, 1, 16, 16)
    cost = count_cost(model, image_size=16)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    twin = build_model(family, 10, 1, seed=0)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
    norms = []
    for module in model.eval().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda *call: norms.append(call[2].numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert 2 * cost.macs == 2 * sum(cost.layers.values()) == counter.get_total_flops()
    assert cost.norms == sum(norms)
    assert cost.flops == counter.get_total_flops() + 2 * sum(norms)
    assert cost.params == sum(p.numel() for p in model.parameters())
