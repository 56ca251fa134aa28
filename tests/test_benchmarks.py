"""The counted work and the bounds of the benchmarks, and what they measure."""

import sys

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import bounds, ceilings, gpu, roofline
from benchmarks.bounds import Work
from benchmarks.ceilings import Ceilings
from benchmarks.training import Case
from kdlib import build_model, count_cost
from kdlib.engine.logit_cache import folded
from kdlib.models.staged import batch_norm

HALF = torch.bfloat16
EPOCH = 50_000
COPY = 4.3e12  # bytes/s of the machine in the tables below


def without_storage(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, classes=100)


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenetv2-t6-w0.5", "densenet-bc-22-12", "googlenet", "lenet"]
)
def test_a_forward_pass_has_two_flops_for_every_multiply_accumulate(name):
    network = without_storage(name)
    work = bounds.forward(network, batch=3, dtype=torch.float32)
    assert work.flops == 3 * 2 * count_cost(network, image_size=32).macs


def tiny() -> nn.Module:
    """For 8 x 8 images: 192 elements in, 256 after the convolution, 4 after the pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        batch_norm(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


CONVOLUTION = 256 * 27  # multiply-accumulates; the linear layer has 4 x 10
PARAMETERS = 108 + 8 + 50


def test_work_of_a_step_counted_by_hand():
    work = bounds.training(tiny(), batch=2, dtype=torch.float32, image_size=8)
    # The first convolution has no gradient of its input, the images.
    assert work.flops == 2 * 2 * (2 * CONVOLUTION + 3 * 40)
    convolution, norm, relu, pool, linear = 2 * (192 + 256), 8 * 256, 5 * 256, 2 * 260, 3 * 14
    moved = 2 * (convolution + norm + relu + pool + linear)
    # Weights: two reads and a written gradient; the update reads three tensors and writes two.
    assert work.bytes == 4 * (moved + (3 + 5) * PARAMETERS)
    assert work.kernels == 2 + 5 + 2 + 2 + 4 + 25


def test_half_precision_halves_activations_and_casts_weights():
    work = bounds.training(tiny(), batch=2, dtype=HALF, image_size=8)
    moved = 2 * (2 * 448 + 13 * 256 + 2 * 260 + 3 * 14)
    assert work.bytes == 2 * moved + (3 * 2 + 5 * 4 + 2 * (4 + 2)) * PARAMETERS
    assert work.kernels == 40 + 2 * 2


def test_operations_that_the_compiler_fuses_move_no_bytes():
    eager = bounds.training(tiny(), batch=2, dtype=torch.float32, image_size=8)
    fused = bounds.training(tiny(), batch=2, dtype=torch.float32, compiled=True, image_size=8)
    assert fused.flops == eager.flops
    assert eager.bytes - fused.bytes == 2 * 4 * 5 * 256  # ReLU
    assert eager.kernels - fused.kernels == 1 + 2 + 10  # batch norm, ReLU, the rest


def test_folding_saves_a_read_and_a_write_of_every_folded_norm():
    network = build_model("resnet8-x0.25", classes=10).eval()
    plain, fold = (bounds.forward(n, 64, torch.float32) for n in (network, folded(network)))
    norms = count_cost(network, image_size=32).norms
    biases = sum(m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert fold.flops == plain.flops
    assert plain.bytes - fold.bytes == 4 * (64 * 2 * norms + biases)
    assert plain.kernels - fold.kernels == 9


def test_counting_does_not_change_the_network():
    network = tiny().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    bounds.training(network, batch=2, dtype=torch.float32, image_size=8)
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_operation_without_a_count_is_an_error():
    with pytest.raises(KeyError, match="sigmoid"):
        bounds.operations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), training=False)


# An independent count by hand: per epoch of 50,000 images in bfloat16 at 4.3 TB/s. It includes a
# counter of batches in every batch norm, which kdlib's batch norms do not have.
STEPS = [  # name, batch, memory seconds eager and compiled, kernels per step eager and compiled
    ("mobilenetv2-t6-w0.5", 64, 0.098, 0.074, 704, 443),
    ("resnet20", 128, 0.101, 0.071, 316, 187),
    ("wrn-16-1", 128, 0.069, 0.048, 220, 131),
    ("densenet-bc-100-12", 128, 2.06, 1.35, 1460, 859),
    ("resnet50", 64, 1.87, 1.36, 742, 443),
]
PASSES = [  # name, memory seconds plain, folded and fused, kernels plain and folded
    ("resnet50", 0.58, 0.42, 0.20, 172, 119),
    ("resnet110", 0.18, 0.13, 0.06, 386, 275),
]


@pytest.mark.parametrize(
    ("name", "batch", "eager", "compiled", "kernels", "fewer"), STEPS, ids=lambda value: str(value)
)
def test_steps_as_counted_by_hand(name, batch, eager, compiled, kernels, fewer):
    network = without_storage(name)
    for compiles, seconds, count in ((False, eager, kernels), (True, compiled, fewer)):
        work = bounds.training(network, batch, HALF, compiled=compiles)
        assert work.bytes * EPOCH / batch / COPY == pytest.approx(seconds, rel=0.03)
        assert work.kernels == pytest.approx(count, rel=0.1)


@pytest.mark.parametrize(("name", "plain", "fold", "fused", "kernels", "fewer"), PASSES)
def test_teacher_passes_as_counted_by_hand(name, plain, fold, fused, kernels, fewer):
    network = build_model(name, classes=100).eval()
    without = folded(network)
    works = [
        bounds.forward(network, 2048, HALF),
        bounds.forward(without, 2048, HALF),
        bounds.forward(without, 2048, HALF, fused=True),
    ]
    seconds = [work.bytes * EPOCH / 2048 / COPY for work in works]
    assert seconds == pytest.approx([plain, fold, fused], rel=0.05)
    assert [work.kernels for work in works[:2]] == pytest.approx([kernels, fewer], rel=0.02)


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "seconds", "cause"),
    [
        (Work(flops=4e9, bytes=1e9, kernels=100), 4.0, "arithmetic"),
        (Work(flops=1e9, bytes=9e9, kernels=100), 3.0, "memory"),
        (Work(flops=1e9, bytes=1e9, kernels=5000), 5.0, "launches"),
    ],
)
def test_the_slowest_part_is_the_bound(work, seconds, cause):
    found, name = work.bound(Ceilings(bytes_per_s=3e9, flops_per_s=1e9, node_s=1e-3))
    assert found == pytest.approx(seconds)
    assert name == cause


def test_the_best_of_several_measurements():
    measured = [Ceilings(1.0, 20.0, 0.3), Ceilings(2.0, 10.0, 0.5)]
    assert Ceilings.best(measured) == Ceilings(2.0, 20.0, 0.3)


@pytest.fixture
def quick(monkeypatch):
    """Limits of the machine measured in milliseconds; a store that programs may replace."""
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 1 << 18})
    monkeypatch.setattr(ceilings, "SIDE", {"cpu": 128})
    monkeypatch.setattr(ceilings, "CONVOLVED", {"cpu": (1, 4)})
    monkeypatch.setattr(ceilings, "CHANNELS", 32)
    for variable in ("KDLIB_HOME", "KDLIB_COMPILE"):
        monkeypatch.setenv(variable, "")


def test_the_roofline_measures_a_student_and_a_teacher(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(roofline, "STUDENTS", [roofline.Case("resnet8-x0.25", 8)])
    monkeypatch.setattr(roofline, "DENSENET", {"cpu": roofline.Case("densenet-bc-10-4", 8)})
    monkeypatch.setattr(roofline, "TEACHERS", [roofline.Case("resnet8-x0.25", None)])
    options = ["--rounds", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["roofline", *options])
    roofline.main()
    table = pd.read_csv(tmp_path / "out" / "roofline-cpu.csv")
    names = ["resnet8-x0.25, batch 8", "densenet-bc-10-4, batch 8", "resnet8-x0.25, teacher"]
    for name in names:
        rows = table[table.case.str.startswith(name)]
        speeds = rows[rows.quantity == "images/s"].value
        shares = rows[rows.quantity == "share of the bound"].value
        assert len(speeds) == len(shares) == 2
        assert (speeds > 0).all()
        assert (shares > 0).all()
        parts = rows[["arithmetic_s", "memory_s", "launches_s"]].iloc[0]
        (bound,) = rows[rows.quantity.str.startswith("bound")].value
        assert bound == pytest.approx(rows.batch.iloc[0] / parts.max())
        assert parts.idxmax() == f"{rows.cause.iloc[0]}_s"
    assert (tmp_path / "out" / "roofline-cpu.png").stat().st_size > 0


def test_gpu_measures_speeds_and_their_shares_of_the_bounds(tmp_path, monkeypatch, quick):
    short = {"images": 32, "steps": 1, "parallel": (2,), "loops": ("P0", "P1")}
    case = Case("resnet8-x0.25", "resnet14-x0.25", 8, {}, **short)
    monkeypatch.setattr(gpu, "CASES", {"cpu": [case]})
    monkeypatch.setattr(sys, "argv", ["gpu", "--rounds", "1", "--out", str(tmp_path)])
    gpu.main()
    table = pd.read_csv(tmp_path / "gpu-cpu.csv")
    values = table[table.case == "resnet8-x0.25 ← resnet14-x0.25"].set_index("quantity").value
    assert (values[[f"{which}, images/s" for which in ("P0", "P1", "K1", "K2", "K3(2)")]] > 0).all()
    (bound,) = values[values.index.str.startswith("bound of K2")]
    assert values["K2, share of the bound"] == pytest.approx(values["K2, images/s"] / bound)
    assert values["K2 / P0"] == pytest.approx(values["K2, images/s"] / values["P0, images/s"])
    assert "product of matrices in bfloat16, TFLOP/s" in set(table.quantity)
