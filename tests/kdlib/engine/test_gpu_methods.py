"""On a GPU: captured steps of all methods equal their eager steps."""

from dataclasses import replace

import pytest
import torch
from gpu_trainers import (
    METHODS,
    PARAPHRASER,
    RUN,
    WIDER,
    WITH_PRIOR,
    advance,
    assert_equal,
    finish,
    training_log,
    whole,
)

from kdlib import KD, load_data, store, train
from kdlib.chains.greedy import GreedySearch, anchors, divergences
from kdlib.engine import state
from kdlib.engine import writer as writer_module
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.trainer import Trainer
from kdlib.methods import (
    Hint,
)
from kdlib.methods.route import OneStage, multi_stage
from kdlib.store import fingerprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("same_kernels_every_time"),
]


# --- peers, teachers in the step, and routes ------------------------------------------------------


def test_a_captured_student_whose_teacher_changes_in_place_equals_an_eager_one(start, gpu):
    """With an adapter, from 32 channels to 64."""
    teacher = replace(WIDER, keep=(1,))
    (trained,) = train([teacher], device=gpu)
    run = replace(RUN, method=OneStage(Hint(teacher), gap=1), seed=1)
    captured, eager = start(run, capture=True), start(run, capture=False)
    for epoch in (1, 2):
        for trainer in (captured, eager):
            taught = fingerprint(trainer.teachers.network.state_dict())
            assert taught == trained.summary["weights"][str(epoch)]
            advance(trainer, trainer.steps)
            trainer.end_epoch()
            assert fingerprint(trainer.teachers.network.state_dict()) == taught
            if not trainer.finished:
                trainer.begin_epoch()
    assert training_log(captured) == training_log(eager)
    assert "adapter.weight" in whole(captured)
    assert_equal(whole(captured), whole(eager))


def test_a_captured_paraphraser_equals_an_eager_one_and_leaves_its_network_alone(start, gpu):
    (teacher,) = train([WIDER], device=gpu)
    captured, eager = (finish(start(PARAPHRASER, capture=c)) for c in (True, False))
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    student = captured.state.modules["student"].state_dict()
    assert fingerprint(student) == teacher.summary["weights"][str(RUN.recipe.epochs)]


def test_stages_and_searches_are_trained_together(gpu):
    """Every epoch is too hard for a threshold this low: the anchors are 1, 2, 3."""
    recipe = replace(RUN.recipe, epochs=3)
    teacher = replace(RUN, model="resnet14-x0.5", recipe=recipe, keep=(1, 2), save_logits=True)
    student = replace(RUN, method=KD(teacher), seed=1)
    searches = [GreedySearch(student, first=1, delta=delta) for delta in (-10.0, 1e9)]
    staged, all_of_them, two = train([multi_stage(student, (1, 3))[-1], *searches], device=gpu)
    assert anchors(all_of_them) == [1, 2, 3]
    assert anchors(two) == [1, 3]
    assert staged.summary["weights"] == two.summary["weights"]
    kept = store.find_record(teacher).summary["weights"]
    assert two.summary["teachers"][f"{teacher.id}@3"] == kept["3"]
    seen = divergences(all_of_them)
    assert seen.anchor.tolist() == [1, 1, 1, 2, 2, 2]
    assert (seen.kl > 0).all()


# --- extra updates, random inputs, and recoded gradients ------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_trainer_of_any_method_equals_an_eager_one(
    start, teachers, monkeypatch, name, dtype
):
    monkeypatch.setattr(state, "training_dtype", lambda *_: dtype)
    run = replace(RUN, method=METHODS[name], seed=1)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    peers = dict.fromkeys(("Rocket", "DML"), "peer.")
    if own := (dict.fromkeys(WITH_PRIOR, "prior.student.") | peers).get(name):
        assert any(key.startswith(f"momentum.{own}") for key in whole(captured))
    if teacher := captured.teachers.network:
        kept = {trained.summary["weights"]["2"] for trained in teachers[:2]}
        assert fingerprint(teacher.state_dict()) in kept
        assert not any(parameter.grad is not None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["CE", "Rocket", "Hint", "KR", "KR + KDGAN", "sparse"])
def test_a_resumed_trainer_equals_an_uninterrupted_one(start, teachers, gpu, monkeypatch, name):
    monkeypatch.setattr(writer_module, "SAVING_SHARE", 1e9)
    run = replace(RUN, method=METHODS[name], seed=1)
    uninterrupted, first = finish(start(run, capture=True)), start(run, capture=True)
    advance(first, first.steps)
    first.end_epoch()
    first.files.writer.wait()
    images = load_data(run.data, "train", gpu)
    resumed = Trainer(run, images, load_data(run.data, "test", gpu), CachePool())
    assert resumed.epoch == 1
    resumed.begin_epoch()
    assert_equal(whole(resumed), whole(first))
    finish(resumed)
    assert training_log(resumed) == training_log(uninterrupted)
    assert_equal(whole(resumed), whole(uninterrupted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recoded_gradients_and_their_thresholds_do_not_depend_on_their_scaling(
    start, monkeypatch, dtype
):
    """The method asks for float32, so that thresholds are of gradients without a scale."""
    monkeypatch.setattr(state, "training_dtype", lambda *_: torch.float32)
    run = replace(RUN, method=METHODS["sparse"])
    exact = start(run, capture=False)
    advance(exact, 1)
    monkeypatch.setattr(state, "training_dtype", lambda *_: dtype)
    half = start(run, capture=False)
    advance(half, 1)
    ours, theirs = (trainer.state.modules["thresholds"].values for trainer in (half, exact))
    torch.testing.assert_close(ours, theirs)
