"""KR in the second reading: the aggregate's own training, and the penalty on the student."""

from dataclasses import replace

import pytest
import torch
from by_hand import (
    KR_PAIRS,
    SECOND_RECIPE,
    assert_same_weights,
    assert_same_with_gradients,
    first_student,
    on_logits,
    seeded,
    train_by_hand,
)
from helpers import aux_of, called, layers_by_hand, step_in_float64
from torch import nn
from torch.nn import functional as F

from kdlib import build_model, store, train
from kdlib.methods import KD, AggregateKR, Step

THRESHOLDS = ("learned", "fixed", "none")


def groups_by_hand(pair, layers):
    """For every group: stage, the student's layer, the group's features, the feature before it."""
    for stage in (1, 2, 3):
        for student, taught in KR_PAIRS[pair][2]:
            before = layers[stage][taught[0] - 1] if taught[0] else layers[stage - 1][-1]
            yield stage, student, [layers[stage][k] for k in taught], before


def prior_by_hand(pair, theirs, layers):
    """Σ_l w_l·mean (F_A - F_l)² over all groups."""
    total = 0
    for (*_, features, before), layer in zip(groups_by_hand(pair, theirs), layers, strict=True):
        spreads = torch.stack([feature.std() for feature in features])
        aggregate = layer(before)
        for weight, feature in zip(spreads / spreads.sum(), features, strict=True):
            total = total + weight * ((aggregate - feature) ** 2).mean()
    return total


def penalty_by_hand(method, pair, features, layers, adapters, thresholds, start):
    """The penalty on the student, with gradients that are written out, and the share beyond."""
    (ours, theirs), total, shares = features, 0, []
    pieces = zip(groups_by_hand(pair, theirs), layers, adapters, strict=True)
    for k, ((stage, student, _, before), layer, adapt) in enumerate(pieces):
        u = adapt(ours[stage][student]) - layer(before).detach()
        t = 0 if method.threshold == "none" else thresholds[k]
        beyond = (u.abs() > t).to(u.dtype)
        total = total + method.gain / 2 * (beyond * u**2).mean()
        if method.threshold == "learned":
            bell = (u.detach().abs() - t.detach()) / start
            density = bell.sigmoid() * (1 - bell.sigmoid()) / start
            slope = -(method.gain / 2 * density * u.detach() ** 2).mean()
            total = total + slope * (t - t.detach()) + method.pull * (t - start) ** 2
        shares.append(beyond.mean())
    return total, sum(shares) / len(shares)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("pair", KR_PAIRS)
def test_both_losses_and_their_gradients_equal_those_computed_by_hand(tiny, pair, threshold):
    settings = {"gain": 2.5, "pull": 0.3, "beta": 0.7, "gamma": 0.4, "threshold": threshold}
    teacher = tiny()
    method = AggregateKR(teacher, prior=SECOND_RECIPE, posterior=KD(teacher), **settings)
    step = step_in_float64(method, *KR_PAIRS[pair][:2])
    aggregate, recoding = step.aux["aggregate"], step.aux["prior"]
    if threshold == "learned":
        moved = torch.rand(len(recoding.groups), generator=torch.manual_seed(3)).double()
        recoding.thresholds.data.copy_(moved)
    networks = (step.student, step.teacher)
    features = [layers_by_hand(network, step.x) for network in networks]
    ((name, terms),) = method.extra_updates(called(step))
    assert name == "prior"
    learners, close = [step.student, aggregate, recoding], {"gradient": 1e-8, "atol": 1e-11}
    expected = 0.7 * prior_by_hand(pair, features[1], aggregate.layers)
    assert_same_with_gradients(terms["prior"], expected, learners, **close)
    for learner, reached in zip(learners, (False, True, False), strict=True):
        weights = [*learner.parameters()]
        found = (
            torch.autograd.grad(
                terms["prior"],
                weights,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if weights
            else ()
        )
        assert any(g.any() for g in found) == reached
    penalty, share = penalty_by_hand(
        method, pair, features, aggregate.layers, recoding.adapters, recoding.thresholds,
        recoding.start,
    )  # fmt: skip
    loss = on_logits(step, 1.0, 1.0, 5.0) + 0.4 * penalty
    terms = method.loss(called(step))[1]
    assert_same_with_gradients(terms["loss"], loss, learners, **close)
    assert terms["recoding"].item() == pytest.approx(penalty.item(), rel=1e-9)
    assert terms["beyond"].item() == pytest.approx(share.item(), abs=1e-6)
    reached = torch.autograd.grad(
        terms["loss"], [*aggregate.parameters()], allow_unused=True, materialize_grads=True
    )
    assert not any(g.any() for g in reached)  # Eq. 10 leaves the aggregate alone


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_training_equals_a_plain_pytorch_loop(tiny, gamma):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    before = train([teacher])[0].summary["weights"]
    settings = {"beta": 0.8, "gain": 1.5, "pull": 0.4, "gamma": gamma}
    method = AggregateKR(teacher, prior=SECOND_RECIPE, **settings)
    run = tiny(milestones=(1,), decay=0.3, weight_decay=1e-3, method=method, seed=4)
    trained = train([run])[0]
    assert store.find_record(teacher).summary["weights"] == before
    student, taught_by = first_student(run), store.find_record(teacher).model()
    widths = [(8, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)]

    def convolution(inputs, outputs, kernel, size=None):
        resize = [] if size is None else [nn.AdaptiveAvgPool2d(size)]
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(*resize, layer, nn.BatchNorm2d(outputs))

    def parts():
        sizes = [None, None, 4, None, 2, None]
        layers = [convolution(*w, 3, size) for w, size in zip(widths, sizes, strict=True)]
        adapters = [convolution(w[1] // 2, w[1], 1) for w in widths]
        return nn.ModuleList(layers), nn.ModuleList(adapters)

    layers, adapters = seeded(run, parts)
    weights = [m.weight for m in student.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    start = torch.cat([w.detach().flatten() for w in weights]).abs().mean()
    thresholds = nn.Parameter(start.repeat(6))

    def losses(x, labels):
        theirs = layers_by_hand(taught_by, x)
        yield 0.8 * prior_by_hand("other channels", theirs, layers)
        loss = F.cross_entropy(student(x), labels)
        features = [layers_by_hand(student, x), theirs]
        pieces = (layers, adapters, thresholds, start)
        yield loss + gamma * penalty_by_hand(method, "other channels", features, *pieces)[0]

    learned = [student, adapters, thresholds]
    train_by_hand(run, losses, (method.prior, [layers]), (run.recipe, learned))
    close = (2e-4, 2e-5)  # a rounding error can move a residual over its threshold
    assert_same_weights(trained.model().state_dict(), student, *close)
    aux = aux_of(trained)
    assert_same_weights(store.select(aux, "prior.adapters."), adapters, *close)
    assert_same_weights(store.select(aux, "aggregate.layers."), layers, *close)
    torch.testing.assert_close(aux["prior.thresholds"], thresholds.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(aux["prior.start"], start)


def test_the_aggregate_comes_near_the_weighted_mean_of_its_layers(tiny):
    """Eq. 9 trains it without a label: the error falls, whatever the student does."""
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    method = AggregateKR(teacher, prior=replace(SECOND_RECIPE, milestones=()), gamma=0.0)
    log = train([tiny(epochs=6, lr=0.0, method=method)])[0].log
    assert log.train_prior.iloc[-1] < 0.5 * log.train_prior.iloc[0]
    assert log.threshold.nunique() == 1  # nothing moves the student's part at a rate of 0


def test_a_threshold_can_move_and_stays_finite(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    free = AggregateKR(teacher, prior=SECOND_RECIPE, pull=0.0)
    held = replace(free, pull=1.0)
    free, held = train([tiny(epochs=4, method=method) for method in (free, held)])
    start = aux_of(free)["prior.start"].item()
    assert held.log.threshold.nunique() == 4
    assert start < held.final["threshold"] < free.final["threshold"] < 100


@pytest.mark.parametrize("student", ["vgg13-x0.03", "densenet-bc-16-4", "lenet", "resnet50-x0.03"])
def test_other_networks_of_the_book_fit(tiny, student):
    teacher = {"lenet": "vgg13-x0.03", "vgg13-x0.03": "lenet"}.get(student, "mobilenetv2-t1-w0.1")
    method = AggregateKR(tiny(model=teacher), prior=SECOND_RECIPE)
    networks = [build_model(name, 5, 1, seed=k) for k, name in enumerate((student, teacher))]
    x, labels = torch.randn(4, 1, 16, 16, generator=torch.manual_seed(0)), torch.arange(4)
    aux = method.aux_modules(networks[0].eval(), networks[1].eval(), x)
    step = called(Step(x, labels, None, networks[0].train(), networks[1], aux, {}))
    ((_, terms),) = method.extra_updates(step)
    terms["prior"].backward()
    method.loss(step)[1]["loss"].backward()
    assert all(p.grad is None for p in networks[1].parameters())
    trained = [*aux["aggregate"].parameters(), *aux["prior"].parameters()]
    assert all(p.grad.isfinite().all() for p in trained)
