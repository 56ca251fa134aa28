"""Penalties on weights, sparse recoding of gradients, and the curve of a training."""

import numpy as np
import pytest
import torch
from by_hand import assert_same_weights, first_student, train_by_hand
from helpers import (
    aux_of,
    called,
    new_trainer,
    same_log,
    step_in_float64,
)
from torch import nn
from torch.nn import functional as F

from kdlib import train
from kdlib.engine import state
from kdlib.methods import Penalised
from kdlib.methods.penalties import PENALTIES, Recode

every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def matrices(network):
    """Weights of convolutions and linear layers."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return [module.weight for module in network.modules() if isinstance(module, kinds)]


# --- a recoded gradient ---------------------------------------------------------------------------

WEIGHT = torch.zeros(5)
# the mean of |g| is 2
GRADIENT = torch.tensor([-4.0, -2.0, 0.0, 1.0, 3.0])


def recoded(threshold, gain=2.0, pull=1.0):
    """The gradients of weight and threshold, and the threshold then."""
    weight, threshold = WEIGHT.clone().requires_grad_(), torch.tensor(threshold).requires_grad_()
    Recode.apply(weight, threshold, gain, pull).backward(GRADIENT)
    return weight.grad.tolist(), threshold.grad.item(), threshold.item()


def test_a_gradient_beyond_its_threshold_is_amplified_and_others_become_zero():
    assert recoded(1.5)[0] == [-8.0, -4.0, 0.0, 0.0, 6.0]
    assert recoded(1.5, gain=3.0)[0] == [-12.0, -6.0, 0.0, 0.0, 9.0]
    assert recoded(0.0)[0] == [-8.0, -4.0, 0.0, 2.0, 6.0]
    assert recoded(0.0, gain=1.0)[0] == GRADIENT.tolist()
    assert recoded(100.0)[0] == [0.0] * 5


def test_a_gradient_exactly_at_its_threshold_becomes_zero():
    assert recoded(2.0)[0] == [-8.0, 0.0, 0.0, 0.0, 6.0]
    assert recoded(3.0)[0] == [-8.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("threshold", "share"), [(0.5, 0.8), (1.5, 0.6), (2.0, 0.4), (9.0, 0.0)])
def test_the_gradient_of_a_threshold_has_a_penalty_and_a_pull(threshold, share):
    """-a·t·share + 2·pull·(t - 2)."""
    for gain, pull in ((2.0, 1.0), (3.0, 0.25), (2.0, 0.0)):
        expected = -gain * threshold * share + 2 * pull * (threshold - 2)
        assert recoded(threshold, gain, pull)[1] == pytest.approx(expected, rel=1e-6)


def test_a_threshold_starts_at_the_mean_of_its_first_gradient():
    gradient, _, threshold = recoded(float("nan"))
    assert threshold == 2.0
    assert gradient == [-8.0, 0.0, 0.0, 0.0, 6.0]


def test_a_threshold_below_zero_becomes_zero():
    gradient, slope, threshold = recoded(-0.5)
    assert threshold == 0.0
    assert gradient == [-8.0, -4.0, 0.0, 2.0, 6.0]
    assert slope == -4.0


def test_a_recoded_weight_is_the_weight_to_the_bit():
    weight = torch.randn(3, 4, generator=torch.manual_seed(0))
    assert torch.equal(Recode.apply(weight, torch.tensor(1.0), 2.0, 1.0), weight)


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture
def step():
    """A step of a network of which a tenth of the weights is exactly 0."""

    def make(method, model="lenet-x0.5"):
        step = step_in_float64(method, model, "resnet8-x0.25", size=16)
        with torch.no_grad():
            for weight in matrices(step.student):
                weight[torch.rand(weight.shape, generator=torch.manual_seed(1)) < 0.1] = 0
        return called(step)

    return make


@pytest.mark.parametrize("model", ["lenet-x0.5", "resnet8-x0.25"])
@pytest.mark.parametrize(("penalty", "weight"), [("l1", 0.01), ("l2", 0.3), ("none", 9.0)])
def test_loss_and_gradient_equal_those_computed_by_hand(step, model, penalty, weight):
    step = step(Penalised(penalty=penalty, weight=weight), model)
    student = step.student.network
    logits, terms = Penalised(penalty=penalty, weight=weight).loss(step)
    student.zero_grad()
    F.cross_entropy(student(step.x), step.labels).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    weights = [w.detach().numpy() for w in matrices(student)]
    value = {
        "l1": weight * sum(np.abs(w).sum() for w in weights),
        "l2": weight / 2 * sum((w**2).sum() for w in weights),
        "none": 0.0,
    }[penalty]
    assert (terms["loss"] - terms["ce"]).item() == pytest.approx(value, rel=1e-10)
    assert ("penalty" in terms) == (penalty != "none")
    student.zero_grad()
    terms["loss"].backward()
    ids = {id(w) for w in matrices(student)}
    for name, p in student.named_parameters():
        added = {"l1": p.detach().sign(), "l2": p.detach(), "none": 0 * p.detach()}[penalty]
        by_hand = expected[name] + (weight * added if id(p) in ids else 0)
        torch.testing.assert_close(p.grad, by_hand, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(logits, student(step.x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", ["lenet-x0.5", "resnet8-x0.25"])
def test_sparse_recoding_changes_only_gradients(step, model):
    method = Penalised(penalty="sparse", gain=3.0, pull=0.5)
    step = step(method, model)
    student, values = step.student.network, step.aux["thresholds"].values
    expected_logits = student(step.x)
    student.zero_grad()
    F.cross_entropy(expected_logits, step.labels).backward()
    before = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    logits, terms = method.loss(step)
    assert torch.equal(logits, expected_logits)
    assert terms["loss"] is terms["ce"]
    assert values.isnan().all()
    terms["loss"].backward()
    ids, thresholds, slopes = {id(w) for w in matrices(student)}, [], []
    for name, p in student.named_parameters():
        g = before[name]
        if id(p) not in ids:  # biases and batch norm
            assert torch.equal(p.grad, g), name
            continue
        t = g.abs().mean()
        by_hand = torch.where(g.abs() > t, 3 * g, 0)
        torch.testing.assert_close(p.grad, by_hand, rtol=1e-9, atol=0, msg=name)
        assert 0 < (p.grad == 0).double().mean() < 1
        thresholds.append(t.item())
        slopes.append(-3 * t.item() * (g.abs() > t).double().mean().item())
    assert values.tolist() == pytest.approx(thresholds, rel=1e-5)
    assert values.grad.tolist() == pytest.approx(slopes, rel=1e-5)


@pytest.mark.parametrize("threshold", [1e6, torch.inf])
def test_with_thresholds_above_all_gradients_only_biases_and_batch_norm_learn(step, threshold):
    method = Penalised(penalty="sparse")
    step = step(method, "vgg13-x0.03")
    student, values = step.student.network, step.aux["thresholds"].values
    values.data.fill_(threshold)
    method.loss(step)[1]["loss"].backward()
    ids = {id(w) for w in matrices(student)}
    assert len(ids) == len(values)
    for name, p in student.named_parameters():
        assert p.grad.any() == (id(p) not in ids) or "bias" in name, name
    assert student.get_parameter("stem.1.bias").grad.any()


def test_with_thresholds_above_all_gradients_weights_do_not_change(tiny):
    method = Penalised(penalty="sparse", pull=0.0)
    trainer = new_trainer(tiny(model="lenet", weight_decay=0.0, method=method))
    trainer.state.modules["thresholds"].values.data.fill_(1e6)
    student = trainer.state.modules["student"]
    first = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer.begin_epoch()
    while trainer.taken < trainer.steps:
        trainer.advance()
    for name, p in student.named_parameters():
        assert torch.equal(p, first[name]) == ("weight" in name), name


# --- training -------------------------------------------------------------------------------------


def train_penalised_by_hand(run):
    """The student, the thresholds, and the label term of every step."""
    method, model, losses = run.method, first_student(run), []
    weights = matrices(model)
    thresholds = [nn.Parameter(torch.full((), torch.nan)) for _ in weights]

    def recode(weight, threshold):
        def hook(g):
            size = g.abs()
            t = threshold.data.nan_to_num(size.mean()).clamp(min=0)
            threshold.data.copy_(t)
            beyond = size > t
            pull = 2 * method.pull * (t - size.mean())
            threshold.grad = pull - method.gain * t * beyond.float().mean()
            return torch.where(beyond, method.gain * g, 0)

        weight.register_hook(hook)

    if method.penalty == "sparse":
        for weight, threshold in zip(weights, thresholds, strict=True):
            recode(weight, threshold)

    def step(x, labels):
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.item())
        if method.penalty == "l1":
            loss = loss + method.weight * sum(w.abs().sum() for w in weights)
        if method.penalty == "l2":
            loss = loss + method.weight * sum((w**2).sum() for w in weights) / 2
        yield loss

    train_by_hand(run, step, (run.recipe, [model, *thresholds]))
    return model, [t.item() for t in thresholds], losses


@every_penalty
@pytest.mark.parametrize("model", ["lenet", "resnet8-x0.25"])
def test_training_equals_a_plain_pytorch_loop(tiny, model, penalty):
    """Few steps: a rounding error can move a gradient over its threshold."""
    method = Penalised(penalty=penalty, weight=0.003, gain=1.5, pull=0.7, bins=9, every=1)
    run = tiny(model=model, batch=60, milestones=(1,), method=method, seed=2, lr=0.02)
    trained = train([run])[0]
    expected, thresholds, losses = train_penalised_by_hand(run)
    atol = 2e-5 if penalty == "sparse" else 1e-6
    assert_same_weights(trained.model().state_dict(), expected, atol=atol)
    aux = aux_of(trained)
    assert aux.keys() == ({"thresholds.values"} if penalty == "sparse" else set())
    if penalty == "sparse":
        assert aux["thresholds.values"].tolist() == pytest.approx(thresholds, rel=1e-4)
    assert trained.summary["curve"] == {"every": 1, "ce": pytest.approx(losses, rel=1e-4)}
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("bins", "every", "complete"),
    [(200, 1, 10), (200, 3, 3), (2, 3, 2), (200, 10, 1), (200, 11, 0)],
)
def test_the_curve_has_the_mean_of_the_label_term_in_each_complete_bin(tiny, bins, every, complete):
    method = Penalised(penalty="l1", weight=0.01, bins=bins, every=every)
    run = tiny(model="lenet", method=method, lr=0.01)
    *_, losses = train_penalised_by_hand(run)
    assert len(losses) == 10
    expected = [np.mean(losses[every * k : every * (k + 1)]) for k in range(complete)]
    curve = train([run])[0].summary["curve"]
    assert curve == {"every": every, "ce": pytest.approx(expected, rel=1e-4)}


def test_a_run_without_a_curve_has_none_in_its_record(tiny):
    assert "curve" not in train([tiny(epochs=1)])[0].summary


def test_without_a_penalty_a_run_learns_from_labels_alone(tiny):
    penalised, plain = train([tiny(method=Penalised()), tiny()])
    ours, theirs = penalised.model().state_dict(), plain.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert same_log(penalised, plain)


def test_the_log_has_the_penalty(tiny):
    none, l1, sparse = train(
        [tiny(method=Penalised(penalty=p, weight=0.01)) for p in ("none", "l1", "sparse")]
    )
    for trained in (none, sparse):
        assert "train_penalty" not in trained.log
        assert trained.log.train_loss.tolist() == trained.log.train_ce.tolist()
    total = l1.log.train_ce + l1.log.train_penalty
    assert l1.log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_thresholds_change_and_stay_finite(tiny):
    method = Penalised(penalty="sparse")
    trainer = new_trainer(tiny(epochs=9, model="lenet", lr=0.3, method=method))
    seen = []
    for _ in range(9):
        trainer.begin_epoch()
        while trainer.taken < trainer.steps:
            trainer.advance()
            seen.append(trainer.state.modules["thresholds"].values.detach().clone())
        trainer.end_epoch()
    seen = torch.stack(seen)
    assert seen.isfinite().all()
    assert (seen[1:] != seen[:-1]).any(0).all()


def test_a_method_that_reads_gradients_never_trains_in_half_precision(tiny, monkeypatch):
    """Half precision scales gradients, and a threshold is of gradients as they are."""
    monkeypatch.setattr(state, "training_dtype", lambda device: torch.float16)
    trainer = new_trainer(tiny(model="lenet", method=Penalised(penalty="sparse")))
    assert trainer.state.dtype == torch.float32
    assert not trainer.state.scaler.is_enabled()
    assert new_trainer(tiny(model="lenet")).state.dtype == torch.float16


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "bins and every"),
        ({"bins": 0}, "bins and every"),
        ({"weight": -1}, "at least 0"),
        ({"gain": -1}, "at least 0"),
        ({"pull": -1}, "at least 0"),
        ({"penalty": "L1"}, "penalty 'L1'. Known: none, l1, l2, sparse"),
        ({"penalty": ""}, "penalty ''. Known: none, l1, l2, sparse"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Penalised(**change)
