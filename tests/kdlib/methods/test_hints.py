"""Hints of a stage: the loss, the adapter, and the teacher's network in the step."""

import pytest
import torch
from by_hand import (
    WITH_KD,
    assert_same_weights,
    assert_same_with_gradients,
    first_student,
    on_logits,
    seeded,
    stage_outputs,
    to_one_size,
    train_by_hand,
)
from helpers import aux_of, gradients, step_in_float64
from torch import nn
from torch.nn import functional as F

from kdlib import store, train
from kdlib.engine.trainer import Trainer
from kdlib.methods import KD, Hint, OneStage
from kdlib.store import fingerprint

PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "resnet14-x0.5"),
    "student's map is larger": ("resnet8-x0.25", "mobilenetv2-t1-w0.1"),
    "teacher's map is larger": ("mobilenetv2-t1-w0.1", "resnet14-x0.25"),
}


# --- the loss -------------------------------------------------------------------------------------


def test_kd_and_its_gradient_equal_those_computed_by_hand(tiny):
    for method, weights in ((KD(tiny(), **WITH_KD), WITH_KD), (KD(tiny()), {"kd_weight": 1.0})):
        step = step_in_float64(method, *PAIRS["equal"])
        expected = on_logits(step, **{"temperature": 5.0, **weights})
        assert_same_with_gradients(method.loss(step)[1]["loss"], expected, [step.student])


@pytest.mark.parametrize(
    "weights", [{}, WITH_KD, {"ce_weight": 0.0}], ids=["alone", "with KD", "hint alone"]
)
@pytest.mark.parametrize("stage", [1, 3, None])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_loss_and_its_gradient_equal_those_computed_by_hand(tiny, pair, stage, weights):
    """The hint's gradient reaches the student up to the stage, and the adapter."""
    method = Hint(tiny(), hint_weight=2.0, stage=stage, **weights)
    step = step_in_float64(method, *PAIRS[pair], size=32)._replace(teacher_logits=None)
    networks = (step.student, step.teacher)
    ours, theirs = (stage_outputs(n, step.x)[stage if stage else -1] for n in networks)
    assert ("adapter" in step.aux) == (ours.shape[1] != theirs.shape[1])
    if stage is None:
        larger = (ours.shape[2] > theirs.shape[2]) - (ours.shape[2] < theirs.shape[2])
        assert larger == pair.startswith("student's") - pair.startswith("teacher's")
    if step.aux:
        weight, bias = step.aux["adapter"].parameters()
        assert weight.shape == (theirs.shape[1], ours.shape[1], 1, 1)
        ours = torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], ours) + bias[:, None, None]
    ours, theirs = to_one_size(ours, theirs)
    hint = ((ours - theirs) ** 2).mean()
    logits, terms = method.loss(step)
    torch.testing.assert_close(logits, step.student(step.x), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(terms["hint"], hint, rtol=1e-10, atol=0)
    assert hint > 1e-6
    expected = 2 * hint + on_logits(step, **weights)
    learners = [step.student, *step.aux.values()]
    assert_same_with_gradients(terms["loss"], expected, learners, atol=1e-10)
    modules = [step.student.stem, *step.student.body, step.student.head, *step.aux.values()]
    reached = [any(g.any() for g in gradients(terms["hint"], [module])) for module in modules]
    stages = len(step.student.body)
    reached_stages = [k <= (stage or stages) for k in range(stages + 1)]
    assert reached == [*reached_stages, False] + [True] * len(step.aux)


@pytest.mark.parametrize("stage", [0, 4])
def test_a_stage_that_one_network_lacks_is_refused(tiny, stage):
    models = ("resnet8-x0.25", "vgg13-x0.0625")
    for student, teacher in (models, models[::-1]):
        with pytest.raises(ValueError, match=f"no stage {stage}: .* 3 stages in common"):
            tiny(model=student, method=Hint(tiny(model=teacher), stage=stage))
    with pytest.raises(ValueError, match="no stage 9"):
        tiny(method=OneStage(Hint(tiny(), stage=9), gap=1))


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny):
    """Twice as wide as the student: it needs an adapter from 16 to 32 channels."""
    return tiny(epochs=3, model="resnet8-x0.5", keep=(1, 2))


def test_training_equals_a_plain_pytorch_loop(tiny, teacher):
    run = tiny(milestones=(1,), method=Hint(teacher, at=2, ce_weight=0.5, hint_weight=3.0), seed=4)
    trained = train([run])[0]
    model, taught_by = first_student(run), store.find_record(teacher).model(2)
    adapter = seeded(run, lambda: nn.Conv2d(16, 32, kernel_size=1))

    def losses(x, labels):
        feature = stage_outputs(model, x)[-1]
        hint = (adapter(feature) - stage_outputs(taught_by, x)[-1]).square().mean()
        yield 0.5 * F.cross_entropy(model.head(feature), labels) + 3 * hint

    train_by_hand(run, losses, (run.recipe, [model, adapter]))
    assert_same_weights(trained.model().state_dict(), model)
    assert_same_weights(aux_of(trained), nn.ModuleDict({"adapter": adapter}))


def test_without_cross_entropy_the_head_does_not_move(tiny):
    """It has no gradient, so that not even weight decay moves it."""
    method = Hint(tiny(epochs=1, model="resnet14-x0.25"), stage=2, ce_weight=0.0)
    run = tiny(method=method)
    first, after = first_student(run).state_dict(), train([run])[0].model().state_dict()
    moved = {key for key in first if not torch.equal(first[key], after[key])}
    assert {key for key in first if key.startswith("head.")}.isdisjoint(moved)
    assert {key for key in first if key.startswith(("stem.", "body.0.", "body.1."))} <= moved


def test_each_epoch_learns_from_its_own_checkpoint(tiny, teacher, monkeypatch):
    seen, begin = [], Trainer.begin_epoch

    def note(trainer):
        begin(trainer)
        if trainer.teachers.network:
            weights = trainer.teachers.network.state_dict()
            seen.append((fingerprint(weights), weights["stem.0.weight"].data_ptr()))

    monkeypatch.setattr(Trainer, "begin_epoch", note)
    methods = OneStage(Hint(teacher), gap=1), Hint(teacher, at=1)
    route, first = train([tiny(epochs=3, method=method) for method in methods])
    kept = store.find_record(teacher).summary["weights"]
    assert route.summary["teachers"] == {f"{teacher.id}@{k}": kept[str(k)] for k in (1, 2, 3)}
    assert [weights for weights, _ in seen[:3]] == [kept["1"], kept["2"], kept["3"]]
    assert len({address for _, address in seen[:3]}) == 1  # where a captured step reads
    columns = ["train_loss", "train_hint", "test_ce", "test_kl"]
    assert route.log[columns].iloc[0].equals(first.log[columns].iloc[0])
    assert (route.log[columns][1:] != first.log[columns][1:]).all(axis=None)
