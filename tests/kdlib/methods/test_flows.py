"""Flows (FSP), selectivity (NST), hints of any stage: their losses, and training in two stages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    batches,
    final_weights,
    gradients,
    new_trainer,
    parts_of,
    same_log,
    step_in_float64,
    watch_teachers,
)
from torch.nn import functional as F

from kdlib import build_model, load_data, store, train
from kdlib.engine.plan import mix
from kdlib.methods import FSP, KD, NST, Hint, OneStage
from kdlib.store import fingerprint

WITH_KD = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
WEIGHTS = {"alone": {}, "with KD": WITH_KD, "first stage": {"ce_weight": 0.0}}
every_weight = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


def outputs_by_hand(network, x):
    """Of the stem, then of every stage."""
    features = [network.stem(x)]
    for stage in network.body:
        features.append(stage(features[-1]))
    return features


def on_logits_by_hand(step, ce_weight=1.0, kd_weight=0.0, temperature=4.0):
    own, taught = (network(step.x) for network in (step.student, step.teacher))
    ce = (own.logsumexp(1) - own.gather(1, step.labels[:, None]).squeeze(1)).mean()
    p, q = ((z / temperature).exp() for z in (taught, own))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return ce_weight * ce + kd_weight * temperature**2 * (p * (p / q).log()).sum(1).mean()


def assert_same_with_gradients(got, expected, modules):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(gradients(got, modules), gradients(expected, modules), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


# --- FSP ------------------------------------------------------------------------------------------


def halved(feature):
    """The largest of every 2x2."""
    rows = np.maximum(feature[..., 0::2, :], feature[..., 1::2, :])
    return np.maximum(rows[..., 0::2], rows[..., 1::2])


def fsp_in_numpy(ours, theirs):
    total = 0.0
    for k in range(1, min(len(ours), len(theirs))):
        matrices = []
        for first, last in ((ours[k - 1], ours[k]), (theirs[k - 1], theirs[k])):
            while first.shape[2] > last.shape[2]:
                first = halved(first)
            positions = last.shape[2] * last.shape[3]
            matrices.append(np.einsum("bihw,bjhw->bij", first, last) / positions)
        total += ((matrices[0] - matrices[1]) ** 2).mean()
    return total


def fsp_in_torch(ours, theirs):
    total = 0
    for k in range(1, min(len(ours), len(theirs))):
        matrices = []
        for first, last in ((ours[k - 1], ours[k]), (theirs[k - 1], theirs[k])):
            ratio = first.shape[2] // last.shape[2]
            first = F.max_pool2d(first, ratio) if ratio > 1 else first
            matrices.append(torch.einsum("bihw,bjhw->bij", first, last) / last[0, 0].numel())
        total = total + ((matrices[0] - matrices[1]) ** 2).mean()
    return total


FSP_PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other family": ("resnet8-x0.25", "wrn-10-1-x0.25"),
    "five stages and three": ("vgg13-x0.0625", "resnet8-x0.25"),
}


@every_weight
@pytest.mark.parametrize("pair", FSP_PAIRS)
def test_fsp_and_its_gradient_equal_those_computed_by_hand(tiny, pair, weights):
    names = FSP_PAIRS[pair]
    method = FSP(tiny(model=names[1]), fsp_weight=3.0, **weights)
    method.check(tiny(model=names[0]))
    step = step_in_float64(method, *names)._replace(targets=None)
    logits, terms = method.loss(step)
    ours, theirs = (outputs_by_hand(network, step.x) for network in (step.student, step.teacher))
    in_numpy = fsp_in_numpy(*([f.detach().numpy() for f in fs] for fs in (ours, theirs)))
    assert terms["fsp"].item() == pytest.approx(in_numpy, rel=1e-10)
    assert in_numpy > 1e-3
    expected = 3.0 * fsp_in_torch(ours, theirs) + on_logits_by_hand(step, **weights)
    assert_same_with_gradients(terms["loss"], expected, [step.student])
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)


X = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8-x0.25", "resnet8-x0.5"),
        ("resnet8-x0.25", "wrn-10-2-x0.25"),  # the stem's agree
        ("resnet8-x0.25", "resnet50-x0.0625"),
        ("vgg13-x0.0625", "resnet8-x0.5"),
    ],
)
def test_fsp_refuses_other_channels_at_once(tiny, student, teacher):
    widths = [
        [f.shape[1] for f in outputs_by_hand(build_model(name, 5, 1).eval(), X)]
        for name in (student, teacher)
    ]
    with pytest.raises(ValueError, match="FSP needs equal channels") as refusal:
        tiny(model=student, method=FSP(tiny(model=teacher)))
    assert all(name in str(refusal.value) for name in (student, teacher))
    assert all(str(w) in str(refusal.value) for w in widths)


def test_a_start_from_fsp_is_its_weights(tiny):
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    first = tiny(epochs=1, method=FSP(teacher, ce_weight=0.0))
    second = tiny(epochs=1, start=first)
    trained = train([second])[0]
    before = store.find_record(first)
    start = new_trainer(replace(second, recipe=replace(second.recipe, epochs=2)))
    assert fingerprint(start.state.networks["student"].state_dict()) == final_weights(before)
    assert trained.summary["teachers"] == {f"{first.id}@1": final_weights(before)}
    assert final_weights(trained) != final_weights(before)
    assert final_weights(trained) != final_weights(train([tiny(epochs=1)])[0])


# --- NST ------------------------------------------------------------------------------------------


def nst_by_hand(ours, theirs):
    size = min(ours.shape[2], theirs.shape[2])

    def patterns(f):
        b, c, h, _ = f.shape
        f = f.reshape(b, c, size, h // size, size, h // size).mean((3, 5)).reshape(b, c, -1)
        return f / f.norm(dim=2, keepdim=True).clamp(min=1e-12)

    def kernel(x, y):  # [b, c, c, h·w]
        return (((x[:, :, None] * y[:, None]).sum(3)) ** 2).mean()

    s, t = patterns(ours), patterns(theirs)
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


@every_weight
@pytest.mark.parametrize(
    "pair",
    [
        ("resnet8-x0.25", "resnet14-x0.25"),
        ("resnet8-x0.25", "wrn-10-2-x0.25"),
        ("resnet8-x0.25", "mobilenetv2-t1-w0.1"),
        ("vgg13-x0.0625", "resnet8-x0.25"),
    ],
)
def test_nst_and_its_gradient_equal_those_computed_by_hand(tiny, pair, weights):
    method = NST(tiny(), nst_weight=5.0, **weights)
    step = step_in_float64(method, *pair, size=32)._replace(targets=None)
    terms = method.loss(step)[1]
    ours, theirs = (outputs_by_hand(n, step.x)[-1] for n in (step.student, step.teacher))
    nst = nst_by_hand(ours, theirs)
    torch.testing.assert_close(terms["nst"], nst, rtol=1e-8, atol=0)
    assert nst > 1e-5
    expected = 5.0 * nst + on_logits_by_hand(step, **weights)
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-9, atol=0)
    for got, by_hand in zip(
        gradients(terms["loss"], [step.student]), gradients(expected, [step.student]), strict=True
    ):
        torch.testing.assert_close(got, by_hand, rtol=1e-6, atol=1e-9)
    assert step.parts == {}


def test_nst_weighs_as_in_the_authors_code_unless_told(tiny):
    method = NST(tiny(), ce_weight=0.0)
    step = step_in_float64(method, "resnet8-x0.25", "resnet14-x0.25")
    terms = method.loss(step)[1]
    assert terms["loss"].item() == pytest.approx(50 * terms["nst"].item(), rel=1e-12)


# --- hints of any stage ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3, None])
@pytest.mark.parametrize("teacher", ["resnet14-x0.25", "resnet14-x0.5"])
def test_a_hint_of_a_stage_equals_its_formula(tiny, stage, teacher):
    method = Hint(tiny(model=teacher), stage=stage, hint_weight=2.0, ce_weight=0.0)
    method.check(tiny())
    step = step_in_float64(method, "resnet8-x0.25", teacher)
    terms = method.loss(step)[1]
    ours, theirs = (
        outputs_by_hand(n, step.x)[stage or 3].detach().numpy()
        for n in (step.student, step.teacher)
    )
    assert ("adapter" in step.parts) == (teacher == "resnet14-x0.5")
    if "adapter" in step.parts:
        kernel, bias = (p.detach().numpy() for p in step.parts["adapter"].parameters())
        assert kernel.shape == (theirs.shape[1], ours.shape[1], 1, 1)
        ours = np.einsum("oi,bihw->bohw", kernel[:, :, 0, 0], ours) + bias[:, None, None]
    hint = ((ours - theirs) ** 2).mean()
    assert terms["hint"].item() == pytest.approx(hint, rel=1e-10)
    assert terms["loss"].item() == pytest.approx(2 * hint, rel=1e-10)
    # what lies behind the stage learns nothing from it
    parts = [step.student.stem, *step.student.body, step.student.head]
    reached = [any(g.any() for g in gradients(terms["loss"], [part])) for part in parts]
    assert reached == [k <= (stage or 3) for k in range(4)] + [False]


@pytest.mark.parametrize("stage", [0, -1, 4])
@pytest.mark.parametrize("larger", ["vgg13-x0.0625", "mobilenetv2-t1-w0.1", "resnet14-x0.25"])
def test_a_stage_that_not_both_have_is_refused_at_once(tiny, stage, larger):
    for student, teacher in (("resnet8-x0.25", larger), (larger, "resnet8-x0.25")):
        with pytest.raises(ValueError, match=f"no stage {stage}: .* 3 stages in common"):
            tiny(model=student, method=Hint(tiny(model=teacher), stage=stage))


def test_the_last_stage_by_number_is_the_last_stage(tiny):
    teacher = tiny(model="resnet8-x0.5", epochs=1)
    named, last = train([tiny(method=Hint(teacher, stage=stage)) for stage in (3, None)])
    assert final_weights(named) == final_weights(last)
    assert same_log(named, last)


def test_a_hint_follows_its_anchor_and_keeps_its_stage(tiny):
    teacher = tiny(epochs=2, keep=(1,))
    run = tiny(method=OneStage(Hint(teacher, stage=1), gap=1))
    assert run.method.method.stage == 1
    with pytest.raises(ValueError, match="no stage 9"):
        tiny(method=OneStage(Hint(teacher, stage=9), gap=1))


# --- training -------------------------------------------------------------------------------------

TEACHER = "resnet14-x0.25"
METHODS = {
    "FSP": lambda teacher: FSP(teacher, fsp_weight=2.0, ce_weight=0.5, kd_weight=0.5),
    "FSP alone": lambda teacher: FSP(teacher, ce_weight=0.0),
    "NST": lambda teacher: NST(teacher, nst_weight=5.0),
    "Hint": lambda teacher: Hint(teacher, stage=2, ce_weight=0.0),
}
every_method = pytest.mark.parametrize("name", METHODS)


def term_by_hand(method, ours, theirs):
    match method:
        case FSP():
            return method.fsp_weight * fsp_in_torch(ours, theirs)
        case NST():
            return method.nst_weight * nst_by_hand(ours[-1], theirs[-1])
        case Hint():
            return method.hint_weight * (ours[2] - theirs[2]).square().mean()


@every_method
def test_training_equals_a_plain_pytorch_loop(tiny, name):
    teacher = tiny(epochs=1, model=TEACHER)
    run = tiny(milestones=(1,), method=METHODS[name](teacher), seed=4)
    trained, method = train([run])[0], run.method
    taught_by, images = store.find_record(teacher).model(), load_data("digits").first(128)
    model = build_model(run.model, classes=10, channels=1, seed=mix("weights", 4)).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch, index, view in batches(run, images):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 1 else 0.005
        x = images.batch(index, view)
        ours = outputs_by_hand(model, x)
        with torch.no_grad():
            theirs = outputs_by_hand(taught_by, x)
        logits = model.head(ours[-1])
        loss = term_by_hand(method, ours, theirs)
        if method.ce_weight:
            loss = loss + method.ce_weight * F.cross_entropy(logits, images.labels[index])
        if method.kd_weight:
            p = (taught_by.head(theirs[-1]) / 4).softmax(1)
            kl = (p * (p.log() - (logits / 4).log_softmax(1))).sum(1).mean()
            loss = loss + method.kd_weight * 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    got = trained.model().state_dict()
    for key, expected in model.state_dict().items():
        torch.testing.assert_close(got[key], expected, rtol=1e-3, atol=3e-5)


@every_method
def test_teachers_are_bit_identical_after_their_students_trained(tiny, monkeypatch, name):
    teacher = tiny(epochs=1, model=TEACHER)
    before, alive = train([teacher])[0], watch_teachers(monkeypatch)
    train([tiny(method=METHODS[name](teacher))])
    assert fingerprint(before.model().state_dict()) == final_weights(before)
    assert {fingerprint(network.state_dict()) for network in alive} == {final_weights(before)}
    assert not any(module.training for network in alive for module in network.modules())


@every_method
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, name, assert_resumes):
    teacher = tiny(epochs=1, model=TEACHER)
    assert_resumes(tiny(epochs=3, milestones=(1,), method=METHODS[name](teacher)))


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
@pytest.mark.parametrize("name", ["FSP alone", "Hint"])
def test_without_labels_the_head_has_no_gradient_and_stays_to_the_bit(tiny, name, weight_decay):
    teacher = tiny(epochs=1, model=TEACHER)
    run = tiny(method=METHODS[name](teacher), weight_decay=weight_decay)
    first = build_model(run.model, 10, 1, seed=mix("weights", run.seed)).state_dict()
    after = train([run])[0].model().state_dict()
    moved = {key for key in first if not torch.equal(first[key], after[key])}
    assert {key for key in first if key.startswith("head.")}.isdisjoint(moved)
    assert {key for key in first if key.startswith(("stem.", "body.0.", "body.1."))} <= moved
    lane = new_trainer(replace(run, seed=1))
    lane.begin_epoch()
    lane.advance()
    student = lane.state.networks["student"]
    assert all(p.grad is None for p in student.head.parameters())
    assert all(p.grad is not None for p in student.body[1].parameters())


def test_without_labels_a_student_is_still_told_its_accuracy(tiny):
    trained = train([tiny(method=FSP(tiny(epochs=1, model=TEACHER), ce_weight=0.0))])[0]
    assert trained.log.train_loss.tolist() == trained.log.train_fsp.tolist()
    assert (trained.log.train_ce > 0).all()
    assert parts_of(trained) == {}


def test_a_second_stage_of_a_hint_starts_from_the_first(tiny):
    teacher = tiny(epochs=1, model="resnet8-x0.5")
    first = tiny(epochs=1, method=Hint(teacher, stage=2, ce_weight=0.0))
    second = tiny(epochs=1, method=KD(teacher), start=first)
    lane_of = replace(second, recipe=replace(second.recipe, epochs=2))
    trained = train([second])[0]
    start = new_trainer(lane_of).state.networks
    assert fingerprint(start["student"].state_dict()) == fingerprint(
        store.find_record(first).model().state_dict()
    )
    assert start.keys() == {"student"}
    assert parts_of(trained) == {}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (FSP, [{"fsp_weight": 2.0}]),
        (NST, [{"nst_weight": 2.0}]),
        (Hint, [{"hint_weight": 2.0}, {"stage": 1}, {"stage": 2}]),
    ],
)
def test_every_part_changes_the_id(tiny, method, changes):
    teacher = tiny(model=TEACHER)
    changes += [{"ce_weight": 0.5}, {"kd_weight": 0.5}, {"temperature": 2.0}, {"at": 1}]
    runs = [tiny(method=method(teacher, **change)) for change in ({}, *changes)]
    assert len({run.id for run in runs}) == len(runs)
