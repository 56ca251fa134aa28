"""On a GPU: a step that is captured once and replayed equals the eager step."""

from dataclasses import replace

import pytest
import torch
from gpu_trainers import (
    METHODS,
    RUN,
    WIDER,
    WITH_PRIOR,
    advance,
    assert_equal,
    copies,
    finish,
    training_log,
    whole,
)

from kdbook.search import extraction
from kdlib import KD, build_model, count_cost, load_data, store, train
from kdlib.chains.found import FoundStudent
from kdlib.engine import LogitCache, state
from kdlib.engine.cache_pool import HOST, CachePool
from kdlib.engine.logit_cache import folded
from kdlib.engine.train import CACHES
from kdlib.engine.trainer import Trainer
from kdlib.methods import (
    STC,
    GateSearch,
)
from kdlib.methods.route import OneStage
from kdlib.store import fingerprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("same_kernels_every_time"),
]


# --- capture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_momentum_and_statistics_after_the_first_steps_are_those_of_an_eager_trainer(start, steps):
    """A captured first step would forget all earlier gradients in every replay."""
    captured, eager = start(RUN, capture=True), start(RUN, capture=False)
    advance(captured, steps)
    advance(eager, steps)
    assert_equal(whole(captured), whole(eager))
    assert captured.data.cursor.item() == eager.data.cursor.item() == steps


def test_a_captured_student_of_changing_teachers_equals_an_eager_one(start, gpu):
    train([replace(RUN, keep=(1,))], device=gpu)
    run = replace(RUN, method=OneStage(KD(RUN), gap=1), seed=1)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))


@pytest.mark.parametrize("capture", [True, False])
def test_a_change_of_the_learning_rate_takes_effect(start, capture):
    """At a rate of zero weights stand still, while batch statistics move on."""
    run = replace(RUN, recipe=replace(RUN.recipe, decay=0.0))
    trainer = start(run, capture)
    advance(trainer, trainer.steps)
    trainer.end_epoch()
    parameters = copies(dict(trainer.state.modules["student"].named_parameters()))
    buffers = copies(dict(trainer.state.modules["student"].named_buffers()))
    trainer.begin_epoch()
    advance(trainer, trainer.steps)
    assert_equal(dict(trainer.state.modules["student"].named_parameters()), parameters)
    assert not any(
        torch.equal(b, buffers[name])
        for name, b in trainer.state.modules["student"].named_buffers()
    )


def test_an_evaluation_between_replays_leaves_training_alone(start):
    trainer, undisturbed = start(RUN, capture=True), start(RUN, capture=True)
    for _ in range(3):
        advance(trainer, 5)
        trainer._evaluate(last=True)
        trainer.state.modules["student"].train()
    advance(undisturbed, 15)
    assert_equal(whole(trainer), whole(undisturbed))


def test_a_capture_that_fails_costs_one_run_its_graph_alone(start, gpu, monkeypatch):
    step = Trainer.step

    def reading(trainer):
        step(trainer)
        trainer.meter.sums["loss"].item()  # a wait, which a capture forbids

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", reading)
        with pytest.warns(UserWarning, match="trains without a graph"):
            failed = start(RUN, capture=True, graph=False)
    captured, eager = (finish(start(RUN, capture=c)) for c in (True, False))
    assert_equal(whole(captured), whole(eager))
    assert_equal(whole(finish(failed)), whole(eager))


# --- parallel runs --------------------------------------------------------------------------------


def test_the_number_of_parallel_runs_changes_no_result(gpu, teachers, another_home, monkeypatch):
    monkeypatch.delenv("KDLIB_PARALLEL", raising=False)
    longer = replace(RUN, recipe=replace(RUN.recipe, epochs=4))
    methods = [METHODS[name] for name in ("CE", "KR", "KR + KDGAN", "KDGAN", "sparse")]
    runs = [
        replace(longer, model="resnet14-x0.5", method=KD(WIDER)),
        replace(longer, model="mobilenetv2-t4-w0.35", recipe=replace(longer.recipe, batch=64)),
        *(replace(RUN, method=method, seed=k) for k, method in enumerate(methods)),
        *(replace(longer, method=KD(WIDER), seed=seed) for seed in range(4)),
    ]
    results = []
    for parallel in (1, 4, None):
        another_home()
        CACHES.clear()
        trained = train(runs, device=gpu, parallel=parallel)
        results.append([(t.summary["weights"], t.summary["teachers"]) for t in trained])
    assert results[0] == results[1] == results[2]


def test_teachers_are_bit_identical_after_their_students_trained(gpu):
    teacher = train([RUN], device=gpu)[0]
    train([replace(RUN, seed=1, method=KD(RUN))], device=gpu)
    kept = teacher.summary["weights"]["2"]
    assert fingerprint(teacher.model().state_dict()) == kept
    assert {fingerprint(cache.teacher.state_dict()) for cache in CACHES.caches.values()} == {
        fingerprint(folded(teacher.model()).state_dict())
    }
    assert store.find_record(RUN).summary == teacher.summary


def test_a_gpu_trains_as_a_cpu_does(gpu, another_home):
    run = replace(RUN, recipe=replace(RUN.recipe, epochs=1, milestones=()))
    losses = []
    for device in ("cpu", gpu):
        another_home()
        losses.append(train([run], device=device)[0].final["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# --- data and logits ------------------------------------------------------------------------------


def test_a_batch_is_the_same_on_every_device(photos, gpu):
    name = f"folder:{photos()}"
    on_cpu, on_gpu = load_data(name), load_data(name, device=gpu)
    index, view = torch.arange(8).repeat(81)[:162], torch.arange(162)
    batch = on_gpu.batch(index.to(gpu), view.to(gpu))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.cpu(), on_cpu.batch(index, view), rtol=0, atol=1e-6)


@pytest.fixture
def teacher():
    model = build_model("resnet20", classes=10, channels=1, seed=0)
    digits = load_data("digits")
    with torch.no_grad():
        model(digits.batch(torch.arange(500)))
    return model.eval()


def test_logits_in_half_precision_are_close_to_exact_ones(teacher, gpu):
    cpu, index = load_data("digits", "test"), torch.arange(359)
    with torch.no_grad():
        exact = teacher(cpu.batch(index))
    cache = LogitCache(teacher, load_data("digits", "test", gpu), torch.float16)
    logits = cache.logits(index.to(gpu), torch.full_like(index, cpu.centre).to(gpu))
    assert logits.dtype == torch.float16
    scale = exact.abs().max()
    assert (logits.cpu().float() - exact).abs().max() < 0.01 * scale
    assert (logits.cpu().argmax(1) == exact.argmax(1)).float().mean() > 0.98


def test_logits_do_not_depend_on_when_they_were_computed(teacher, gpu):
    images = load_data("digits", "train", gpu)
    first, second = (LogitCache(teacher, images, torch.float16) for _ in range(2))
    index = torch.arange(len(images), device=gpu)
    view = index % images.views
    expected = first.logits(index, view)
    assert torch.equal(expected, first.compute(index, view))
    for part in torch.randperm(len(images), generator=torch.manual_seed(0)).to(gpu).split(300):
        second.logits(index[part], view[part])
    assert torch.equal(second.logits(index, view), expected)


# --- speed ----------------------------------------------------------------------------------------


def test_logits_of_the_next_epoch_are_computed_beside_training(start, gpu):
    (teacher,) = train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    trainer.look_ahead()
    assert trainer.data.next_logits
    advance(trainer, trainer.steps)
    index, view = (t.flatten() for t in trainer.data._plan(1))
    expected = LogitCache(teacher.model(), trainer.images, torch.float16).logits(index, view)
    assert torch.equal(trainer.data.next_logits[0].flatten(0, 1), expected)
    trainer.end_epoch()
    trainer.begin_epoch()
    assert torch.equal(trainer.data.teacher_logits[: trainer.steps].flatten(0, 1), expected.float())


def test_a_table_in_the_hosts_memory_gives_the_same_logits(start, gpu):
    (teacher,) = train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    resident, spilled = (
        LogitCache(teacher.model(), trainer.images, torch.float16) for _ in range(2)
    )
    spilled.place = HOST
    for epoch in (0, 1, 0):
        index, view = (t.flatten() for t in trainer.data._plan(epoch))
        assert torch.equal(spilled.logits(index, view), resident.logits(index, view))
    assert spilled.table.device == HOST
    index, view = (t.flatten() for t in trainer.data._plan(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spilled.logits(index, view)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["KD", "STC", "KR"])
def test_a_compiled_trainer_equals_its_eager_step_and_is_close_to_an_uncompiled_one(
    start, teachers, monkeypatch, method
):
    made = {"KD": KD(WIDER), "STC": STC(WIDER, alpha=0.3, cut=2), "KR": WITH_PRIOR["KR"]}
    run = replace(RUN, method=made[method], seed=1)
    plain = finish(start(run, capture=True))
    monkeypatch.setenv("KDLIB_COMPILE", "always")
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert captured.state.compiled
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    for ours, theirs in zip(captured.log, plain.log, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)


def test_the_end_of_an_epoch_does_not_wait_for_the_teacher_pass_of_another_trainer(
    start, gpu, monkeypatch
):
    train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    advance(trainer, trainer.steps)
    with trainer.caches.beside(gpu) as done:
        torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    trainer.end_epoch()
    assert not done.query()
    torch.cuda.synchronize()


def test_the_memory_of_a_removed_cache_is_not_reused_while_it_is_read(start, gpu):
    (teacher,) = train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    pool = CachePool()
    pool.get(("a",), lambda: LogitCache(teacher.model(), trainer.images, torch.float16))
    with pool.beside(gpu):
        torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    pool._drop([("a",)])
    assert len(pool._leaving) == 1
    torch.cuda.synchronize()
    pool._drop([])
    assert not pool._leaving


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(start, teachers, name):
    trainer = start(replace(RUN, method=METHODS[name]), capture=False)
    advance(trainer, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.data.cursor.item() == 3


# --- a search, whose gates have an optimizer of their own and whose end depends on them -----------

DENSE = replace(RUN, model="densenet-bc-16-4")
SEARCH = replace(
    DENSE, method=GateSearch(DENSE, budget=0.5, strength=0.5, rate=0.05), start=DENSE, seed=1
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_search_equals_an_eager_one(start, gpu, monkeypatch, dtype):
    train([DENSE], device=gpu)
    monkeypatch.setattr(state, "training_dtype", lambda *_: dtype)
    captured, eager = (finish(start(SEARCH, capture=c)) for c in (True, False))
    assert captured.stopped
    assert captured.used == eager.used < captured.run.recipe.epochs
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))


def test_what_is_found_on_a_gpu_trains_there(gpu):
    (found,) = train([FoundStudent(SEARCH, replace(DENSE, method=KD(DENSE)))], device=gpu)
    searched = store.find_record(SEARCH)
    network = build_model(found.run.model, 10, 1, seed=0)
    assert count_cost(network, 8).macs == searched.final["macs"]
    agreement = extraction(searched).iloc[0]
    assert agreement.difference < 1e-3 * agreement.logit


# The last test: an index out of bounds would make the device unusable for the others.
def test_an_epoch_may_have_fewer_steps_than_the_warm_up(start):
    run = replace(RUN, recipe=replace(RUN.recipe, batch=64), images=64)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert_equal(whole(captured), whole(eager))
