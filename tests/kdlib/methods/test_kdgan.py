"""KDGAN: three players, whose terms reach nobody else, and a teacher that stays what it was."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import (
    batches,
    called,
    final_weights,
    gradients,
    new_trainer,
    parts_fingerprint,
    parts_of,
    same_log,
    step_in_float64,
    watch_teachers,
)
from scipy.special import expit, log_softmax, rel_entr, softmax
from torch.nn import functional as F

from kdlib import Recipe, build_model, load_data, store, train
from kdlib.engine.plan import mix, noise
from kdlib.methods import KDGAN, OneStage, multi_stage
from kdlib.methods.peers import build_discriminator
from kdlib.models import Staged
from kdlib.store import fingerprint

JUDGES = Recipe(9, 9, lr=0.03, milestones=(1,), decay=0.5, momentum=0.5, weight_decay=1e-4)
COPYS = Recipe(9, 9, lr=0.01, milestones=(1,), decay=0.2, momentum=0.8, weight_decay=1e-3)
NAMES = ("resnet8-x0.25", "resnet14-x0.25")


def kdgan(teacher, **changes):
    return KDGAN(teacher, **{"discriminator": JUDGES, "copy": COPYS, **changes})


# --- the loss -------------------------------------------------------------------------------------


@pytest.fixture
def step(tiny):
    """Of networks that do not agree: the copy is moved a little from the teacher."""
    step = step_in_float64(kdgan(tiny()), *NAMES)
    generator = torch.manual_seed(5)
    with torch.no_grad():
        for p in step.parts["teacher"].parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    step.parts["teacher"].train()
    return called(step)


SETTINGS = {
    "share": 0.3,
    "kd_weight": 0.7,
    "back_weight": 0.2,
    "temperature": 2.0,
    "relaxation": 0.6,
}


def test_the_terms_equal_those_computed_in_numpy(tiny, step):
    logits, terms = kdgan(tiny(), **SETTINGS).loss(step)
    own, taught, scores = (
        network(step.x).detach().numpy()
        for network in (step.student, step.parts["teacher"], step.parts["discriminator"])
    )
    gumbel = -np.log(-np.log(step.noise.numpy()))
    samples = [
        softmax((log_softmax(z, 1) + gumbel[:, k]) / 0.6, 1) for k, z in enumerate((own, taught))
    ]
    fails = [np.log(1 - expit((z * scores).sum(1))).mean() for z in samples]
    real = np.log(expit(scores[np.arange(4), step.labels])).mean()

    def kl(of, by):
        p, q = softmax(of / 2, 1), softmax(by / 2, 1)
        return 4 * rel_entr(p, q).sum() / 4

    expected = {
        "adversarial": 0.3 * fails[0],
        "kd": 0.7 * kl(taught, own),
        "teacher_adversarial": 0.7 * fails[1],
        "teacher_kd": 0.2 * kl(own, taught),
        "discriminator": -(real + 0.3 * fails[0] + 0.7 * fails[1]),
    }
    assert terms.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name
        assert abs(value) > 1e-3
    assert terms["loss"].item() == pytest.approx(sum(expected.values()), rel=1e-9)
    torch.testing.assert_close(logits.detach().numpy(), own)


PLAYERS = {
    "adversarial": "student",
    "kd": "student",
    "teacher_adversarial": "teacher",
    "teacher_kd": "teacher",
    "discriminator": "discriminator",
}


@pytest.mark.parametrize("term", PLAYERS)
def test_a_term_reaches_its_player_and_nobody_else(tiny, step, term):
    for p in step.teacher.network.parameters():
        p.requires_grad_(True)
    value = kdgan(tiny()).loss(step)[1][term]
    networks = {
        "student": step.student.network,
        **{name: part.network for name, part in step.parts.items()},
        "the run's own": step.teacher.network,
    }
    for name, network in networks.items():
        moved = [g.any() for g in gradients(value, [network])]
        assert all(moved) if name == PLAYERS[term] else not any(moved), name
        assert all(g.isfinite().all() for g in gradients(value, [network]))


def test_the_gradient_of_each_player_is_that_of_its_own_loss(tiny, step):
    """Written as three losses, nothing shared between them."""
    method = kdgan(tiny(), **SETTINGS)
    total = method.loss(step)[1]["loss"]
    student, teacher, judge = (
        step.student.network,
        step.parts["teacher"].network,
        step.parts["discriminator"].network,
    )
    with torch.no_grad():
        own, taught, scores = student(step.x), teacher(step.x), judge(step.x)
    gumbel = -(-step.noise.log()).log()

    def sample(z, k):
        return ((z.log_softmax(1) + gumbel[:, k]) / 0.6).softmax(1)

    def kl(of, by):
        p = (of / 2).softmax(1)
        return 4 * (p * (p.log() - (by / 2).log_softmax(1))).sum(1).mean()

    def fails(z, s):
        return (1 - (z * s).sum(1).sigmoid()).log().mean()

    z, t, s = student(step.x), teacher(step.x), judge(step.x)
    onehot = torch.eye(5, dtype=torch.float64)[step.labels]
    expected = {
        student: 0.3 * fails(sample(z, 0), scores) + 0.7 * kl(taught, z),
        teacher: 0.7 * fails(sample(t, 1), scores) + 0.2 * kl(own, t),
        judge: -(s * onehot).sum(1).sigmoid().log().mean()
        - 0.3 * fails(sample(own, 0), s)
        - 0.7 * fails(sample(taught, 1), s),
    }
    for network, loss in expected.items():
        for got, by_hand in zip(
            gradients(total, [network]), gradients(loss, [network]), strict=True
        ):
            torch.testing.assert_close(got, by_hand, rtol=1e-7, atol=1e-11)


def test_a_copy_that_nothing_moves_gets_a_gradient_of_zero(tiny, step):
    method = kdgan(tiny(), share=1.0, back_weight=0.0)
    total = method.loss(step)[1]["loss"]
    assert not any(g.any() for g in gradients(total, [step.parts["teacher"].network]))
    assert all(g.any() for g in gradients(total, [step.student.network]))


def test_a_student_that_nothing_moves_gets_a_gradient_of_zero(tiny, step):
    total = kdgan(tiny(), share=0.0, kd_weight=0.0).loss(step)[1]["loss"]
    assert not any(g.any() for g in gradients(total, [step.student.network]))
    assert all(g.any() for g in gradients(total, [step.parts["teacher"].network]))


def test_generators_climb_to_the_labels_that_the_discriminator_passes(tiny, step):
    """Where one label alone passes, the adversarial term makes it likelier."""
    scores = torch.full((4, 5), -4.0, dtype=torch.float64)
    scores[:, 3] = 4.0
    judged = step.parts | {"discriminator": lambda x: scores}
    logits, terms = kdgan(tiny(), kd_weight=0.0).loss(step._replace(parts=judged))
    (slope,) = torch.autograd.grad(terms["adversarial"], logits)
    assert (slope[:, 3] < 0).all()


def test_a_discriminator_learns_against_frozen_generators(tiny, step):
    judge = step.parts["discriminator"].network
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        loss = kdgan(tiny()).loss(step)[1]["discriminator"]
        optimizer.zero_grad()
        for p, g in zip(judge.parameters(), gradients(loss, [judge]), strict=True):
            p.grad = g
        optimizer.step()
        losses.append(loss.item())
    # chance is 2·log 2: half of it for what is real, half for both samples
    assert losses[0] > 0.5
    assert losses[-1] < losses[0] - 0.05
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_a_discriminator_scores_every_label_of_images_of_any_size():
    for size, channels, classes in ((8, 1, 10), (32, 3, 100), (28, 1, 10)):
        judge = build_discriminator(channels, classes)
        assert judge(torch.zeros(2, channels, size, size)).shape == (2, classes)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in judge.modules())
    assert not isinstance(judge, Staged)  # it is no classifier to test


# --- training -------------------------------------------------------------------------------------


def loop(run):
    """Three networks, each with an optimizer of its own, as anybody would write it."""
    images, method = load_data("digits").first(run.images), run.method
    student = build_model(run.model, 10, 1, seed=mix("weights", run.seed))
    teacher = store.find_record(method.teacher).model()
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", run.seed))
        judge = build_discriminator(1, 10)
    networks = [network.train().requires_grad_(True) for network in (student, teacher, judge)]
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
    recipes = (run.recipe, method.copy, method.discriminator)
    optimizers = [
        torch.optim.SGD(n.parameters(), r.lr, r.momentum, weight_decay=r.weight_decay)
        for n, r in zip(networks, recipes, strict=True)
    ]
    student, teacher, judge = networks
    t, tau = method.temperature, method.relaxation

    def kl(of, by):
        p = (of.detach() / t).softmax(1)
        return t**2 * (p * (p.log() - (by / t).log_softmax(1))).sum(1).mean()

    def fails(z, s):
        return (1 - (z * s).sum(1).sigmoid()).log().mean()

    step, last = 0, None
    for epoch, index, view in batches(run, images):
        step = 0 if epoch != last else step + 1
        last = epoch
        # so many steps as an epoch may have, images of a batch, samples, classes
        drawn = noise(run.seed, epoch, (6, run.recipe.batch, 2, 10))[step]
        gumbel = -(-drawn.log()).log()
        for optimizer, recipe in zip(optimizers, recipes, strict=True):
            falls = sum(epoch >= milestone for milestone in recipe.milestones)
            optimizer.param_groups[0]["lr"] = recipe.lr * recipe.decay**falls
        x, labels = images.batch(index, view), images.labels[index]
        own, taught, scores = student(x), teacher(x), judge(x)
        samples = [
            ((z.log_softmax(1) + gumbel[:, k]) / tau).softmax(1)
            for k, z in enumerate((own, taught))
        ]
        values = [
            method.share * fails(samples[0], scores.detach()) + method.kd_weight * kl(taught, own),
            (1 - method.share) * fails(samples[1], scores.detach())
            + method.back_weight * kl(own, taught),
            -F.logsigmoid(scores[torch.arange(len(x)), labels]).mean()
            - method.share * fails(samples[0].detach(), scores)
            - (1 - method.share) * fails(samples[1].detach(), scores),
        ]
        for optimizer, value in zip(optimizers, values, strict=True):
            optimizer.zero_grad()
            value.backward()
        for optimizer in optimizers:
            optimizer.step()
    return {"student": student, "teacher": teacher, "discriminator": judge}


def test_training_equals_a_plain_pytorch_loop(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    run = tiny(milestones=(1,), decay=0.3, method=kdgan(teacher, **SETTINGS), seed=3)
    trained = train([run])[0]
    kept = {"student": trained.model().state_dict()}
    for name, tensor in parts_of(trained).items():
        part, _, rest = name.partition(".")
        kept.setdefault(part, {})[rest] = tensor
    for part, network in loop(run).items():
        assert kept[part].keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(
                kept[part][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{part}.{name}"
            )


def test_the_copy_starts_as_the_teacher_and_moves_while_the_teacher_stays(tiny, monkeypatch):
    teacher = tiny(epochs=2, model="resnet14-x0.25", keep=(1,))
    before, alive = train([teacher])[0], watch_teachers(monkeypatch)
    for at in (1, None):
        lane = new_trainer(tiny(method=kdgan(teacher, at=at)))
        taught = before.summary["weights"][str(at or 2)]
        assert fingerprint(lane.state.networks["teacher"].state_dict()) == taught
    alive.clear()
    trained = train([tiny(method=kdgan(teacher))])[0]
    assert {fingerprint(network.state_dict()) for network in alive} == {final_weights(before)}
    assert not any(module.training for network in alive for module in network.modules())
    assert fingerprint(before.model().state_dict()) == final_weights(before)
    assert store.find_record(teacher).summary == before.summary
    own = before.model().state_dict()
    copy = store.within(store.load_networks(trained.run, 2), "teacher.")
    assert copy.keys() == own.keys()
    assert not any(torch.equal(copy[name], own[name]) for name in own)
    assert trained.summary["teachers"] == {f"{teacher.id}@2": final_weights(before)}


def test_players_have_rates_of_their_own(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    (taught,) = train([teacher])
    for still in ("copy", "discriminator", None):
        changes = {still: replace(COPYS, lr=0.0)} if still else {}
        run = tiny(epochs=1, lr=0.05 if still else 0.0, method=kdgan(teacher, **changes))
        first = new_trainer(run).state.networks
        first = {name: p.detach().clone() for name, p in first.named_parameters()}
        trained = train([run])[0]
        after = store.load_networks(run, 1)
        moved = {
            name.partition(".")[0] for name in first if not torch.equal(first[name], after[name])
        }
        players = {"student", "teacher", "discriminator"}
        assert moved == players - {{"copy": "teacher", None: "student"}.get(still, still)}
        assert trained.summary["teachers"] == {f"{teacher.id}@1": final_weights(taught)}


def test_the_log_holds_the_terms_and_how_good_the_copy_is(tiny):
    trained = train([tiny(method=kdgan(tiny(epochs=1, model="resnet14-x0.25")))])[0]
    log = trained.log
    terms = log[[f"train_{name}" for name in PLAYERS]]
    assert log.train_loss.tolist() == pytest.approx(terms.sum(axis=1).tolist(), rel=1e-5)
    assert (log[["train_adversarial", "train_teacher_adversarial"]] < 0).all(axis=None)
    assert (log[["train_kd", "train_teacher_kd", "train_discriminator"]] > 0).all(axis=None)
    assert {"test_teacher_top1", "test_teacher_ce", "test_teacher_kl"} <= {*log.columns}
    assert "test_discriminator_top1" not in log.columns
    assert (log.test_teacher_kl > 0).all()  # it is no longer the teacher


def test_noise_differs_between_seeds_and_matters(tiny):
    """At a rate of zero nothing but the samples of an epoch changes its adversarial terms."""
    still = replace(JUDGES, lr=0.0)
    method = kdgan(tiny(epochs=1), discriminator=still, copy=still)
    run = tiny(epochs=1, lr=0.0, method=method)
    low, usual = train([replace(run, method=replace(method, relaxation=0.01)), run])
    assert low.final["train_kd"] == usual.final["train_kd"]
    assert low.final["train_adversarial"] != usual.final["train_adversarial"]
    lane = new_trainer(run)
    lane.begin_epoch()
    assert lane.noise.shape == (6, 24, 2, 10)
    assert torch.equal(lane.noise, noise(0, 0, (6, 24, 2, 10)))


def test_noise_goes_on_where_a_run_starts_from_another(tiny):
    teacher = tiny(epochs=1)
    first = tiny(epochs=1, method=kdgan(teacher))
    train([first])
    lane = new_trainer(tiny(epochs=2, method=kdgan(teacher), start=first, seed=7))
    lane.begin_epoch()
    assert torch.equal(lane.noise, noise(7, 1, (6, 24, 2, 10)))


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, assert_resumes):
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    assert_resumes(tiny(epochs=3, milestones=(1,), method=kdgan(teacher)))


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, elsewhere):
    teacher = tiny(epochs=2, model="resnet14-x0.25", keep=(1,))
    methods = [kdgan(teacher), kdgan(teacher, share=0.2), OneStage(kdgan(teacher), gap=1)]
    runs = [tiny(seed=seed, method=method) for seed, method in enumerate(methods)]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=3)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert list(map(parts_fingerprint, together)) == list(map(parts_fingerprint, alone))
    assert all(map(same_log, together, alone))


def test_later_stages_go_on_with_all_three(tiny):
    teacher = tiny(epochs=2, keep=(1,))
    stages = multi_stage(tiny(epochs=1, method=kdgan(teacher)), (1, 2))
    first, _ = train(stages)
    lane = new_trainer(replace(stages[1], recipe=replace(stages[1].recipe, epochs=2)))
    saved = store.load_networks(first.run, 1)
    for name, tensor in lane.state.networks.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_every_part_changes_the_id(tiny):
    changes = [
        {},
        {"discriminator": replace(JUDGES, lr=0.1)},
        {"copy": replace(COPYS, milestones=())},
        {"share": 0.4},
        {"kd_weight": 0.5},
        {"back_weight": 0.5},
        {"temperature": 2.0},
        {"relaxation": 0.5},
        {"at": 1},
        {"teacher": tiny(model="resnet14-x0.5")},
    ]
    runs = [tiny(method=kdgan(**{"teacher": tiny()} | change)) for change in changes]
    assert len({run.id for run in runs}) == len(runs)
