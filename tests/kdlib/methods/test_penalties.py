"""Penalties on weights, sparse recoding of gradients, and the curve of a training."""

from functools import partial

import pytest
import torch
from by_hand import assert_same_weights, first_student, kl, train_by_hand
from helpers import aux_of, new_trainer
from torch import nn
from torch.nn import functional as F

from kdlib import store, train
from kdlib.engine import state
from kdlib.methods import KD, NST, Penalised
from kdlib.methods.penalties import PENALTIES, Recode

every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


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
    assert recoded(2.0)[0] == [-8.0, 0.0, 0.0, 0.0, 6.0]  # one is exactly at the threshold
    assert recoded(1.5)[0] == [-8.0, -4.0, 0.0, 0.0, 6.0]
    assert recoded(1.5, gain=3.0)[0] == [-12.0, -6.0, 0.0, 0.0, 9.0]
    assert recoded(0.0, gain=1.0)[0] == GRADIENT.tolist()
    assert recoded(100.0)[0] == [0.0] * 5


@pytest.mark.parametrize(("threshold", "share"), [(0.5, 0.8), (1.5, 0.6), (2.0, 0.4), (9.0, 0.0)])
def test_the_gradient_of_a_threshold_has_a_penalty_and_a_pull(threshold, share):
    """-a·t·share + 2·pull·(t - 2)."""
    for gain, pull in ((2.0, 1.0), (3.0, 0.25), (2.0, 0.0)):
        expected = -gain * threshold * share + 2 * pull * (threshold - 2)
        assert recoded(threshold, gain, pull)[1] == pytest.approx(expected, rel=1e-6)


def test_a_threshold_starts_at_the_mean_of_its_first_gradient():
    assert recoded(float("nan")) == (recoded(2.0)[0], pytest.approx(recoded(2.0)[1]), 2.0)


def test_a_threshold_below_zero_becomes_zero():
    assert recoded(-0.5) == ([-8.0, -4.0, 0.0, 2.0, 6.0], -4.0, 0.0)


# --- training -------------------------------------------------------------------------------------


@every_penalty
@pytest.mark.parametrize(
    ("model", "taught"), [("lenet", False), ("resnet8-x0.25", False), ("lenet", True)]
)
def test_training_equals_a_plain_pytorch_loop(tiny, model, taught, penalty):
    """Few steps: a rounding error can move a gradient over its threshold."""
    settings = {"penalty": penalty, "weight": 0.003, "gain": 1.5, "pull": 0.7}
    teacher = tiny(epochs=1, model="lenet-x2")
    base = {"base": KD(teacher, ce_weight=0.3, kd_weight=0.6, temperature=3)} if taught else {}
    method = Penalised(bins=9, every=1, **settings, **base)
    run = tiny(model=model, batch=60, milestones=(1,), method=method, seed=2, lr=0.02)
    before = train([teacher])[0].summary["weights"]
    trained = train([run])[0]
    assert store.find_record(teacher).summary["weights"] == before
    network, losses, taught_by = first_student(run), [], store.find_record(teacher).model()
    kinds = (nn.Conv2d, nn.Linear)  # biases and batch norm have no penalty
    weights = [module.weight for module in network.modules() if isinstance(module, kinds)]
    thresholds = [nn.Parameter(torch.full((), torch.nan)) for _ in weights]

    def recode(threshold, g):
        size = g.abs()
        t = threshold.data.nan_to_num(size.mean()).clamp(min=0)
        threshold.data.copy_(t)
        beyond = size > t
        pull = 2 * method.pull * (t - size.mean())
        threshold.grad = pull - method.gain * t * beyond.float().mean()
        return torch.where(beyond, method.gain * g, 0)

    if penalty == "sparse":
        for weight, threshold in zip(weights, thresholds, strict=True):
            weight.register_hook(partial(recode, threshold))

    def step(x, labels):
        logits = network(x)
        loss = F.cross_entropy(logits, labels)
        if taught:
            loss = 0.3 * loss + 0.6 * kl(taught_by(x), logits, 3)
        losses.append(loss.item())
        if penalty == "l1":
            loss = loss + method.weight * sum(w.abs().sum() for w in weights)
        if penalty == "l2":
            loss = loss + method.weight * sum((w**2).sum() for w in weights) / 2
        yield loss

    train_by_hand(run, step, (run.recipe, [network, *thresholds]))
    atol = 2e-5 if penalty == "sparse" else 1e-6
    assert_same_weights(trained.model().state_dict(), network, atol=atol)
    aux = aux_of(trained)
    assert aux.keys() == ({"thresholds.values"} if penalty == "sparse" else set())
    if penalty == "sparse":
        expected = [threshold.item() for threshold in thresholds]
        assert aux["thresholds.values"].tolist() == pytest.approx(expected, rel=1e-4)
    term = "base" if taught else "ce"
    assert trained.summary["curve"] == {"every": 1, term: pytest.approx(losses, rel=1e-4)}
    assert len(losses) == 4


def test_a_run_without_a_curve_has_none_in_its_record(tiny):
    assert "curve" not in train([tiny(epochs=1)])[0].summary


def test_the_log_has_the_penalty(tiny):
    l1, sparse = train([tiny(method=Penalised(penalty=p, weight=0.01)) for p in ("l1", "sparse")])
    assert sparse.log.train_loss.tolist() == sparse.log.train_ce.tolist()
    total = l1.log.train_ce + l1.log.train_penalty
    assert l1.log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_a_method_that_reads_gradients_never_trains_in_half_precision(tiny, monkeypatch):
    """Half precision scales gradients, and a threshold is of gradients as they are."""
    monkeypatch.setattr(state, "training_dtype", lambda *_: torch.float16)
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
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Penalised(**change)


def test_another_base_is_refused(tiny):
    with pytest.raises(ValueError, match="CrossEntropy or KD, not NST"):
        Penalised(base=NST(tiny()))
