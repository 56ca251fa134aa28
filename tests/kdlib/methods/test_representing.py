"""KR: which layers go together, the penalised aggregation, its thresholds, two updates a step."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    Called,
    batches,
    called,
    final_weights,
    gradients,
    layers_by_hand,
    new_trainer,
    parts_fingerprint,
    parts_of,
    same_log,
    step_in_float64,
    watch_teachers,
)
from torch import nn
from torch.nn import functional as F

from kdlib import Recipe, build_model, load_data, store, train
from kdlib.data import Images
from kdlib.engine.plan import mix
from kdlib.methods import (
    KD,
    KDGAN,
    KR,
    NST,
    AttentionTransfer,
    CrossEntropy,
    Hint,
    OneStage,
    Step,
    multi_stage,
)
from kdlib.methods.representing import Aggregation, pair_layers
from kdlib.store import fingerprint

# Epochs and batch are the student's, whatever it says.
PRIOR = Recipe(9, 9, lr=0.02, milestones=(1,), decay=0.5, momentum=0.8, weight_decay=1e-4)
STILL = replace(PRIOR, lr=0.0)


# --- which layers go together ---------------------------------------------------------------------


def pairs_of(own, other, n, shapes="A"):
    """Groups of one stage: numbers of layers, and the shapes of the teacher's, in turn."""
    theirs = [shapes[k % len(shapes)] for k in range(other)] if len(shapes) < other else shapes
    return pair_layers([["S"], ["A"] * own], [["T"], list(theirs)], n)


@pytest.mark.parametrize(
    ("own", "other", "sizes", "students"),
    [
        (2, 8, [3, 3, 2], [0, 1, 1]),  # ResNet-26 to ResNet-8
        (4, 10, [3, 2, 3, 2], [0, 1, 2, 3]),  # ResNet-32 to ResNet-14
        (2, 2, [1, 1], [0, 1]),
        (1, 3, [3], [0]),
        (5, 2, [1, 1], [2, 4]),  # a student that is deeper than its teacher
    ],
)
def test_layers_are_grouped_as_in_the_paper(own, other, sizes, students):
    groups = pairs_of(own, other, n=3)
    assert [len(group.teacher) for group in groups] == sizes
    assert [group.student for group in groups] == students


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("own", [1, 2, 3, 4, 6, 9])
def test_groups_cover_a_stage_once_and_students_follow_in_order(own, n):
    for other in range(1, 13):
        groups = pairs_of(own, other, n)
        assert [layer for group in groups for layer in group.teacher] == list(range(other))
        sizes = [len(group.teacher) for group in groups]
        assert len(groups) == max(min(own, other), int(np.ceil(other / n)))
        assert 1 <= min(sizes) <= max(sizes) <= n
        assert max(sizes) - min(sizes) <= 1
        students = [group.student for group in groups]
        assert students == sorted(students)
        assert students[-1] == own - 1
        assert min(students) >= 0
        if own <= len(groups):
            assert set(students) == set(range(own))
        else:
            assert len(set(students)) == len(groups)
        assert {group.stage for group in groups} == {1}


@pytest.mark.parametrize("shapes", ["AB", "AAAB", "ABBBBB", "ABCDE", "AABBAA"])
@pytest.mark.parametrize("own", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_group_is_of_one_shape(shapes, own, n):
    groups = pairs_of(own, len(shapes), n, shapes)
    assert [layer for group in groups for layer in group.teacher] == list(range(len(shapes)))
    assert all(len({shapes[layer] for layer in group.teacher}) == 1 for group in groups)
    assert max(len(group.teacher) for group in groups) <= n
    students = [group.student for group in groups]
    assert students == sorted(students)
    assert students[-1] == own - 1
    assert min(students) >= 0


def test_stages_pair_by_number_as_many_as_both_have_without_the_stems():
    for ours, theirs in (([1, 2, 3], [1, 4, 5, 6, 7]), ([1, 2, 3, 4, 5], [1, 4, 5])):
        shapes = [[["A"] * count for count in counts] for counts in (ours, theirs)]
        groups = pair_layers(*shapes, n=3)
        assert [group.stage for group in groups] == sorted(group.stage for group in groups)
        assert {group.stage for group in groups} == {1, 2}
        for stage in (1, 2):
            within = [group for group in groups if group.stage == stage]
            covered = [layer for group in within for layer in group.teacher]
            assert covered == list(range(theirs[stage]))
            assert within[-1].student == ours[stage] - 1


# --- the penalised aggregation --------------------------------------------------------------------

PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "resnet14-x0.5"),
    "deeper student": ("resnet14-x0.5", "resnet8-x0.25"),
}
# Layers of the student, of the teacher, in every stage, for n = 3.
GROUPS = {
    "equal": [(0, (0, 1)), (1, (2, 3))],
    "other channels": [(0, (0, 1)), (1, (2, 3))],
    "deeper student": [(1, (0,)), (3, (1,))],
}


def aggregated(step, method, pair, thresholds):
    """Penalty and pull of all groups, written with sums over elements."""
    ours, theirs = layers_by_hand(step.student, step.x), layers_by_hand(step.teacher, step.x)
    adapters = iter(step.parts["prior"].adapters)
    thresholds, total, shares = iter(thresholds), 0, []
    for stage in (1, 2, 3):
        for student, layers in GROUPS[pair]:
            t = next(thresholds)
            adapted = next(adapters)(ours[stage][student])
            spreads = [((f - f.mean()) ** 2).sum() / (f.numel() - 1) for f in theirs[stage]]
            spreads = [spreads[layer] ** 0.5 for layer in layers]
            mean, beyond = 0, 0
            for layer, spread in zip(layers, spreads, strict=True):
                u, weight = adapted - theirs[stage][layer], spread / sum(spreads)
                far = (u**2 > t**2).double()
                total = total + weight * (method.gain / 2 * far * (u**2 - t**2)).sum() / u.numel()
                mean = mean + weight * u.detach().abs().sum() / u.numel()
                beyond += far.mean() / len(layers)
            shares.append(beyond)
            if method.threshold == "learned":
                total = total + method.pull * (t - mean) ** 2
    return total, sum(shares) / len(shares)


@pytest.mark.parametrize("gain", [1.0, 2.5])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_prior_and_its_gradient_equal_those_computed_by_hand(tiny, pair, gain):
    method = KR(tiny(), prior=PRIOR, gain=gain, pull=0.3, beta=0.7)
    step = step_in_float64(method, *PAIRS[pair])
    prior = step.parts["prior"]
    assert len(prior.adapters) == 6
    start = torch.rand(6, dtype=torch.float64, generator=torch.manual_seed(3))
    prior.thresholds.data.copy_(start)
    terms = method.turn("prior", called(step))
    t = start.clone().requires_grad_()
    expected, share = aggregated(step, method, pair, t)
    torch.testing.assert_close(terms["prior"], 0.7 * expected, rtol=1e-10, atol=0)
    assert terms["beyond"].item() == pytest.approx(share.item(), abs=1e-6)
    assert 0.02 < share < 0.98
    modules = [step.student, prior.adapters]
    for got, by_hand in zip(
        gradients(terms["prior"], modules), gradients(0.7 * expected, modules), strict=True
    ):
        torch.testing.assert_close(got, by_hand, rtol=1e-8, atol=1e-11)
    (ours,) = torch.autograd.grad(terms["prior"], prior.thresholds)
    (theirs,) = torch.autograd.grad(0.7 * expected, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)


def test_a_fixed_threshold_is_not_pulled(tiny):
    method = KR(tiny(), prior=PRIOR, threshold="fixed", pull=9.0)
    step = step_in_float64(method, *PAIRS["equal"])
    start = torch.rand(6, dtype=torch.float64, generator=torch.manual_seed(3))
    step.parts["prior"].thresholds.copy_(start)
    expected, _ = aggregated(step, method, "equal", start)
    torch.testing.assert_close(method.turn("prior", called(step))["prior"], expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_reach_student_and_adapters_but_neither_head_nor_teacher(tiny, pair):
    method = KR(tiny(), prior=PRIOR)
    step = step_in_float64(method, *PAIRS[pair])
    step.teacher.requires_grad_(True)
    method.turn("prior", called(step))["prior"].backward()
    assert all(p.grad is None for p in step.teacher.parameters())
    assert all(p.grad is None for p in step.student.head.parameters())
    assert all(p.grad.any() for p in step.student.body.parameters())
    prior = step.parts["prior"]
    assert all(p.grad.any() for p in prior.parameters())
    assert any(True for _ in prior.adapters.parameters()) == (pair != "equal")


def test_kr_dense_is_half_the_squared_error(tiny):
    method = KR(tiny(), prior=PRIOR, threshold="none", gain=1.0)
    step = step_in_float64(method, *PAIRS["equal"])
    ours, theirs = layers_by_hand(step.student, step.x), layers_by_hand(step.teacher, step.x)
    expected = 0
    for stage in (1, 2, 3):
        for student, layers in GROUPS["equal"]:
            spreads = torch.stack([theirs[stage][layer].std() for layer in layers])
            for layer, weight in zip(layers, spreads / spreads.sum(), strict=True):
                error = F.mse_loss(ours[stage][student], theirs[stage][layer])
                expected = expected + weight * error / 2
    terms = method.turn("prior", called(step))
    torch.testing.assert_close(terms["prior"], expected, rtol=1e-11, atol=0)
    assert [*step.parts["prior"].parameters()] == [*step.parts["prior"].buffers()] == []
    # behind a ReLU some are exactly as the teacher's: zero on both sides
    assert 0.5 < terms["beyond"] <= 1


def test_adapters_stand_only_where_shapes_differ(tiny):
    for pair, (student, teacher) in PAIRS.items():
        step = step_in_float64(KR(tiny(), prior=PRIOR), student, teacher)
        kinds = {type(adapter) for adapter in step.parts["prior"].adapters}
        assert kinds == {nn.Identity if pair == "equal" else nn.Sequential}


@pytest.mark.parametrize(
    ("threshold", "parameters", "buffers"),
    [("learned", 1, 0), ("fixed", 0, 1), ("none", 0, 0)],
)
def test_a_threshold_is_learned_or_fixed_or_not_there(tiny, threshold, parameters, buffers):
    step = step_in_float64(KR(tiny(), prior=PRIOR, threshold=threshold), *PAIRS["equal"])
    prior = step.parts["prior"]
    assert (len([*prior.parameters()]), len([*prior.buffers()])) == (parameters, buffers)


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
def test_all_networks_of_the_book_go_together(tiny, student, offset):
    """A step each: finite, with gradients to student and adapters, none to the teacher."""
    teacher = MODELS[(MODELS.index(student) + offset) % len(MODELS)]
    method = KR(tiny(model=teacher), prior=PRIOR, gamma=0.1)
    method.check(tiny(model=student))
    networks = [build_model(name, 5, 1, seed=k) for k, name in enumerate((student, teacher))]
    x, labels = torch.randn(4, 1, 16, 16, generator=torch.manual_seed(0)), torch.arange(4)
    with torch.no_grad():
        for _ in range(20):
            networks[1].train()(x)  # statistics that a trained teacher has
        parts = method.parts(networks[0].eval(), networks[1].eval(), x)
    networks[0].train()
    parts = {name: Called(part) for name, part in parts.items()}
    step = Step(x, labels, None, *map(Called, networks), parts, {})
    prior = method.turn("prior", step)["prior"]
    prior.backward()
    aggregation = parts["prior"].network
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
    """Of one stage of a network with four layers, after the stem's."""
    generator = torch.manual_seed(seed)
    layers = [scale * k * torch.randn(8, 3, 4, 4, generator=generator).relu() for k in range(1, 5)]
    return [[torch.zeros(8, 3, 4, 4)], layers]


def settings(tiny, **changes):
    return KR(tiny(), prior=PRIOR, **changes)


def residuals_by_hand(ours, theirs, layers):
    """|u| of a group and its weighted mean."""
    spreads = np.array([np.std(theirs[k].numpy(), ddof=1) for k in layers])
    sizes = [np.abs(ours.numpy() - theirs[k].numpy()) for k in layers]
    means = np.array([size.mean(dtype=np.float64) for size in sizes])
    return sizes, (spreads / spreads.sum() * means).sum()


@pytest.mark.parametrize("threshold", ["learned", "fixed"])
def test_thresholds_start_at_the_weighted_mean_of_the_first_batch(tiny, threshold):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, settings(tiny, threshold=threshold))
    assert prior.thresholds.isnan().all()
    prior(ours, theirs)
    # four layers of the student, and as many groups of one layer each
    means = [residuals_by_hand(ours[1][k], theirs[1], [k])[1] for k in range(4)]
    assert prior.thresholds.tolist() == pytest.approx(means, rel=1e-5)
    started = prior.thresholds.clone()
    prior(features(2, scale=5.0), theirs)  # later batches do not set them
    assert torch.equal(prior.thresholds, started)


def test_a_group_of_several_starts_at_their_mean_by_weight(tiny):
    ours, theirs = features(0), features(1)
    ours[1] = ours[1][-1:]
    prior = Aggregation(ours, theirs, settings(tiny, n=3))
    prior(ours, theirs)
    means = [residuals_by_hand(ours[1][0], theirs[1], layers)[1] for layers in ([0, 1], [2, 3])]
    assert prior.thresholds.tolist() == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [0.05, 1.0])
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_learned_threshold_moves_and_stays_within_the_residuals(tiny, gain, lr, momentum):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, settings(tiny, gain=gain))
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


def test_a_threshold_below_zero_counts_as_zero_and_comes_back(tiny):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, settings(tiny))
    prior.thresholds.data.fill_(-0.5)
    total, beyond = prior(ours, theirs)
    total.backward()
    assert (prior.thresholds.grad < 0).all()  # descent raises it
    dense = Aggregation(ours, theirs, settings(tiny, threshold="none"))
    means = [residuals_by_hand(ours[1][k], theirs[1], [k])[1] for k in range(4)]
    pulled = sum((mean + 0.5) ** 2 for mean in means)
    assert (total - dense(ours, theirs)[0]).item() == pytest.approx(pulled, rel=1e-5)
    assert beyond == dense(ours, theirs)[1]


def test_without_pull_a_threshold_never_falls(tiny):
    ours, theirs = features(0), features(1)
    prior = Aggregation(ours, theirs, settings(tiny, pull=0.0))
    prior(ours, theirs)[0].backward()
    assert (prior.thresholds.grad < 0).all()


def thresholds(lane):
    return lane.state.networks["prior"].thresholds.detach().clone()


def test_a_lane_starts_its_thresholds_at_its_first_batch(tiny):
    """The student's and the adapters' statistics are those of this batch."""
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    train([teacher])
    run = tiny(method=KR(teacher, prior=STILL))
    lane = new_trainer(run)
    assert thresholds(lane).isnan().all()
    networks = lane.state.networks
    student, adapters = networks["student"].train(), networks["prior"].adapters.train()
    images = load_data("digits").first(128)
    _, index, view = next(batches(run, images))
    x = images.batch(index, view)
    with torch.no_grad():
        ours = layers_by_hand(student, x)
        theirs = layers_by_hand(store.find_record(teacher).model(), x)
        adapters, means = iter(adapters), []
        for stage in (1, 2, 3):
            for own, layers in GROUPS["other channels"]:
                adapted = next(adapters)(ours[stage][own])
                means.append(residuals_by_hand(adapted, theirs[stage], list(layers))[1])
    lane.begin_epoch()
    lane.advance()
    assert thresholds(lane).tolist() == pytest.approx(means, rel=1e-4)  # at a rate of zero


def test_thresholds_are_learned_or_stay_to_the_bit(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    train([teacher])
    for threshold in ("learned", "fixed"):
        lane = new_trainer(tiny(method=KR(teacher, prior=PRIOR, threshold=threshold)))
        lane.begin_epoch()
        lane.advance()
        first = thresholds(lane)
        assert first.isfinite().all()
        while lane.taken < lane.steps:
            lane.advance()
        moved = thresholds(lane) != first
        assert moved.all() if threshold == "learned" else not moved.any()


@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_thresholds_of_a_student_in_training_stay_finite(tiny, lr):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    prior = replace(PRIOR, lr=lr, milestones=(), momentum=0.9)
    trained = train([tiny(epochs=7, method=KR(teacher, prior=prior))])[0]
    log = trained.log
    assert (log.threshold > 0).all()
    assert log.threshold.nunique() == 7
    assert log.train_beyond.between(0.01, 0.99).all()
    assert trained.final["threshold"] == pytest.approx(
        parts_of(trained)["prior.thresholds"].mean().item(), rel=1e-6
    )


def test_what_has_no_threshold_logs_none(tiny):
    trained = train([tiny(epochs=1, method=KR(tiny(epochs=1), prior=PRIOR, threshold="none"))])[0]
    assert "threshold" not in trained.log
    assert parts_of(trained) == {}


# --- training -------------------------------------------------------------------------------------


class ByHand:
    """Student, adapters and thresholds with two optimizers, as anybody would write it."""

    def __init__(self, run):
        self.run, self.method, self.pair = run, run.method, "other channels"
        self.student = build_model(run.model, 10, 1, seed=mix("weights", run.seed)).train()
        self.student = self.student.to(memory_format=torch.channels_last)
        self.teacher = store.find_record(run.method.teacher).model()
        widths = [(4, 8), (8, 16), (16, 32)]
        with torch.random.fork_rng():
            torch.manual_seed(mix("parts", run.seed))
            self.adapters = nn.ModuleList(
                nn.Sequential(nn.Conv2d(*pair, 1, bias=False), nn.BatchNorm2d(pair[1]))
                for pair in widths
                for _ in range(2)
            ).train()
        self.thresholds = nn.Parameter(torch.full((6,), -1.0))
        learned = [self.thresholds] if run.method.threshold == "learned" else []
        self.prior = self.optimizer(run.method.prior, [*self.adapters.parameters(), *learned])
        self.posterior = self.optimizer(run.recipe, [])

    def optimizer(self, recipe, parameters):
        return torch.optim.SGD(
            [*self.student.parameters(), *parameters],
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )

    def penalty(self, x, first):
        ours, theirs = layers_by_hand(self.student, x), layers_by_hand(self.teacher, x)
        total, k, gain = 0, 0, self.method.gain
        for stage in (1, 2, 3):
            for own, layers in GROUPS[self.pair]:
                adapted = self.adapters[k](ours[stage][own])
                spreads = torch.stack([theirs[stage][layer].std() for layer in layers])
                weights = spreads / spreads.sum()
                us = adapted - torch.stack([theirs[stage][layer] for layer in layers])
                mean = weights.dot(us.detach().abs().mean((1, 2, 3, 4)))
                if first:
                    self.thresholds.data[k] = mean
                t = self.thresholds[k] if self.method.threshold != "none" else 0.0
                far = (us.abs() > t).float()
                penalties = (gain / 2 * (us**2 - t**2) * far).mean((1, 2, 3, 4))
                total = total + weights.dot(penalties)
                if self.method.threshold == "learned":
                    total = total + self.method.pull * (t - mean) ** 2
                k += 1
        return total

    def train(self, loss):
        images = load_data("digits").first(self.run.images)
        for step, (epoch, index, view) in enumerate(batches(self.run, images)):
            for optimizer, recipe in (
                (self.prior, self.method.prior),
                (self.posterior, self.run.recipe),
            ):
                falls = sum(epoch >= milestone for milestone in recipe.milestones)
                optimizer.param_groups[0]["lr"] = recipe.lr * recipe.decay**falls
            x, labels = images.batch(index, view), images.labels[index]
            self.prior.zero_grad()
            (self.method.beta * self.penalty(x, first=step == 0)).backward()
            self.prior.step()
            self.prior.zero_grad()
            value = loss(self.student(x), x, labels)
            if self.method.gamma:
                value = value + self.method.gamma * self.penalty(x, first=False)
            value.backward()
            self.posterior.step()
            self.prior.zero_grad()


@pytest.fixture
def in_float64(monkeypatch):
    """All of training. In float32 a last bit moves residuals over thresholds, and then more."""
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
def test_training_equals_a_plain_pytorch_loop(tiny, in_float64, posterior, threshold, gamma):
    """Two epochs; the bank alone keeps its labels in float32."""
    close = {"rtol": 1e-6, "atol": 1e-7} if posterior == "KD" else {"rtol": 1e-9, "atol": 1e-11}
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    inner = KD(teacher, kd_weight=0.6, temperature=3.0) if posterior == "KD" else CrossEntropy()
    settings = {"beta": 0.8, "gain": 1.5, "pull": 0.4, "gamma": gamma, "threshold": threshold}
    method = KR(teacher, prior=PRIOR, posterior=inner, **settings)
    run = tiny(milestones=(1,), decay=0.3, weight_decay=1e-3, method=method, seed=4)
    trained, expected = train([run])[0], ByHand(run)

    def loss(logits, x, labels):
        ce = F.cross_entropy(logits, labels)
        if posterior == "CrossEntropy":
            return ce
        p = (expected.teacher(x) / 3).softmax(1)
        return ce + 0.6 * 9 * (p * (p.log() - (logits / 3).log_softmax(1))).sum(1).mean()

    expected.train(loss)
    got, kept = trained.model().state_dict(), parts_of(trained)
    for name, tensor in expected.student.state_dict().items():
        torch.testing.assert_close(got[name], tensor, **close, msg=name)
    if threshold != "none":
        torch.testing.assert_close(kept.pop("prior.thresholds"), expected.thresholds.data, **close)
    adapters = {
        name: tensor
        for name, tensor in expected.adapters.state_dict().items()
        if "num_batches" not in name
    }
    for name, tensor in adapters.items():
        ours = kept[f"prior.adapters.{name}"]
        torch.testing.assert_close(ours, tensor, **close, msg=name)
    assert len(kept) == len(adapters)


def parameters_of(network):
    return {name: p.detach() for name, p in network.named_parameters()}


POSTERIORS = {
    "CrossEntropy": lambda teacher: CrossEntropy(),
    "KD": KD,
    "NST": lambda teacher: NST(teacher, nst_weight=5.0),
    "Hint": lambda teacher: Hint(teacher, stage=1),
    "AT": AttentionTransfer,
    "KDGAN": lambda teacher: KDGAN(teacher, discriminator=PRIOR, copy=PRIOR),
}
every_posterior = pytest.mark.parametrize("name", POSTERIORS)


@every_posterior
def test_at_a_rate_of_zero_the_prior_moves_batch_statistics_alone(tiny, name):
    """What remains is the posterior, as if it were the method."""
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    posterior = POSTERIORS[name](teacher)
    runs = [tiny(method=KR(teacher, prior=STILL, posterior=posterior)), tiny(method=posterior)]
    beside, alone = train(runs)
    for key, tensor in parameters_of(alone.model()).items():
        ours = beside.model().get_parameter(key)
        torch.testing.assert_close(ours, tensor, rtol=1e-5, atol=1e-6, msg=key)
    statistics = [dict(trained.model().named_buffers()) for trained in (beside, alone)]
    assert not any(torch.equal(statistics[0][key], statistics[1][key]) for key in statistics[0])
    for column in alone.log.columns.drop("seconds"):
        if column.startswith("train_"):
            assert beside.log[column].tolist() == pytest.approx(
                alone.log[column].tolist(), rel=1e-4
            )
    assert {"train_prior", "train_beyond", "threshold"} <= {*beside.log.columns}
    assert (beside.log.train_prior > 0).all()


def test_the_prior_moves_all_of_a_student_but_its_head(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    run = tiny(lr=0.0, method=KR(teacher, prior=PRIOR))
    first = parameters_of(build_model(run.model, 10, 1, seed=mix("weights", run.seed)))
    (trained,) = train([run])
    after = parameters_of(trained.model())
    still = {name for name in first if torch.equal(first[name], after[name])}
    assert still == {"head.2.weight", "head.2.bias"}


def test_the_two_optimizers_have_a_momentum_each(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    train([teacher])
    lane = new_trainer(tiny(method=KR(teacher, prior=PRIOR)))
    lane.begin_epoch()
    lane.advance()
    tensors = lane.state.tensors()
    for name in parameters_of(lane.state.networks["student"]):
        own = tensors[f"momentum.student.student.{name}"]
        prior = tensors.get(f"momentum.prior.student.{name}")
        assert own.any()
        assert prior is None if name.startswith("head.") else not torch.equal(prior, own)
    assert "momentum.prior.prior.thresholds" in tensors
    assert not any(name.startswith("momentum.student.prior.") for name in tensors)


def test_the_log_holds_the_terms_of_both_updates(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    one, half, both = train(
        [
            tiny(epochs=1, method=KR(teacher, prior=STILL, **changes), lr=0.0)
            for changes in ({}, {"beta": 0.5}, {"gamma": 2.0})
        ]
    )
    assert half.final["train_prior"] == pytest.approx(one.final["train_prior"] / 2, rel=1e-5)
    assert one.final["train_loss"] == one.final["train_ce"] == half.final["train_loss"]
    assert 0 < one.final["train_beyond"] < 1
    # at a rate of zero both see the same penalty, in training mode
    expected = both.final["train_ce"] + 2 * both.final["train_prior"]
    assert both.final["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_posterior_of_logits_reads_the_teachers(tiny, monkeypatch):
    teacher = tiny(epochs=2, model="resnet14-x0.25", keep=(1,))
    train([teacher])
    models = [store.find_record(teacher).model(epoch) for epoch in (1, 2)]
    seen, loss = [], KD.loss

    def note(method, step):
        seen.append((step.x, step.targets, step.labels))
        return loss(method, step)

    monkeypatch.setattr(KD, "loss", note)
    for method, taught in (
        (KR(teacher, prior=PRIOR, posterior=KD(teacher)), (2, 2)),
        (KR(teacher, at=1, prior=PRIOR, posterior=KD(teacher)), (1, 1)),
        (OneStage(KR(teacher, prior=PRIOR, posterior=KD(teacher)), gap=1), (1, 2)),
    ):
        seen.clear()
        trained = train([tiny(method=method)])[0]
        names = {f"{teacher.id}@{epoch}" for epoch in taught}
        assert trained.summary["teachers"].keys() == names
        assert len(seen) == 10  # of 128 images twice, in batches of 24
        for (x, targets, _), epoch in zip(seen, [taught[0]] * 5 + [taught[1]] * 5, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(targets, models[epoch - 1](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("posterior", "labelled"), [("CrossEntropy", False), ("KD", True)])
def test_labels_are_computed_only_for_who_reads_them(tiny, swept, posterior, labelled):
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    train([teacher])
    run = tiny(method=KR(teacher, prior=PRIOR, posterior=POSTERIORS[posterior](teacher)))
    assert run.method.labelled == labelled
    train([run])
    assert any(split == "train" for _, split, *_ in swept) == labelled


def test_every_anchor_of_a_route_is_the_posteriors_too(tiny):
    teacher = tiny(epochs=3, model="resnet14-x0.25", keep=(1, 2))
    method = KR(teacher, prior=PRIOR, posterior=KD(teacher))
    stages = multi_stage(tiny(epochs=1, method=method), (1, 3))
    assert [stage.method.at for stage in stages] == [1, None]
    assert [stage.method.posterior.at for stage in stages] == [1, None]
    first, second = train(stages)
    assert first.summary["teachers"].keys() == {f"{teacher.id}@1"}
    assert second.summary["teachers"].keys() == {f"{first.run.id}@1", f"{teacher.id}@3"}
    lane = new_trainer(replace(stages[1], recipe=replace(stages[1].recipe, epochs=2)))
    started = store.load_networks(first.run, 1)
    for name, tensor in lane.state.networks.state_dict().items():
        assert torch.equal(tensor, started[name]), name  # adapters and thresholds go on
    assert lane.state.networks["prior"].thresholds.isfinite().all()


def test_one_anchor_for_all_epochs_is_plain_kr_to_the_bit(tiny):
    teacher = tiny(epochs=2, model="resnet14-x0.5")
    method = KR(teacher, prior=PRIOR, posterior=KD(teacher))
    plain, one = train([tiny(method=method), tiny(method=OneStage(method, gap=2))])
    assert final_weights(one) == final_weights(plain)
    assert parts_fingerprint(one) == parts_fingerprint(plain)
    assert same_log(one, plain)


@every_posterior
def test_teachers_are_bit_identical_after_their_students_trained(tiny, monkeypatch, name):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    before, alive = train([teacher])[0], watch_teachers(monkeypatch)
    train([tiny(method=KR(teacher, prior=PRIOR, posterior=POSTERIORS[name](teacher)))])
    assert {fingerprint(network.state_dict()) for network in alive} == {final_weights(before)}
    assert not any(module.training for network in alive for module in network.modules())
    assert fingerprint(before.model().state_dict()) == final_weights(before)
    assert store.find_record(teacher).summary == before.summary


RESUMED = {
    "KR": lambda teacher: KR(teacher, prior=PRIOR),
    "KR + KD": lambda teacher: KR(teacher, prior=PRIOR, posterior=KD(teacher), gamma=0.1),
    "KR + KDGAN": lambda teacher: KR(
        teacher, prior=PRIOR, posterior=POSTERIORS["KDGAN"](teacher), threshold="fixed"
    ),
    "route": lambda teacher: OneStage(KR(teacher, prior=PRIOR, posterior=KD(teacher)), gap=1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, assert_resumes, name):
    teacher = tiny(epochs=2, model="resnet14-x0.5", keep=(1,))
    assert_resumes(tiny(epochs=3, milestones=(1,), method=RESUMED[name](teacher)))


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, elsewhere):
    teacher = tiny(epochs=2, model="resnet14-x0.5", keep=(1,))
    runs = [tiny(seed=seed, method=make(teacher)) for seed, make in enumerate(RESUMED.values())]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=4)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert list(map(parts_fingerprint, together)) == list(map(parts_fingerprint, alone))
    assert all(map(same_log, together, alone))


def test_a_student_has_nothing_of_the_prior(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    trained, plain = train([tiny(epochs=1, method=KR(teacher, prior=PRIOR)), tiny(epochs=1)])
    assert trained.model().state_dict().keys() == plain.model().state_dict().keys()
    assert {name.partition(".")[0] for name in parts_of(trained)} == {"prior"}


def test_state_saved_before_there_were_turns_is_left_alone(tiny, train_until, epochs_trained):
    """Its momentum had no optimizer's name: the run starts anew, and says so."""
    teacher = tiny(epochs=1, model="resnet14-x0.5")
    run = tiny(epochs=3, method=KR(teacher, prior=PRIOR))
    train_until(run, 1)
    path = store.folder(run) / "state.safetensors"
    tensors, about = store.load_tensors(path)
    old = {name.replace("momentum.student.", "momentum."): t for name, t in tensors.items()}
    store.save_tensors(path, old, about)
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="starts anew"):
        train([run])
    assert epochs_trained[0] == (run.id, 1)


# --- what is refused, and ids ---------------------------------------------------------------------


def test_a_posterior_of_another_teacher_is_refused(tiny):
    teacher, other = tiny(model="resnet14-x0.25"), tiny(model="resnet14-x0.5")
    for name in ("KD", "NST", "KDGAN", "Hint"):
        with pytest.raises(ValueError, match="one teacher's") as refusal:
            KR(teacher, prior=PRIOR, posterior=POSTERIORS[name](other))
        assert str(other) in str(refusal.value)


def test_a_posterior_that_does_not_fit_is_refused_at_once(tiny):
    teacher = tiny(model="resnet14-x0.25")
    with pytest.raises(ValueError, match="no stage 7"):
        tiny(method=KR(teacher, prior=PRIOR, posterior=Hint(teacher, stage=7)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": "soft"}, "no threshold 'soft'.*learned"),
        ({"n": 0}, "one layer at least"),
        ({"beta": -0.1}, "below 0"),
        ({"gamma": -0.1}, "below 0"),
        ({"gain": -1.0}, "below 0"),
        ({"pull": -1.0}, "below 0"),
        ({"at": 9}, "no epoch 9"),
    ],
)
def test_what_is_out_of_range_is_refused(tiny, change, says):
    with pytest.raises(ValueError, match=says):
        KR(tiny(), prior=PRIOR, **change)


def test_every_part_changes_the_id(tiny):
    teacher = tiny(model="resnet14-x0.25")
    changes = [
        {},
        {"prior": replace(PRIOR, lr=0.1)},
        {"prior": replace(PRIOR, milestones=())},
        {"posterior": KD(teacher)},
        {"posterior": KD(teacher, kd_weight=0.5)},
        {"posterior": NST(teacher)},
        {"n": 4},
        {"beta": 0.5},
        {"gamma": 0.5},
        {"gain": 1.0},
        {"threshold": "fixed"},
        {"threshold": "none"},
        {"pull": 0.1},
        {"at": 1},
        {"teacher": tiny(model="resnet14-x0.5")},
    ]
    plain = {"teacher": teacher, "prior": PRIOR}
    runs = [tiny(method=KR(**plain | change)) for change in changes]
    assert len({run.id for run in runs}) == len(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny(method=KR(teacher, prior=PRIOR, at=2)).id == runs[0].id  # the last epoch
