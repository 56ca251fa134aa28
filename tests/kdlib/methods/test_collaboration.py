"""STC: the student's front and the teacher's back, with an adapter between them."""

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
from helpers import aux_of, gradients, step_in_float64
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from kdlib import STC, build_model, load_data, store, train
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


@pytest.mark.parametrize("target", BY_HAND)
def test_the_gradient_equals_finite_differences(tiny, target):
    method = STC(tiny(), alpha=0.4, target=target, **WITH_KD)
    step = step_in_float64(method, "wrn-10-1-x0.1", "resnet8-x0.2", size=4)
    weights = [w for m in (step.student, step.aux["adapter"]) for w in m.parameters()]
    assert gradcheck(lambda *_: method.loss(step)[1]["loss"], weights, fast_mode=True)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_collaboration_trains_only_the_students_front_and_the_adapter(tiny, cut):
    method = STC(tiny(), cut=cut)
    step = step_in_float64(method, *PAIRS["other channels"])
    stc = method.loss(step)[1]["stc"]
    stages = [step.student.stem, *step.student.body, step.student.head]
    reached = [all(g.any() for g in gradients(stc, [stage])) for stage in stages]
    assert reached == [True] * (cut + 1) + [False] * (4 - cut)
    assert not any(g.any() for stage in stages[cut + 1 :] for g in gradients(stc, [stage]))
    assert all(g.any() for g in gradients(stc, step.aux.values()))
    stc.backward()
    assert all(p.grad is None for p in step.teacher.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "resnet8-x0.25",
        "wrn-10-1-x0.25",
        "vgg13-x0.0625",
        "mobilenetv2-t2-w0.1",
        "resnet50-x0.0625",
    ],
)
def test_the_teacher_with_its_own_front_is_the_teacher(tiny, name):
    teacher, twin = (build_model(name, 5, 1, seed=0).eval() for _ in range(2))
    x = torch.randn(3, 1, 16, 16, generator=torch.manual_seed(0))
    with torch.no_grad():
        for cut in range(1, len(teacher.body) + 1):
            method = STC(tiny(), cut=cut)
            assert method.aux_modules(twin, teacher, x) == {}
            collaboration = method.composites(twin, teacher, {})["collaboration"]
            assert torch.equal(collaboration(x), teacher(x))


# --- the adapter ----------------------------------------------------------------------------------


def aux_at_32_pixels(method, student, teacher):
    with torch.device("meta"):
        networks = [build_model(name, 10).eval() for name in (student, teacher)]
        return method.aux_modules(*networks, torch.empty(2, 3, 32, 32))


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet20", "resnet56"),
        ("resnet20", "wrn-40-1"),
        ("vgg13", "wrn-46-4"),
        ("resnet56", "resnet110"),
    ],
)
def test_the_papers_pairs_of_one_width_need_no_adapter(tiny, student, teacher, cut):
    assert aux_at_32_pixels(STC(tiny(), cut=cut), student, teacher) == {}


@pytest.mark.parametrize(("cut", "channels"), [(1, 16), (2, 32), (3, 64)])
def test_a_wrn_of_another_width_needs_an_adapter(tiny, cut, channels):
    aux = aux_at_32_pixels(STC(tiny(), cut=cut), "wrn-16-1", "wrn-16-2")
    convolution, norm = aux["adapter"]
    assert aux.keys() == {"adapter"}
    assert convolution.weight.shape == (2 * channels, channels, 1, 1)
    assert convolution.bias is None
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 2 * channels


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
    assert adapted.shape == features[1].shape
    collaboration = method.composites(step.student, step.teacher, step.aux)["collaboration"]
    expected = step.teacher.resume(1, adapted)
    torch.testing.assert_close(collaboration(step.x), expected, rtol=1e-12, atol=0)
    value = method.loss(step)[1]["stc"]
    assert all(g.any() for g in gradients(value, [step.student.stem, step.aux["adapter"]]))


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


def test_with_alpha_1_nothing_behind_the_cut_changes(tiny):
    run = tiny(method=STC(tiny(model="resnet14-x0.25"), alpha=1), weight_decay=0.0)
    after = dict(train([run])[0].model().named_parameters())
    for name, parameter in first_student(run).named_parameters():
        behind = name.startswith(("body.2", "head"))
        assert torch.equal(after[name], parameter) == behind, name


def test_with_alpha_0_the_student_learns_as_without_a_teacher(tiny):
    method = STC(tiny(model="resnet14-x0.25"), alpha=0)
    joined, plain = train([tiny(method=method), tiny()])
    assert_same_weights(joined.model().state_dict(), plain.model())


@pytest.mark.parametrize("target", ["output", "truth"])
def test_the_log_tests_the_collaboration_with_the_checkpoint_of_the_epoch(tiny, wide, target):
    fixed = STC(wide, at=1, target=target)
    route = OneStage(STC(wide, target=target), gap=1)
    first, second = train([tiny(keep=(1,), method=method) for method in (fixed, route)])
    test = load_data("digits", "test")
    x = test.batch(torch.arange(len(test)))
    for trained, epochs in ((first, (1, 1)), (second, (1, 2))):
        for (_, row), at in zip(trained.log.iterrows(), epochs, strict=True):
            taught_by = store.find_record(wide).model(at)
            modules = trained_modules(trained.run, int(row.epoch), load_data("digits"))
            student = modules["student"]
            feature = student.body[1](student.body[0](student.stem(x)))
            together = taught_by.head(taught_by.body[2](modules["adapter"](feature)))
            for prefix, logits in (("test", student(x)), ("test_collaboration", together)):
                for name, value in evaluation(logits, test.labels, taught_by(x)).items():
                    assert row[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-4)
            assert row.test_ce != row.test_collaboration_ce
    columns = ["train_stc", "test_ce", "test_collaboration_ce"]
    assert second.log[columns].iloc[0].equals(first.log[columns].iloc[0])
    assert (second.log[columns].iloc[1] != first.log[columns].iloc[1]).all()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "model"),
    [
        (0, "resnet8-x0.25"),
        (-1, "resnet8-x0.25"),
        (4, "resnet8-x0.25"),
        (2.5, "resnet8-x0.25"),
        (4, "vgg13-x0.0625"),  # its teacher has three stages
    ],
)
def test_a_cut_without_a_stage_is_refused_when_the_run_is_made(tiny, cut, model):
    with pytest.raises(ValueError, match=f"no cut after stage {cut}: .*3"):
        tiny(model=model, method=STC(tiny(model="resnet14-x0.25"), cut=cut))


def test_a_cut_may_be_written_with_a_point(tiny):
    assert STC(tiny(), cut=2.0) == STC(tiny(), cut=2)
    assert isinstance(STC(tiny(), cut=2.0).cut, int)


@pytest.mark.parametrize("alpha", [1.5, -0.1, float("nan")])
def test_an_alpha_outside_of_0_and_1_is_refused(tiny, alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha}: give a share"):
        STC(tiny(), alpha=alpha)


def test_the_error_of_an_unknown_target_names_all_targets(tiny):
    with pytest.raises(ValueError, match=r"Known: output, soft, label, truth"):
        STC(tiny(), target="logits")
