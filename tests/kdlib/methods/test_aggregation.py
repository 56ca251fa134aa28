"""KR: the penalised aggregation of layers, its adapters and its thresholds."""

import pytest
import torch
from by_hand import KR_PAIRS, SECOND_RECIPE, assert_same_with_gradients, prior_by_hand
from helpers import Called, called, layers_by_hand, step_in_float64
from torch import nn

from kdlib import build_model
from kdlib.methods import KR, Step
from kdlib.methods.representing import Aggregation


def prior_of(method, step):
    """The terms of the update by the prior."""
    ((optimizer, terms),) = method.extra_updates(step)
    assert optimizer == "prior"
    return terms


@pytest.fixture
def step_of(tiny):
    """A method and its step in float64, with random thresholds."""

    def make(pair="equal", **settings):
        method = KR(tiny(), prior=SECOND_RECIPE, **settings)
        step = step_in_float64(method, *KR_PAIRS[pair][:2])
        thresholds = step.aux["prior"].thresholds
        if thresholds is not None:
            assert thresholds.isnan().all()
            start = torch.rand(6, dtype=torch.float64, generator=torch.manual_seed(3))
            thresholds.data.copy_(start)
        return method, step

    return make


@pytest.mark.parametrize("threshold", ["learned", "fixed", "none"])
@pytest.mark.parametrize("pair", KR_PAIRS)
def test_the_prior_and_its_gradient_equal_those_computed_by_hand(step_of, pair, threshold):
    method, step = step_of(pair, gain=2.5, threshold=threshold, pull=0.3, beta=0.7)
    prior = step.aux["prior"]
    kinds = {"learned": (1, 0), "fixed": (0, 1), "none": (0, 0)}
    own = [name for name, _ in prior.named_parameters() if "adapters" not in name]
    buffers = [name for name, _ in prior.named_buffers() if "adapters" not in name]
    assert (len(own), len(buffers)) == kinds[threshold]
    adapters = {type(adapter) for adapter in prior.adapters}
    assert adapters == {nn.Identity if pair == "equal" else nn.Sequential}
    terms = prior_of(method, called(step))
    features = [layers_by_hand(network, step.x) for network in (step.student, step.teacher)]
    expected, share = prior_by_hand(method, pair, features, prior.adapters, prior.thresholds)
    close = {"gradient": 1e-8, "atol": 1e-11}
    learners = [step.student, prior]
    assert_same_with_gradients(terms["prior"], 0.7 * expected, learners, **close)
    assert terms["beyond"].item() == pytest.approx(share.item(), abs=1e-6)
    assert 0.02 < share < (0.98 if threshold != "none" else 1.01)


MODELS = [
    "resnet8-x0.25",
    "resnet50-x0.03",
    "wrn-10-1-x0.25",
    "vgg13-x0.03",
    "mobilenetv2-t1-w0.1",
    "densenet-bc-16-4",
    "googlenet-x0.0625",
    "shufflenetv2-x0.05",
    "lenet",
]


@pytest.mark.parametrize("student", MODELS)
def test_all_networks_of_the_book_fit_each_other(tiny, student):
    """One step: all is finite; the student and the adapters have gradients, the teacher none."""
    teacher = MODELS[MODELS.index(student) - 4]
    method = KR(tiny(model=teacher), prior=SECOND_RECIPE, gamma=0.1)
    method.check(tiny(model=student))
    networks = [build_model(name, 5, 1, seed=k) for k, name in enumerate((student, teacher))]
    x, labels = torch.randn(4, 1, 16, 16, generator=torch.manual_seed(0)), torch.arange(4)
    with torch.no_grad():
        for _ in range(20):
            networks[1].train()(x)  # gives it the statistics of a trained teacher
        aux = method.aux_modules(networks[0].eval(), networks[1].eval(), x)
    networks[0].train()
    step = Step(x, labels, None, *map(Called, networks), aux, {})
    prior = prior_of(method, step)["prior"]
    prior.backward()
    aggregation = aux["prior"]
    assert prior.isfinite()
    assert aggregation.thresholds.isfinite().all()
    assert all(p.grad is None for p in networks[1].parameters())
    assert all(p.grad.isfinite().all() for p in aggregation.parameters())
    own = [[*adapter.parameters()] for adapter in aggregation.adapters]
    assert all(any(p.grad.any() for p in weights) for weights in own if weights)
    stages = [[*stage.parameters()] for stage in networks[0].body]
    reached = [any(p.grad is not None and p.grad.any() for p in stage) for stage in stages]
    assert reached == [k < len(networks[1].body) for k in range(len(reached))]
    method.loss(step)[1]["loss"].backward()
    assert all(p.grad.isfinite().all() for p in networks[0].parameters())


def test_a_threshold_below_zero_counts_as_zero_and_rises(tiny):
    generator = torch.manual_seed(0)
    layers = torch.randn(2, 4, 8, 3, 4, 4, generator=generator).relu()
    ours, theirs = ([[torch.zeros(8, 3, 4, 4)], [*network]] for network in layers)
    prior = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE))
    prior.thresholds.data.fill_(-0.5)
    total, beyond = prior(ours, theirs)
    total.backward()
    assert (prior.thresholds.grad < 0).all()  # descent raises it
    dense = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE, threshold="none"))
    # the student has four layers, so there are four groups of one layer
    pulled = ((layers[0] - layers[1]).abs().mean((1, 2, 3, 4)) + 0.5).square().sum()
    assert (total - dense(ours, theirs)[0]).item() == pytest.approx(pulled.item(), rel=1e-5)
    assert beyond == dense(ours, theirs)[1]
