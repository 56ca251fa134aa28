"""A deadline: training stops in time, loses nothing, and continues to the same bits."""

from dataclasses import replace

import pytest
from helpers import same_log

from kdlib import KD, KR, GateSearch, OneStage, Penalised, store, train
from kdlib.engine import evaluation, logit_cache
from kdlib.engine import trainer as trainer_module
from kdlib.engine.deadline import Deadline
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.pool import TrainerPool
from kdlib.engine.train import CACHES
from kdlib.engine.trainer import Trainer
from kdlib.errors import OutOfTime


@pytest.fixture
def stop_after(monkeypatch):
    """Train until a function was called so often, then let the time be over."""

    def run_until(runs, owner, name, calls, **options):
        deadline, count, original = Deadline(), [], getattr(owner, name)

        def counted(*arguments):
            result = original(*arguments)
            count.append(name)
            if len(count) == calls:
                deadline.stop_now()
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            with pytest.raises(OutOfTime, match="same call continues"):
                train(runs, deadline=deadline, **options)
        CACHES.clear()
        return len(count)

    return run_until


METHODS = {
    "route": lambda teacher: OneStage(KD(teacher), gap=1),
    "curve": lambda teacher: Penalised(every=4, bins=3),
    "two optimizers": lambda teacher: KR(teacher, prior=teacher.recipe),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [3, 5, 8])  # within an epoch of 5 steps, after it, in the next
def test_a_run_that_stops_at_any_step_continues_to_the_same_bits(
    tiny, elsewhere, stop_after, method, steps
):
    teacher = tiny(epochs=3, keep=(1, 2))
    run = tiny(epochs=3, method=METHODS[method](teacher), seed=1, keep=(1,), save_logits=True)
    expected, _ = elsewhere(run, teacher)
    train([teacher])
    assert stop_after([run], Trainer, "step", steps) == steps
    assert store.find_record(run) is None
    resumed = train([run])[0]
    for key in ("weights", "teachers", "logits", "curve"):
        assert resumed.summary.get(key) == expected.summary.get(key)
    assert same_log(resumed, expected)
    assert "earlier_environments" not in resumed.summary


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (LogitCache, "compute", 1),  # the first labels, before any step
        (LogitCache, "compute", 12),  # within the labels of a later epoch
        (evaluation, "check_time", 1),  # within the first test
    ],
)
def test_time_may_be_over_while_a_teacher_labels_and_while_a_student_is_tested(
    tiny, elsewhere, stop_after, monkeypatch, owner, name, calls
):
    monkeypatch.setitem(logit_cache.CHUNK, "cpu", 24)
    monkeypatch.setitem(evaluation.CHUNK, "cpu", 100)
    teacher = tiny(epochs=1)
    run = tiny(epochs=3, method=KD(teacher), seed=1)
    expected, _ = elsewhere(run, teacher)
    train([teacher])
    stop_after([run], owner, name, calls)
    resumed = train([run])[0]
    assert resumed.summary["weights"] == expected.summary["weights"]
    assert same_log(resumed, expected)


def test_students_that_train_in_parallel_all_stop_and_continue(tiny, elsewhere, stop_after):
    runs = [tiny(epochs=3, seed=seed) for seed in range(4)]
    expected = elsewhere(*runs)
    stop_after(runs, Trainer, "step", 23, parallel=3, partial=True)
    states = [(store.folder(run) / "state.safetensors").exists() for run in runs]
    assert states == [True, True, True, False]
    for ours, theirs in zip(train(runs, parallel=2), expected, strict=True):
        assert ours.summary["weights"] == theirs.summary["weights"]
        assert same_log(ours, theirs)


def test_students_and_their_teachers_generation_stop_together_and_continue(
    tiny, elsewhere, stop_after
):
    teacher, long = tiny(epochs=1), tiny(epochs=4, seed=1)
    runs = [tiny(epochs=3, method=KD(teacher), seed=2), long]
    expected = elsewhere(*runs)
    # one epoch of both is 10 steps; then the student has begun, and is in its second epoch
    stop_after(runs, Trainer, "step", 26, parallel=2)
    assert store.find_record(teacher)
    assert [store.state_path(run).exists() for run in runs] == [True, True]
    for ours, theirs in zip(train(runs, parallel=2), expected, strict=True):
        assert ours.summary["weights"] == theirs.summary["weights"]
        assert same_log(ours, theirs)


@pytest.fixture
def search(tiny, elsewhere):
    """A search that ends within an epoch, and its result without any stop."""
    dense = tiny(epochs=1, model="densenet-bc-16-4")
    method = GateSearch(dense, budget=0.6, strength=0.5, rate=0.05)
    run = replace(dense, recipe=replace(dense.recipe, epochs=9), method=method, start=dense)
    expected = elsewhere(run, dense)[0]
    assert expected.epochs_used % 1
    return run, expected


def test_a_run_that_its_method_ended_before_the_time_was_over_ends_at_the_same_step(
    search, stop_after
):
    run, expected = search
    train([run.start])
    stop_after([run], Trainer, "step", round(expected.epochs_used * 5))
    resumed = train([run])[0]
    assert resumed.epochs_used == expected.epochs_used
    assert resumed.summary["weights"] == expected.summary["weights"]


def test_an_early_end_does_not_depend_on_the_number_of_steps_in_a_block(search, monkeypatch):
    run, expected = search
    monkeypatch.setitem(trainer_module.BLOCK, "cpu", 32)
    ours = train([run])[0]
    assert ours.epochs_used == expected.epochs_used
    assert ours.summary["weights"] == expected.summary["weights"]


def test_the_lock_of_a_run_is_free_only_when_its_files_are_written(tiny, monkeypatch):
    free, release = [], TrainerPool._release

    def note(students, run):
        free.append((store.folder(run) / "record.jsonl").exists())
        release(students, run)

    monkeypatch.setattr(TrainerPool, "_release", note)
    train([tiny(keep=(1,), seed=seed) for seed in (1, 2)], parallel=2)
    assert free == [True, True]


def test_without_a_deadline_nothing_stops(tiny):
    deadline = Deadline()
    assert deadline.left == float("inf")
    assert train([tiny()], deadline=deadline)[0].epochs == 2
    deadline.stop_now()
    assert deadline.left <= 0
    assert train([tiny()], deadline=deadline)[0].epochs == 2  # nothing is left to train
