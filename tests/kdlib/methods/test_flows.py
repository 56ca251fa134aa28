"""The losses of flow matrices (FSP) and of neuron selectivity (NST)."""

import pytest
import torch
from by_hand import WITH_KD, assert_same_with_gradients, on_logits, stage_outputs, to_one_size
from helpers import step_in_float64
from torch.nn import functional as F

from kdlib.methods import FSP, NST

WEIGHTS = {"alone": {}, "with KD": WITH_KD, "first stage": {"ce_weight": 0.0}}
every_weight = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


# --- FSP ------------------------------------------------------------------------------------------


def fsp_by_hand(ours, theirs):
    total = 0
    for k in range(1, min(len(ours), len(theirs))):
        matrices = []
        for first, last in ((ours[k - 1], ours[k]), (theirs[k - 1], theirs[k])):
            ratio = first.shape[2] // last.shape[2]
            first = F.max_pool2d(first, ratio) if ratio > 1 else first
            matrices.append(torch.einsum("bihw,bjhw->bij", first, last) / last[0, 0].numel())
        total = total + ((matrices[0] - matrices[1]) ** 2).mean()
    return total


@every_weight
@pytest.mark.parametrize(
    "pair",
    [
        ("resnet8-x0.25", "resnet14-x0.25"),
        ("resnet8-x0.25", "wrn-10-1-x0.25"),
        ("vgg13-x0.0625", "resnet8-x0.25"),  # five stages and three
    ],
)
def test_fsp_and_its_gradient_equal_those_computed_by_hand(tiny, pair, weights):
    method = FSP(tiny(model=pair[1]), fsp_weight=3.0, **weights)
    method.check(tiny(model=pair[0]))
    step = step_in_float64(method, *pair)._replace(teacher_logits=None)
    logits, terms = method.loss(step)
    features = (stage_outputs(network, step.x) for network in (step.student, step.teacher))
    fsp = fsp_by_hand(*features)
    torch.testing.assert_close(terms["fsp"], fsp, rtol=1e-10, atol=0)
    assert fsp > 1e-3
    assert_same_with_gradients(
        terms["loss"], 3.0 * fsp + on_logits(step, **weights), [step.student]
    )
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "pair",
    [
        ("resnet8-x0.25", "wrn-10-2-x0.25"),  # only the stems agree
        ("vgg13-x0.0625", "resnet8-x0.5"),
    ],
)
def test_fsp_of_networks_with_other_channels_adapts_the_students_features(tiny, pair):
    method = FSP(tiny(model=pair[1]), fsp_weight=3.0, ce_weight=0.0)
    step = step_in_float64(method, *pair)._replace(teacher_logits=None)
    _, terms = method.loss(step)
    ours, theirs = (stage_outputs(network, step.x) for network in (step.student, step.teacher))
    adapters = step.aux["adapters"]
    assert len(adapters) == min(len(ours), len(theirs))
    adapted = [
        torch.einsum("oi,bihw->bohw", a.weight[:, :, 0, 0], f) + a.bias[:, None, None]
        for a, f in zip(adapters, ours, strict=False)
    ]
    expected = 3.0 * fsp_by_hand(adapted, theirs)
    assert_same_with_gradients(terms["loss"], expected, [step.student, adapters])


# --- NST ------------------------------------------------------------------------------------------


def nst_by_hand(ours, theirs):
    def kernel(x, y):  # [b, c, c, h·w]
        return (((x[:, :, None] * y[:, None]).sum(3)) ** 2).mean()

    s, t = (
        flat / flat.norm(dim=2, keepdim=True).clamp(min=1e-12)
        for flat in (feature.flatten(2) for feature in to_one_size(ours[-1], theirs[-1]))
    )
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


@every_weight
@pytest.mark.parametrize(
    "pair",
    [
        ("resnet8-x0.25", "resnet14-x0.25"),
        ("resnet8-x0.25", "wrn-10-2-x0.25"),
        ("resnet8-x0.25", "mobilenetv2-t1-w0.1"),
        ("vgg13-x0.0625", "resnet8-x0.25"),
    ],
)
def test_nst_and_its_gradient_equal_those_computed_by_hand(tiny, pair, weights):
    method = NST(tiny(), **weights)
    step = step_in_float64(method, *pair, size=32)._replace(teacher_logits=None)
    terms = method.loss(step)[1]
    features = (stage_outputs(network, step.x) for network in (step.student, step.teacher))
    nst = nst_by_hand(*features)
    torch.testing.assert_close(terms["nst"], nst, rtol=1e-8, atol=0)
    assert nst > 1e-5
    expected = 50 * nst + on_logits(step, **weights)
    close = {"rtol": 1e-9, "gradient": 1e-6, "atol": 1e-9}
    assert_same_with_gradients(terms["loss"], expected, [step.student], **close)
    assert step.aux == {}
