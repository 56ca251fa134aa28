"""Penalties on weights and gradients, the curve of a training, and what penalties leave behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    batches,
    called,
    final_weights,
    new_trainer,
    parts_fingerprint,
    parts_of,
    same_log,
    step_in_float64,
)
from torch.nn import functional as F

from kdlib import KD, build_model, load_data, sparsity, store, train
from kdlib.engine import state
from kdlib.engine.plan import mix
from kdlib.methods import Penalised
from kdlib.methods.penalties import PENALTIES, Curve, Recode

every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def matrices(network):
    """Weights of convolutions and linear layers."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return [module.weight for module in network.modules() if isinstance(module, kinds)]


# --- a recoded gradient ---------------------------------------------------------------------------

WEIGHT = torch.zeros(5)
# |g| is 2 in the mean
GRADIENT = torch.tensor([-4.0, -2.0, 0.0, 1.0, 3.0])


def recoded(threshold, gain=2.0, pull=1.0):
    """The gradients of weight and threshold, and the threshold then."""
    weight, threshold = WEIGHT.clone().requires_grad_(), torch.tensor(threshold).requires_grad_()
    Recode.apply(weight, threshold, gain, pull).backward(GRADIENT)
    return weight.grad.tolist(), threshold.grad.item(), threshold.item()


def test_a_gradient_is_enhanced_beyond_its_threshold_and_none_within():
    assert recoded(1.5)[0] == [-8.0, -4.0, 0.0, 0.0, 6.0]
    assert recoded(1.5, gain=3.0)[0] == [-12.0, -6.0, 0.0, 0.0, 9.0]
    assert recoded(0.0)[0] == [-8.0, -4.0, 0.0, 2.0, 6.0]
    assert recoded(0.0, gain=1.0)[0] == GRADIENT.tolist()
    assert recoded(100.0)[0] == [0.0] * 5


def test_exactly_at_its_threshold_a_gradient_is_none():
    assert recoded(2.0)[0] == [-8.0, 0.0, 0.0, 0.0, 6.0]
    assert recoded(3.0)[0] == [-8.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("threshold", "share"), [(0.5, 0.8), (1.5, 0.6), (2.0, 0.4), (9.0, 0.0)])
def test_a_threshold_descends_penalty_and_pull(threshold, share):
    """-a·t·share + 2·pull·(t - 2)."""
    for gain, pull in ((2.0, 1.0), (3.0, 0.25), (2.0, 0.0)):
        expected = -gain * threshold * share + 2 * pull * (threshold - 2)
        assert recoded(threshold, gain, pull)[1] == pytest.approx(expected, rel=1e-6)


def test_the_slope_of_a_threshold_is_that_of_its_penalty():
    """By finite differences of mean ρ(g) + pull·(t - mean|g|)²."""
    g = GRADIENT.double().numpy()

    def value(t):
        rho = np.where(np.abs(g) > t, 3.0 / 2 * (g**2 - t**2), 0)
        return rho.mean() + 0.7 * (t - np.abs(g).mean()) ** 2

    slope = (value(1.3 + 1e-6) - value(1.3 - 1e-6)) / 2e-6
    assert recoded(1.3, gain=3.0, pull=0.7)[1] == pytest.approx(slope, rel=1e-6)


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
    """Of a LeNet, in which a tenth of the weights is exactly 0."""

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
def test_sparse_recoding_changes_gradients_alone(step, model):
    method = Penalised(penalty="sparse", gain=3.0, pull=0.5)
    step = step(method, model)
    student, values = step.student.network, step.parts["thresholds"].network.values
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


def test_with_thresholds_above_all_gradients_only_biases_and_norms_learn(step):
    method = Penalised(penalty="sparse")
    step = step(method, "vgg13-x0.03")
    step.parts["thresholds"].network.values.data.fill_(1e6)
    method.loss(step)[1]["loss"].backward()
    student = step.student.network
    ids = {id(w) for w in matrices(student)}
    assert len(ids) == len(step.parts["thresholds"].network.values)
    for name, p in student.named_parameters():
        assert p.grad.any() == (id(p) not in ids) or "bias" in name, name
    assert student.get_parameter("stem.1.bias").grad.any()


def test_with_infinite_thresholds_only_biases_learn(step):
    step = step(Penalised(penalty="sparse"))
    step.parts["thresholds"].network.values.data.fill_(torch.inf)
    Penalised(penalty="sparse").loss(step)[1]["loss"].backward()
    for name, p in step.student.network.named_parameters():
        assert p.grad.any() == ("bias" in name), name


def test_with_thresholds_above_all_gradients_weights_stay_to_the_bit(tiny):
    method = Penalised(penalty="sparse", pull=0.0)
    lane = new_trainer(tiny(model="lenet", weight_decay=0.0, method=method))
    lane.state.networks["thresholds"].values.data.fill_(1e6)
    student = lane.state.networks["student"]
    first = {name: p.detach().clone() for name, p in student.named_parameters()}
    lane.begin_epoch()
    while lane.taken < lane.steps:
        lane.advance()
    for name, p in student.named_parameters():
        assert torch.equal(p, first[name]) == ("weight" in name), name


# --- the curve ------------------------------------------------------------------------------------


def test_a_curve_sums_into_bins_and_drops_what_is_over():
    curve = Curve(bins=3, every=4)
    values = torch.rand(17, generator=torch.manual_seed(0))
    for value in values:
        curve.add(value)
    expected = [values[k : k + 4].sum().item() for k in (0, 4, 8)]
    assert curve.sums[:3].tolist() == pytest.approx(expected, rel=1e-6)
    assert curve.steps.item() == 17
    assert not any(True for _ in curve.parameters())


# --- training -------------------------------------------------------------------------------------


def per_step(run):
    """The student after a plain loop, the thresholds, and the label term of every step."""
    images, method = load_data("digits").first(run.images), run.method
    model = build_model(run.model, 10, 1, seed=mix("weights", run.seed)).train()
    model = model.to(memory_format=torch.channels_last)
    weights = matrices(model)
    sparse = method.penalty == "sparse"
    thresholds = [torch.nn.Parameter(torch.zeros(())) for _ in weights if sparse]
    optimizer = torch.optim.SGD(
        [*model.parameters(), *thresholds],
        lr=run.recipe.lr,
        momentum=run.recipe.momentum,
        weight_decay=run.recipe.weight_decay,
    )
    losses = []
    for step, (epoch, index, view) in enumerate(batches(run, images)):
        falls = sum(epoch >= milestone for milestone in run.recipe.milestones)
        optimizer.param_groups[0]["lr"] = run.recipe.lr * run.recipe.decay**falls
        optimizer.zero_grad()
        ce = F.cross_entropy(model(images.batch(index, view)), images.labels[index])
        loss = ce
        if method.penalty == "l1":
            loss = loss + method.weight * sum(w.abs().sum() for w in weights)
        if method.penalty == "l2":
            loss = loss + method.weight * sum((w**2).sum() for w in weights) / 2
        loss.backward()
        for w, t in zip(weights, thresholds, strict=False):
            size = w.grad.abs()
            if step == 0:
                t.data = size.mean()
            t.data.clamp_(min=0)
            far = size > t
            pull, share = 2 * method.pull * (t.data - size.mean()), far.float().mean()
            t.grad = pull - method.gain * t.data * share
            w.grad = torch.where(far, method.gain * w.grad, 0)
        optimizer.step()
        losses.append(ce.item())
    return model, [t.item() for t in thresholds], losses


@every_penalty
@pytest.mark.parametrize("model", ["lenet", "resnet8-x0.25"])
def test_training_equals_a_plain_pytorch_loop(tiny, model, penalty):
    """Few steps: a gradient that its last bit moves over a threshold changes a weight by more."""
    method = Penalised(penalty=penalty, weight=0.003, gain=1.5, pull=0.7, bins=9, every=1)
    run = tiny(model=model, batch=60, milestones=(1,), method=method, seed=2, lr=0.02)
    trained = train([run])[0]
    expected, thresholds, losses = per_step(run)
    got = trained.model().state_dict()
    atol = 2e-5 if penalty == "sparse" else 1e-6
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=atol, msg=name)
    kept = parts_of(trained)
    if penalty == "sparse":
        assert kept["thresholds.values"].tolist() == pytest.approx(thresholds, rel=1e-4)
    assert ("thresholds.values" in kept) == (penalty == "sparse")
    assert len(losses) == 4
    assert kept["curve.steps"].item() == 4
    assert kept["curve.sums"][:4].tolist() == pytest.approx(losses, rel=1e-4)
    assert not kept["curve.sums"][4:].any()


def test_no_penalty_is_training_by_labels_alone(tiny):
    penalised, plain = train([tiny(method=Penalised()), tiny()])
    assert final_weights(penalised) != ""
    ours, theirs = penalised.model().state_dict(), plain.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert same_log(penalised, plain)


def test_the_log_holds_the_penalty(tiny):
    none, l1, sparse = train(
        [tiny(method=Penalised(penalty=p, weight=0.01)) for p in ("none", "l1", "sparse")]
    )
    for trained in (none, sparse):
        assert "train_penalty" not in trained.log
        assert trained.log.train_loss.tolist() == trained.log.train_ce.tolist()
    total = l1.log.train_ce + l1.log.train_penalty
    assert l1.log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


@every_penalty
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, assert_resumes, penalty):
    method = Penalised(penalty=penalty, bins=4, every=3)
    assert_resumes(tiny(epochs=3, model="lenet", milestones=(1,), method=method))


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, elsewhere):
    runs = [
        tiny(model="lenet", seed=k, method=Penalised(penalty=p)) for k, p in enumerate(PENALTIES)
    ]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=4)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert list(map(parts_fingerprint, together)) == list(map(parts_fingerprint, alone))
    assert all(map(same_log, together, alone))


def test_thresholds_stay_finite_and_at_zero_or_above(tiny):
    lane = new_trainer(tiny(epochs=9, model="lenet", lr=0.3, method=Penalised(penalty="sparse")))
    seen = []
    for _ in range(9):
        lane.begin_epoch()
        while lane.taken < lane.steps:
            lane.advance()
            seen.append(lane.state.networks["thresholds"].values.detach().clone())
        lane.end_epoch()
    seen = torch.stack(seen)
    assert seen.isfinite().all()
    assert (seen[1:] != seen[:-1]).any(0).all()


def test_gradients_are_recoded_in_full_precision_where_others_are_halved(tiny, monkeypatch):
    """Half precision scales its losses, and thresholds are of gradients as they are."""
    monkeypatch.setattr(state, "training_dtype", lambda device: torch.float16)
    lane = new_trainer(tiny(model="lenet", method=Penalised(penalty="sparse")))
    assert lane.state.dtype == torch.float32
    assert not lane.state.scaler.is_enabled()
    assert new_trainer(tiny(model="lenet")).state.dtype == torch.float16


@pytest.mark.parametrize("change", [{"every": 0}, {"bins": 0}])
def test_a_curve_without_bins_or_steps_is_refused(change):
    with pytest.raises(ValueError, match="a bin and a step"):
        Penalised(**change)


@pytest.mark.parametrize("penalty", ["lasso", "L1", ""])
def test_an_unknown_penalty_is_refused(penalty):
    with pytest.raises(ValueError, match=f"no penalty '{penalty}', but none, l1, l2, sparse"):
        Penalised(penalty=penalty)


def test_every_part_changes_the_id(tiny):
    changes = [
        {},
        *({"penalty": p} for p in PENALTIES[1:]),
        {"weight": 0.1},
        {"gain": 3.0},
        {"pull": 0.5},
        {"bins": 10},
        {"every": 10},
    ]
    runs = [tiny(method=Penalised(**change)) for change in changes]
    assert len({run.id for run in [*runs, tiny()]}) == len(runs) + 1


# --- what penalties leave behind ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bins", "every", "whole"),
    [(200, 1, 10), (200, 3, 3), (2, 3, 2), (200, 10, 1), (200, 11, 0)],
)
def test_the_curve_is_the_mean_of_the_label_term_by_bins(tiny, bins, every, whole):
    run = tiny(model="lenet", method=Penalised(bins=bins, every=every), lr=0.01)
    *_, losses = per_step(run)
    assert len(losses) == 10
    curve = sparsity.training_curve(train([run])[0])
    assert [*curve.columns] == ["iteration", "ce"]
    assert curve.iteration.tolist() == [every * k for k in range(1, whole + 1)]
    expected = [np.mean(losses[every * k : every * (k + 1)]) for k in range(whole)]
    assert curve.ce.tolist() == pytest.approx(expected, rel=1e-4)


def test_without_a_curve_there_is_none_to_show(tiny):
    trained = train([tiny(epochs=1, model="lenet")])[0]
    with pytest.raises(ValueError, match=r"keeps no curve: give it Penalised\(\)"):
        sparsity.training_curve(trained)


@pytest.fixture
def trained_lenet(tiny):
    trained = train([tiny(epochs=1, model="lenet", method=Penalised())])[0]
    return trained, [w.detach().numpy() for w in matrices(trained.model()) if w.ndim == 4]


def test_kernels_are_a_table_of_one_convolutions_weights(trained_lenet):
    trained, weights = trained_lenet
    for layer, expected in enumerate(weights):
        table = sparsity.kernels(trained, layer)
        assert [*table.columns] == ["output", "input", "row", "column", "weight"]
        assert len(table) == expected.size
        for row in table.sample(50, random_state=0).itertuples():
            weight = expected[row.output, row.input, row.row, row.column]
            assert row.weight == pytest.approx(weight, abs=6e-6)
        places = table[["output", "input", "row", "column"]]
        assert not places.duplicated().any()
        assert (places.max() + 1).tolist() == [*expected.shape]


def test_negligible_weights_are_counted_by_convolution(trained_lenet):
    trained, weights = trained_lenet
    table = sparsity.kernel_sparsity(trained)
    assert table.layer.tolist() == ["stem.0.weight", "body.0.0.weight"]
    assert table.weights.tolist() == [w.size for w in weights] == [150, 2400]
    counts = [int((np.abs(w) < np.abs(w).max() / 100).sum()) for w in weights]
    assert table.negligible.tolist() == counts
    assert counts[1] > 0
    for measure, w in zip(table.hoyer, weights, strict=True):
        norm, root = np.sqrt((w.astype(float) ** 2).sum()), np.sqrt(w.size)
        by_hand = (root - np.abs(w).sum() / norm) / (root - 1)
        assert measure == pytest.approx(by_hand, abs=1e-5)


def test_l1_leaves_more_negligible_weights_than_nothing_does(tiny):
    """Not to be taken for granted: a step of ±weight never rests at 0, but near it."""
    counts = []
    for penalty in ("none", "l1"):
        method = Penalised(penalty=penalty, weight=0.01)
        trained = train([tiny(epochs=12, model="lenet", lr=0.02, method=method)])[0]
        counts.append(sparsity.kernel_sparsity(trained).negligible.sum())
    assert counts[1] > 2 * counts[0]


def test_a_penalised_run_is_a_start_and_a_teacher(tiny):
    first = tiny(epochs=1, model="lenet", method=Penalised(penalty="sparse"))
    second = tiny(epochs=1, model="lenet", start=first)
    student = tiny(epochs=1, method=KD(first))
    for trained in train([second, student]):
        known = final_weights(store.find_record(first))
        assert trained.summary["teachers"] == {f"{first.id}@1": known}
    assert replace(first, seed=1).id != first.id
