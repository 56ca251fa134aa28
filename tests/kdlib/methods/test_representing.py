"""KR: two updates in each step, by the prior and by the posterior, and its settings."""

from dataclasses import replace

import pytest
import torch
from by_hand import (
    SECOND_RECIPE,
    assert_same_weights,
    first_student,
    kl,
    prior_by_hand,
    seeded,
    train_by_hand,
)
from helpers import aux_of, layers_by_hand
from torch import nn
from torch.nn import functional as F

from kdlib import store, train
from kdlib.data import Images
from kdlib.methods import (
    KD,
    KDGAN,
    KR,
    NST,
    AttentionTransfer,
    CrossEntropy,
    Hint,
    OneStage,
    multi_stage,
)

STILL = replace(SECOND_RECIPE, lr=0.0)
POSTERIORS = {
    "CrossEntropy": lambda teacher: CrossEntropy(),
    "KD": KD,
    "NST": lambda teacher: NST(teacher, nst_weight=5.0),
    "Hint": lambda teacher: Hint(teacher, stage=1),
    "AT": AttentionTransfer,
    "KDGAN": lambda teacher: KDGAN(teacher, discriminator=SECOND_RECIPE, copy=SECOND_RECIPE),
}


def kr(teacher, **settings):
    return KR(teacher, **{"prior": SECOND_RECIPE, **settings})


@pytest.fixture
def teacher(tiny):
    """Twice as wide as the student: it needs adapters."""
    return tiny(epochs=1, model="resnet14-x0.5")


@pytest.fixture
def narrow(tiny):
    """As wide as the student."""
    return tiny(model="resnet14-x0.25", keep=(1,))


# --- thresholds in training -----------------------------------------------------------------------


def test_thresholds_stay_finite_and_are_logged(tiny, teacher):
    prior = replace(SECOND_RECIPE, lr=0.5, milestones=(), momentum=0.9)
    trained = train([tiny(epochs=7, method=kr(teacher, prior=prior))])[0]
    log = trained.log
    assert (log.threshold > 0).all()
    assert log.threshold.nunique() == 7
    assert log.train_beyond.between(0.01, 0.99).all()
    mean = aux_of(trained)["prior.thresholds"].mean().item()
    assert trained.final["threshold"] == pytest.approx(mean, rel=1e-6)


def test_without_thresholds_none_is_logged(tiny):
    trained = train([tiny(epochs=1, method=kr(tiny(epochs=1), threshold="none"))])[0]
    assert "threshold" not in trained.log
    assert aux_of(trained) == {}


# --- two updates ----------------------------------------------------------------------------------


@pytest.fixture
def in_float64(monkeypatch):
    """Train in float64: in float32, a rounding error can move a residual over its threshold."""
    batch = Images.batch
    monkeypatch.setattr(Images, "batch", lambda *arguments: batch(*arguments).double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize(
    ("posterior", "threshold"),
    [("CrossEntropy", "none"), ("CrossEntropy", "learned"), ("KD", "learned"), ("KD", "fixed")],
)
def test_training_equals_a_plain_pytorch_loop(
    tiny, teacher, in_float64, posterior, threshold, gamma
):
    inner = KD(teacher, kd_weight=0.6, temperature=3.0) if posterior == "KD" else CrossEntropy()
    settings = {"beta": 0.8, "gain": 1.5, "pull": 0.4, "gamma": gamma, "threshold": threshold}
    method = kr(teacher, posterior=inner, **settings)
    run = tiny(milestones=(1,), decay=0.3, weight_decay=1e-3, method=method, seed=4)
    trained = train([run])[0]
    student, taught_by = first_student(run), store.find_record(teacher).model()

    def six_adapters():
        return nn.ModuleList(
            nn.Sequential(nn.Conv2d(*widths, 1, bias=False), nn.BatchNorm2d(widths[1]))
            for widths in ((4, 8), (8, 16), (16, 32))
            for _ in range(2)
        )

    adapters, values = seeded(run, six_adapters), nn.Parameter(torch.full((6,), torch.nan))

    def prior(x):
        features = [layers_by_hand(network, x) for network in (student, taught_by)]
        first = values.isnan().any()
        return prior_by_hand(method, "other channels", features, adapters, values, first)[0]

    def losses(x, labels):
        yield 0.8 * prior(x)
        logits = student(x)
        loss = F.cross_entropy(logits, labels)
        if posterior == "KD":
            loss = loss + 0.6 * kl(taught_by(x), logits, 3)
        yield loss + gamma * prior(x) if gamma else loss

    learned = [student, adapters, *([values] if threshold == "learned" else [])]
    train_by_hand(run, losses, (method.prior, learned), (run.recipe, [student]))
    # the cache keeps the teacher's logits in float32
    close = (1e-6, 1e-7) if posterior == "KD" else (1e-9, 1e-11)
    assert_same_weights(trained.model().state_dict(), student, *close)
    aux = aux_of(trained)
    if threshold != "none":
        found = aux.pop("prior.thresholds")
        torch.testing.assert_close(found, values.data, rtol=close[0], atol=close[1])
    assert_same_weights(store.select(aux, "prior.adapters."), adapters, *close)


@pytest.mark.parametrize("name", POSTERIORS)
def test_with_a_rate_of_zero_the_prior_changes_only_batch_statistics(tiny, narrow, name):
    """The posterior trains as if it were the method itself."""
    posterior = POSTERIORS[name](narrow)
    runs = [tiny(method=kr(narrow, prior=STILL, posterior=posterior)), tiny(method=posterior)]
    beside, alone = train(runs)
    for key, tensor in alone.model().named_parameters():
        ours = beside.model().get_parameter(key)
        torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-6, msg=key)
    ours, theirs = (dict(trained.model().named_buffers()) for trained in (beside, alone))
    assert not any(torch.equal(ours[key], theirs[key]) for key in ours)
    for column in alone.log.columns:
        if column.startswith("train_"):
            expected = pytest.approx(alone.log[column].tolist(), rel=1e-4)
            assert beside.log[column].tolist() == expected
    assert {"train_prior", "train_beyond", "threshold"} <= {*beside.log.columns}
    assert (beside.log.train_prior > 0).all()


def test_the_log_has_the_terms_of_both_updates(tiny, teacher):
    """With rates of zero, both updates compute the same penalty."""
    final = train([tiny(epochs=1, method=kr(teacher, prior=STILL, gamma=2.0), lr=0.0)])[0].final
    expected = final["train_ce"] + 2 * final["train_prior"]
    assert final["train_loss"] == pytest.approx(expected, rel=1e-5)


# --- the posterior and its teacher ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "epochs"),
    [
        (lambda t: kr(t, posterior=KD(t)), (2, 2)),
        (lambda t: kr(t, at=1, posterior=KD(t)), (1, 1)),
        (lambda t: OneStage(kr(t, posterior=KD(t)), gap=1), (1, 2)),
    ],
    ids=["last", "at 1", "one stage"],
)
def test_the_posterior_gets_the_logits_of_the_same_checkpoint(
    tiny, narrow, monkeypatch, make, epochs
):
    train([narrow])
    models = {epoch: store.find_record(narrow).model(epoch) for epoch in (1, 2)}
    seen, loss = [], KD.loss

    def note(method, step):
        seen.append((step.x, step.teacher_logits))
        return loss(method, step)

    monkeypatch.setattr(KD, "loss", note)
    trained = train([tiny(method=make(narrow))])[0]
    assert trained.summary["teachers"].keys() == {f"{narrow.id}@{epoch}" for epoch in epochs}
    assert len(seen) == 10  # 128 images twice, in batches of 24
    for (x, logits), epoch in zip(seen, [epochs[0]] * 5 + [epochs[1]] * 5, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, models[epoch](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "needed"), [("CrossEntropy", False), ("NST", False), ("KD", True)]
)
def test_logits_are_computed_only_for_a_posterior_that_reads_them(
    tiny, narrow, computed_logits, name, needed
):
    train([narrow])
    run = tiny(method=kr(narrow, posterior=POSTERIORS[name](narrow)))
    assert run.method.needs_logits == needed
    train([run])
    assert any(split == "train" for _, split, *_ in computed_logits) == needed


def test_each_stage_of_a_route_gives_its_checkpoint_to_the_posterior(tiny, narrow):
    method = kr(narrow, posterior=KD(narrow))
    stages = multi_stage(tiny(epochs=1, method=method), (1, 2))
    assert [stage.method.at for stage in stages] == [1, None]
    assert [stage.method.posterior.at for stage in stages] == [1, None]
    first, second = train(stages)
    assert first.summary["teachers"].keys() == {f"{narrow.id}@1"}
    assert second.summary["teachers"].keys() == {f"{first.run.id}@1", f"{narrow.id}@2"}


# --- what is refused ------------------------------------------------------------------------------


def test_the_posterior_is_checked(tiny, narrow, teacher):
    with pytest.raises(ValueError, match="have one teacher") as refusal:
        kr(narrow, posterior=KDGAN(teacher, discriminator=STILL, copy=STILL))
    assert str(teacher) in str(refusal.value)
    with pytest.raises(ValueError, match="no stage 7"):
        tiny(method=kr(narrow, posterior=Hint(narrow, stage=7)))
    for posterior in (OneStage(KD(narrow), gap=1), kr(narrow)):
        with pytest.raises(ValueError, match="cannot be the posterior"):
            kr(narrow, posterior=posterior)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": "soft"}, "threshold 'soft'. Known: learned"),
        ({"n": 0}, "n of at least 1"),
        ({"beta": -0.1}, "below 0"),
        ({"gamma": -0.1}, "below 0"),
        ({"gain": -1.0}, "below 0"),
        ({"pull": -1.0}, "below 0"),
        ({"at": 9}, "not epoch 9"),
    ],
)
def test_settings_out_of_range_are_refused(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        kr(tiny(), **change)
