"""Hints of a stage: the loss, the adapter, and the teacher's network in the step."""

from dataclasses import replace

import pytest
import torch
from by_hand import (
    WITH_KD,
    assert_same_weights,
    assert_same_with_gradients,
    evaluation,
    first_student,
    on_logits,
    seeded,
    stage_outputs,
    to_one_size,
    train_by_hand,
)
from helpers import aux_of, final_weights, gradients, new_trainer, same_log, step_in_float64
from torch import nn
from torch.nn import functional as F

from kdlib import load_data, store, train
from kdlib.engine.trainer import Trainer
from kdlib.methods import KD, Hint, OneStage, multi_stage
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


def test_no_gradient_reaches_the_teacher(tiny):
    method = Hint(tiny(), **WITH_KD)
    step = step_in_float64(method, *PAIRS["other channels"])
    step.teacher.requires_grad_(True)
    method.loss(step)[1]["hint"].backward()
    assert all(p.grad is None for p in step.teacher.parameters())


@pytest.mark.parametrize("stage", [0, -1, 4])
@pytest.mark.parametrize("larger", ["vgg13-x0.0625", "mobilenetv2-t1-w0.1", "resnet14-x0.25"])
def test_a_stage_that_one_network_lacks_is_refused(tiny, stage, larger):
    for student, teacher in (("resnet8-x0.25", larger), (larger, "resnet8-x0.25")):
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


def test_without_an_adapter_only_the_student_is_kept(tiny):
    trained = train([tiny(method=Hint(tiny(model="resnet14-x0.25")))])[0]
    assert aux_of(trained) == {}


def test_the_log_has_the_terms_and_the_divergence_from_the_teacher(tiny, teacher):
    trained = train([tiny(method=Hint(teacher))])[0]
    test = load_data("digits", "test")
    networks = trained.model(), store.find_record(teacher).model()
    logits, taught = (network(test.batch(torch.arange(len(test)))) for network in networks)
    expected = evaluation(logits, test.labels, taught)["kl"]
    assert trained.final["test_kl"] == pytest.approx(expected, rel=1e-4)
    log = trained.log
    assert log.train_loss.tolist() == pytest.approx((log.train_ce + log.train_hint).tolist())


def test_the_number_of_the_last_stage_and_none_are_the_same(tiny, teacher):
    named, last = train([tiny(method=Hint(teacher, stage=stage)) for stage in (3, None)])
    assert final_weights(named) == final_weights(last)
    assert same_log(named, last)


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_without_cross_entropy_the_head_has_no_gradient_and_does_not_move(tiny, weight_decay):
    method = Hint(tiny(epochs=1, model="resnet14-x0.25"), stage=2, ce_weight=0.0)
    run = tiny(method=method, weight_decay=weight_decay)
    first, after = first_student(run).state_dict(), train([run])[0].model().state_dict()
    moved = {key for key in first if not torch.equal(first[key], after[key])}
    assert {key for key in first if key.startswith("head.")}.isdisjoint(moved)
    assert {key for key in first if key.startswith(("stem.", "body.0.", "body.1."))} <= moved
    trainer = new_trainer(replace(run, seed=1))
    trainer.begin_epoch()
    trainer.advance()
    student = trainer.state.modules["student"]
    assert all(p.grad is None for p in student.head.parameters())
    assert all(p.grad is not None for p in student.body[1].parameters())


def test_the_second_stage_of_fitnet_starts_from_the_first(tiny, teacher):
    first = tiny(epochs=1, method=Hint(teacher, stage=2, ce_weight=0.0))
    second = tiny(epochs=1, method=KD(teacher), start=first)
    trained = train([second])[0]
    start = new_trainer(second).state.modules
    assert start.keys() == {"student"}
    before = store.find_record(first).model().state_dict()
    assert fingerprint(start["student"].state_dict()) == fingerprint(before)
    assert aux_of(trained) == {}


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


def test_a_start_without_its_weights_is_trained_again(tiny, teacher):
    first, second = multi_stage(tiny(method=Hint(teacher), seed=1), (1, 3))
    train([first])
    store.weights_path(first, 2).unlink()
    assert store.find_record(second) is None
    assert final_weights(train([second])[0])
