"""KR: the penalised aggregation of layers, its adapters and its thresholds."""

import numpy as np
import pytest
import torch
from by_hand import KR_PAIRS, SECOND_RECIPE, assert_same_with_gradients, prior_by_hand
from helpers import Called, called, layers_by_hand, step_in_float64
from torch import nn

from kdlib import build_model
from kdlib.methods import KR, Step
from kdlib.methods.representing import Aggregation

# --- the penalised aggregation --------------------------------------------------------------------


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
@pytest.mark.parametrize("gain", [1.0, 2.5])
@pytest.mark.parametrize("pair", KR_PAIRS)
def test_the_prior_and_its_gradient_equal_those_computed_by_hand(step_of, pair, gain, threshold):
    method, step = step_of(pair, gain=gain, threshold=threshold, pull=0.3, beta=0.7)
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


@pytest.mark.parametrize("pair", KR_PAIRS)
def test_gradients_reach_student_and_adapters_but_neither_head_nor_teacher(step_of, pair):
    method, step = step_of(pair)
    step.teacher.requires_grad_(True)
    prior_of(method, called(step))["prior"].backward()
    assert all(p.grad is None for p in step.teacher.parameters())
    assert all(p.grad is None for p in step.student.head.parameters())
    assert all(p.grad.any() for p in step.student.body.parameters())
    assert all(p.grad.any() for p in step.aux["prior"].parameters())


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
@pytest.mark.parametrize("offset", [1, 4])
def test_all_networks_of_the_book_fit_each_other(tiny, student, offset):
    """One step: all is finite; the student and the adapters have gradients, the teacher none."""
    teacher = MODELS[(MODELS.index(student) + offset) % len(MODELS)]
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
    logits, terms = method.loss(step)
    terms["loss"].backward()
    assert logits.shape == (4, 5)
    assert all(p.grad.isfinite().all() for p in networks[0].parameters())


# --- thresholds -----------------------------------------------------------------------------------


def features(seed, scale=1.0):
    """Features of a stem and of one stage with four layers."""
    generator = torch.manual_seed(seed)
    layers = [scale * k * torch.randn(8, 3, 4, 4, generator=generator).relu() for k in range(1, 5)]
    return [[torch.zeros(8, 3, 4, 4)], layers]


def residuals_by_hand(ours, theirs, layers):
    """|u| of a group, and its weighted mean."""
    spreads = np.array([np.std(theirs[k].numpy(), ddof=1) for k in layers])
    sizes = [np.abs(ours.numpy() - theirs[k].numpy()) for k in layers]
    means = np.array([size.mean(dtype=np.float64) for size in sizes])
    return sizes, (spreads / spreads.sum() * means).sum()


@pytest.mark.parametrize("threshold", ["learned", "fixed"])
def test_thresholds_start_at_the_weighted_mean_of_the_first_batch(tiny, threshold):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE, threshold=threshold))
    assert prior.thresholds.isnan().all()
    prior(ours, theirs)
    # the student has four layers, so there are four groups of one layer
    means = [residuals_by_hand(ours[1][k], theirs[1], [k])[1] for k in range(4)]
    assert prior.thresholds.tolist() == pytest.approx(means, rel=1e-5)
    started = prior.thresholds.clone()
    prior(features(2, scale=5.0), theirs)  # a later batch does not set them
    assert torch.equal(prior.thresholds, started)


def test_the_threshold_of_several_layers_starts_at_their_weighted_mean(tiny):
    ours, theirs = features(0), features(1)
    ours[1] = ours[1][-1:]
    prior = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE, n=3))
    prior(ours, theirs)
    means = [residuals_by_hand(ours[1][0], theirs[1], layers)[1] for layers in ([0, 1], [2, 3])]
    assert prior.thresholds.tolist() == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [0.05, 1.0])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_learned_threshold_moves_and_stays_within_the_residuals(tiny, gain, lr, momentum):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE, gain=gain))
    optimizer = torch.optim.SGD(prior.parameters(), lr=lr, momentum=momentum)
    largest = torch.tensor(
        [residuals_by_hand(ours[1][k], theirs[1], [k])[0][0].max() for k in range(4)]
    )
    seen = []
    for _ in range(200):
        optimizer.zero_grad()
        prior(ours, theirs)[0].backward()
        optimizer.step()
        seen.append(prior.thresholds.detach().clone())
    seen = torch.stack(seen)
    assert seen.isfinite().all()
    assert (seen[0] != seen[1]).all()
    assert (seen < largest).all()
    assert (seen > 0).all()


def test_a_threshold_below_zero_counts_as_zero_and_rises(tiny):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE))
    prior.thresholds.data.fill_(-0.5)
    total, beyond = prior(ours, theirs)
    total.backward()
    assert (prior.thresholds.grad < 0).all()  # descent raises it
    dense = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE, threshold="none"))
    means = [residuals_by_hand(ours[1][k], theirs[1], [k])[1] for k in range(4)]
    pulled = sum((mean + 0.5) ** 2 for mean in means)
    assert (total - dense(ours, theirs)[0]).item() == pytest.approx(pulled, rel=1e-5)
    assert beyond == dense(ours, theirs)[1]


def test_without_a_pull_a_threshold_never_falls(tiny):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, KR(tiny(), prior=SECOND_RECIPE, pull=0.0))
    prior(ours, theirs)[0].backward()
    assert (prior.thresholds.grad < 0).all()
