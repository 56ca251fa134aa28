"""KDGAN: each term trains one of three networks, and the teacher itself does not change."""

import numpy as np
import pytest
import torch
from by_hand import assert_same_weights, digits, first_student, kl, seeded, train_by_hand
from helpers import aux_of, batches, called, gradients, new_trainer, step_in_float64
from scipy.special import expit, log_softmax, rel_entr, softmax
from torch import nn

from kdlib import Recipe, store, train
from kdlib.engine.plan import mix
from kdlib.methods import KDGAN
from kdlib.methods.peers import build_discriminator
from kdlib.models import Staged
from kdlib.store import fingerprint

JUDGE = Recipe(9, 9, lr=0.03, milestones=(1,), decay=0.5, momentum=0.5, weight_decay=1e-4)
COPY = Recipe(9, 9, lr=0.01, milestones=(1,), decay=0.2, momentum=0.8, weight_decay=1e-3)
SETTINGS = {
    "share": 0.3,
    "kd_weight": 0.7,
    "back_weight": 0.2,
    "temperature": 2.0,
    "relaxation": 0.6,
}
# The network that each term trains.
TRAINS = {
    "adversarial": "student",
    "kd": "student",
    "teacher_adversarial": "teacher",
    "teacher_kd": "teacher",
    "discriminator": "discriminator",
}


def kdgan(teacher, **changes):
    return KDGAN(teacher, **{"discriminator": JUDGE, "copy": COPY, **changes})


def uniform(seed, epoch, shape):
    """The random numbers of an epoch."""
    generator = torch.Generator().manual_seed(mix("uniform", seed, epoch))
    return torch.rand(shape, generator=generator).clamp(2**-24, 1 - 2**-24)


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture
def step(tiny):
    """A step in which the copy differs a little from the teacher."""
    step = step_in_float64(kdgan(tiny()), "resnet8-x0.25", "resnet14-x0.25")
    generator = torch.manual_seed(5)
    with torch.no_grad():
        for p in step.aux["teacher"].parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    step.aux["teacher"].train()
    return called(step)


@pytest.fixture
def networks(step):
    aux = {name: module.network for name, module in step.aux.items()}
    return {"student": step.student.network, **aux}


def test_the_terms_equal_those_computed_in_numpy(tiny, step, networks):
    logits, terms = kdgan(tiny(), **SETTINGS).loss(step)
    own, taught, scores = (
        networks[name](step.x).detach().numpy() for name in ("student", "teacher", "discriminator")
    )
    gumbel = -np.log(-np.log(step.inputs["uniform"].numpy()))
    samples = [
        softmax((log_softmax(z, 1) + gumbel[:, k]) / 0.6, 1) for k, z in enumerate((own, taught))
    ]
    fails = [np.log(1 - expit((z * scores).sum(1))).mean() for z in samples]
    real = np.log(expit(scores[np.arange(4), step.labels])).mean()

    def divergence(of, by):
        return 4 * rel_entr(softmax(of / 2, 1), softmax(by / 2, 1)).sum() / 4

    expected = {
        "adversarial": 0.3 * fails[0],
        "kd": 0.7 * divergence(taught, own),
        "teacher_adversarial": 0.7 * fails[1],
        "teacher_kd": 0.2 * divergence(own, taught),
        "discriminator": -(real + 0.3 * fails[0] + 0.7 * fails[1]),
    }
    assert terms.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name
        assert abs(value) > 1e-3
    assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-9)
    torch.testing.assert_close(logits.detach().numpy(), own)


@pytest.mark.parametrize("term", TRAINS)
def test_a_term_trains_one_network_and_no_other(tiny, step, networks, term):
    step.teacher.network.requires_grad_(True)
    value = kdgan(tiny()).loss(step)[1][term]
    for name, network in (networks | {"the teacher itself": step.teacher.network}).items():
        found = gradients(value, [network])
        assert all(g.isfinite().all() for g in found)
        reached = [g.any() for g in found]
        assert all(reached) if name == TRAINS[term] else not any(reached), name


def three_losses(method, networks, x, labels, noise):
    """The losses of student, copy and discriminator, one after the other."""
    own, taught, scores = (networks[name](x) for name in ("student", "teacher", "discriminator"))
    gumbel = -(-noise.log()).log()

    def sample(z, k):
        return ((z.log_softmax(1) + gumbel[:, k]) / method.relaxation).softmax(1)

    def fails(z, s):
        return (1 - (z * s).sum(1).sigmoid()).log().mean()

    share, t, fixed = method.share, method.temperature, scores.detach()
    ours, theirs = sample(own, 0), sample(taught, 1)
    yield share * fails(ours, fixed) + method.kd_weight * kl(taught, own, t)
    yield (1 - share) * fails(theirs, fixed) + method.back_weight * kl(own, taught, t)
    real = scores[torch.arange(len(labels)), labels].sigmoid().log().mean()
    ours, theirs = ours.detach(), theirs.detach()
    yield -real - share * fails(ours, scores) - (1 - share) * fails(theirs, scores)


def test_a_discriminator_gives_a_score_for_every_label_at_any_image_size():
    for size, channels, classes in ((8, 1, 10), (32, 3, 100), (28, 1, 10)):
        judge = build_discriminator(channels, classes)
        assert judge(torch.zeros(2, channels, size, size)).shape == (2, classes)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in judge.modules())
    assert not isinstance(judge, Staged)  # so that it is not tested as a classifier


@pytest.mark.parametrize(
    "change",
    [
        {"share": 1.1},
        {"kd_weight": -1},
        {"back_weight": -1},
        {"temperature": 0},
        {"relaxation": 0},
    ],
)
def test_a_number_out_of_its_range_is_refused(tiny, change):
    with pytest.raises(ValueError, match="outside its range"):
        kdgan(tiny(), **change)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny):
    return tiny(model="resnet14-x0.25", keep=(1,))


def test_training_equals_a_plain_pytorch_loop(tiny, teacher):
    run = tiny(milestones=(1,), decay=0.3, method=kdgan(teacher, **SETTINGS), seed=3)
    trained = train([run])[0]
    copy = store.find_record(teacher).model().train().requires_grad_(True)
    judge = seeded(run, lambda: build_discriminator(1, 10))
    networks = nn.ModuleDict(
        {"student": first_student(run), "teacher": copy, "discriminator": judge}
    )
    networks.to(memory_format=torch.channels_last)
    epochs = [epoch for epoch, *_ in batches(run, digits(run))]
    # an epoch has up to 6 steps
    noise = (
        uniform(3, epoch, (6, 24, 2, 10))[k - epochs.index(epoch)] for k, epoch in enumerate(epochs)
    )

    def losses(x, labels):
        return three_losses(run.method, networks, x, labels, next(noise))

    recipes = (run.recipe, COPY, JUDGE)
    groups = [(r, [n]) for r, n in zip(recipes, networks.values(), strict=True)]
    train_by_hand(run, losses, *groups)
    assert_same_weights(trained.model().state_dict(), networks.pop("student"), 1e-4, 1e-5)
    assert_same_weights(aux_of(trained), networks, 1e-4, 1e-5)


def test_the_copy_starts_as_the_teachers_checkpoint(tiny, teacher):
    before = train([teacher])[0]
    for at in (1, None):
        copy = new_trainer(tiny(method=kdgan(teacher, at=at))).state.modules["teacher"]
        assert fingerprint(copy.state_dict()) == before.summary["weights"][str(at or 2)]


def test_the_log_has_the_terms_and_the_copys_accuracy(tiny, teacher):
    log = train([tiny(method=kdgan(teacher))])[0].log
    terms = log[[f"train_{name}" for name in TRAINS]]
    assert log.train_loss.tolist() == pytest.approx(terms.sum(axis=1).tolist(), rel=1e-5)
    assert {"test_teacher_top1", "test_teacher_ce", "test_teacher_kl"} <= {*log.columns}
    assert "test_discriminator_top1" not in log.columns
    assert (log.test_teacher_kl > 0).all()  # the copy differs from the teacher


def test_the_samples_depend_on_seed_and_epoch_and_continue_from_the_start(tiny, teacher):
    first = tiny(epochs=1, method=kdgan(teacher))
    train([first])
    for run, epoch in ((tiny(method=kdgan(teacher), start=first, seed=7), 1), (first, 0)):
        trainer = new_trainer(run)
        trainer.begin_epoch()
        expected = uniform(run.seed, epoch, (6, 24, 2, 10))
        assert torch.equal(trainer.data.inputs["uniform"], expected)
