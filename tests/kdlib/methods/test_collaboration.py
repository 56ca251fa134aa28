"""STC: the student's front and the teacher's back, with an adapter between them."""

from dataclasses import replace

import pytest
import torch
from by_hand import (
    WITH_KD,
    assert_same_weights,
    assert_same_with_gradients,
    evaluation,
    first_student,
    kl,
    seeded,
    train_by_hand,
)
from helpers import aux_of, step_in_float64
from torch import nn
from torch.nn import functional as F

from kdlib import STC, FreshBack, Recipe, Run, build_model, load_data, store, train
from kdlib.engine.plan import mix
from kdlib.engine.state import trained_modules
from kdlib.methods import OneStage

PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "resnet14-x0.5"),
    "other family": ("vgg13-x0.0625", "wrn-10-1-x0.25"),
}


# --- the loss -------------------------------------------------------------------------------------


def cross_entropy(logits, probabilities):
    return -(probabilities * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def softmax(logits):
    return logits.exp() / logits.exp().sum(1, keepdim=True)


BY_HAND = {
    "output": lambda o, z, y: cross_entropy(o, softmax(z)),
    "soft": lambda o, z, y: 16 * cross_entropy(o / 4, softmax(z / 4)),
    "label": lambda o, z, y: cross_entropy(o, torch.eye(5, dtype=o.dtype)[z.argmax(1)]),
    "truth": lambda o, z, y: cross_entropy(o, torch.eye(5, dtype=o.dtype)[y]),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("target", BY_HAND)
@pytest.mark.parametrize("weights", [{}, WITH_KD], ids=["alone", "with KD"])
def test_the_loss_and_its_gradient_equal_those_computed_by_hand(tiny, pair, target, weights):
    method = STC(tiny(), alpha=0.3, cut=2, target=target, **weights)
    step = step_in_float64(method, *PAIRS[pair])
    assert (pair == "other channels") == ("adapter" in step.aux)
    # so that the targets differ by more than a random teacher's do
    z = torch.tensor([[0.5, 2.0, 1.0, 0.0, 0.0]] * 4, dtype=torch.float64)
    logits, terms = method.loss(step._replace(teacher_logits=z))
    front = nn.Sequential(step.student.stem, *list(step.student.body)[:2])(step.x)
    own = nn.Sequential(*list(step.student.body)[2:], step.student.head)(front)
    back = nn.Sequential(*step.aux.values(), *list(step.teacher.body)[2:], step.teacher.head)
    stc = BY_HAND[target](back(front), z, step.labels)
    plain = weights.get("ce_weight", 1) * BY_HAND["truth"](own, z, step.labels)
    loss = 0.3 * stc + 0.7 * (plain + weights.get("kd_weight", 0) * kl(z, own, 4))
    torch.testing.assert_close(terms["stc"], stc, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, own, rtol=1e-12, atol=1e-14)
    modules = [step.student, *step.aux.values()]
    assert_same_with_gradients(terms["loss"], loss, modules, rtol=1e-12, gradient=1e-9)
    assert terms.keys() == {"loss", "ce", "stc", *(["kd"] if weights else [])}


@pytest.mark.parametrize("name", ["resnet8-x0.25", "vgg13-x0.0625", "mobilenetv2-t2-w0.1"])
def test_the_teacher_with_its_own_front_is_the_teacher(tiny, name):
    teacher, twin = (build_model(name, 5, 1, seed=0).eval() for _ in range(2))
    x = torch.randn(3, 1, 16, 16, generator=torch.manual_seed(0))
    with torch.no_grad():
        for cut in range(1, len(teacher.body) + 1):
            method = STC(tiny(), cut=cut)
            assert method.aux_modules(twin, teacher, x) == {}
            collaboration = method.composites(twin, teacher, {})["collaboration"]
            assert torch.equal(collaboration(x), teacher(x))


@pytest.mark.parametrize(
    ("student", "teacher", "ours", "theirs"),
    [
        ("resnet8-x0.25", "mobilenetv2-t1-w0.1", (4, 16), (8, 8)),
        ("mobilenetv2-t1-w0.1", "resnet8-x0.25", (8, 8), (4, 16)),
        ("mobilenetv2-t1-w0.25", "resnet8-x0.375", (6, 8), (6, 16)),  # only the sizes differ
    ],
)
def test_features_of_other_sizes_are_resized_first(tiny, student, teacher, ours, theirs):
    method = STC(tiny(), cut=1)
    step = step_in_float64(method, student, teacher, size=16)
    resize, convolution, norm = step.aux["adapter"]
    features = [network.until(1, step.x) for network in (step.student, step.teacher)]
    assert [feature.shape[2] for feature in features] == [ours[1], theirs[1]]
    feature, resized = features[0], resize(features[0])
    if ours[1] > theirs[1]:
        torch.testing.assert_close(resized, F.avg_pool2d(feature, 2))
    else:
        torch.testing.assert_close(resized, feature.repeat_interleave(2, 2).repeat_interleave(2, 3))
    adapted = norm(convolution(resized))
    collaboration = method.composites(step.student, step.teacher, step.aux)["collaboration"]
    expected = step.teacher.resume(1, adapted)
    torch.testing.assert_close(collaboration(step.x), expected, rtol=1e-12, atol=0)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def wide(tiny):
    """A teacher that needs an adapter from 8 to 16 channels after stage 2."""
    return tiny(epochs=3, model="resnet8-x0.5", keep=(1, 2))


def test_training_equals_a_plain_pytorch_loop(tiny, wide):
    method = STC(wide, at=2, alpha=0.3, **WITH_KD)
    run = tiny(milestones=(1,), method=method, seed=4)
    trained = train([run])[0]
    taught_by, model = store.find_record(wide).model(2), first_student(run)

    def adapter():
        return nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))

    aux = nn.ModuleDict({"adapter": seeded(run, adapter)})

    def losses(x, labels):
        feature = model.body[1](model.body[0](model.stem(x)))
        logits = model.head(model.body[2](feature))
        together = taught_by.head(taught_by.body[2](aux["adapter"](feature)))
        taught = taught_by(x)
        own = 0.1 * F.cross_entropy(logits, labels) + 0.9 * kl(taught, logits, 4)
        yield 0.3 * F.cross_entropy(together, taught.softmax(1)) + 0.7 * own

    train_by_hand(run, losses, (run.recipe, [model, aux]))
    assert_same_weights(trained.model().state_dict(), model)
    assert_same_weights(aux_of(trained), aux)
    log = trained.log
    total = 0.3 * log.train_stc + 0.7 * (0.1 * log.train_ce + 0.9 * log.train_kd)
    assert log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)


@pytest.mark.parametrize("target", ["output", "truth"])
def test_the_log_tests_the_collaboration_with_the_checkpoint_of_the_epoch(tiny, wide, target):
    fixed = STC(wide, at=1, target=target)
    route = OneStage(STC(wide, target=target), gap=1)
    first, second = train([tiny(keep=(1,), method=method) for method in (fixed, route)])
    test = load_data("digits", "test")
    tested = test.first_index(12), torch.arange(len(test))  # 128 training images: 12, and all
    for trained, epochs in ((first, (1, 1)), (second, (1, 2))):
        for (_, row), at, index in zip(trained.log.iterrows(), epochs, tested, strict=True):
            x, labels = test.batch(index), test.labels[index]
            taught_by = store.find_record(wide).model(at)
            modules = trained_modules(trained.run, int(row.epoch), load_data("digits"))
            student = modules["student"]
            feature = student.body[1](student.body[0](student.stem(x)))
            together = taught_by.head(taught_by.body[2](modules["adapter"](feature)))
            for prefix, logits in (("test", student(x)), ("test_collaboration", together)):
                for name, value in evaluation(logits, labels, taught_by(x)).items():
                    assert row[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-4)
            assert row.test_ce != row.test_collaboration_ce
    columns = ["train_stc", "test_ce", "test_collaboration_ce"]
    assert second.log[columns].iloc[0].equals(first.log[columns].iloc[0])
    assert (second.log[columns].iloc[1] != first.log[columns].iloc[1]).all()


@pytest.mark.parametrize("target", ["output", "truth"])
def test_another_run_can_lend_the_back_and_the_target_stays_the_teachers(tiny, wide, target):
    lender = replace(wide, recipe=replace(wide.recipe, epochs=1, lr=0.0), keep=())
    trained = train([tiny(method=STC(wide, target=target, back=lender))])[0]
    assert trained.summary["teachers"].keys() == {f"{wide.id}@3", f"{lender.id}@1"}
    back, teacher = store.find_record(lender).model(), store.find_record(wide).model()
    fresh = build_model(wide.model, 10, 1, seed=mix("weights", lender.seed))
    for own, other in zip(back.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(own, other)  # at a rate of 0 only batch norms learn
    test = load_data("digits", "test")
    x = test.batch(torch.arange(len(test)))
    modules = trained_modules(trained.run, 2, load_data("digits"))
    feature = modules["adapter"](modules["student"].until(2, x))
    for name, value in evaluation(back.resume(2, feature), test.labels, teacher(x)).items():
        assert trained.final[f"test_collaboration_{name}"] == pytest.approx(value, rel=1e-3)


def test_a_fresh_back_is_trained_along_from_random_weights(tiny, wide):
    method = FreshBack(wide)
    step = step_in_float64(method, "resnet8-x0.25", "resnet14-x0.5")
    back = step.aux["back"]
    front = step.aux["adapter"](step.student.until(2, step.x))
    assert not torch.equal(back.resume(2, front), step.teacher.resume(2, front))
    _, terms = method.loss(step)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in back.parameters() if p.ndim > 1)
    torch.testing.assert_close(
        terms["stc"], cross_entropy(back.resume(2, front), softmax(step.teacher_logits))
    )
    trained = train([tiny(method=method)])[0]
    assert trained.final["test_collaboration_ce"] != trained.final["test_ce"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cut": 0}, "no cut after stage 0: .*3"),
        ({"cut": 4}, "no cut after stage 4: .*3"),  # the teacher has three stages
        ({"cut": 2.5}, "no cut after stage 2.5: .*3"),
        ({"alpha": 1.5}, "alpha=1.5: give a share"),
        ({"alpha": -0.1}, "alpha=-0.1: give a share"),
        ({"alpha": float("nan")}, "alpha=nan: give a share"),
        ({"back": Run("digits", "resnet8", Recipe(1, 8, 0.1))}, "lends no back"),
        ({"target": "logits"}, "Known: output, soft, label, truth"),
    ],
)
def test_settings_out_of_range_are_refused(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(model="vgg13-x0.0625", method=STC(tiny(model="resnet14-x0.25"), **settings))


def test_a_cut_may_be_written_with_a_point(tiny):
    assert STC(tiny(), cut=2.0) == STC(tiny(), cut=2)
    assert isinstance(STC(tiny(), cut=2.0).cut, int)
