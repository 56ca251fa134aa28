"""Students that train in parallel: their turns, their numbers, and lack of memory."""

import weakref
from contextlib import ExitStack

import pytest
import torch
from helpers import final_weights, same_log

from kdlib import KD, store, train
from kdlib.engine import writer as writer_module
from kdlib.engine.progress import Progress
from kdlib.engine.trainer import Trainer


def test_parallel_runs_equal_runs_one_by_one(tiny, elsewhere):
    teacher = tiny(model="resnet14-x0.25")
    runs = [
        tiny(seed=0),
        tiny(epochs=3, seed=1, method=KD(teacher)),
        tiny(seed=2, batch=32, method=KD(teacher, at=1)),
        tiny(epochs=1, seed=3, method=KD(teacher)),
    ]
    alone = elsewhere(*runs, parallel=1)
    together = train(runs, parallel=3)
    assert [t.summary["weights"] for t in together] == [t.summary["weights"] for t in alone]
    assert all(map(same_log, together, alone))


def test_a_waiting_run_begins_as_soon_as_another_ends(tiny, epochs_trained):
    short, long, waiting = tiny(epochs=1), tiny(epochs=4, seed=1), tiny(epochs=1, seed=2)
    train([short, long, waiting], parallel=2)
    assert epochs_trained.index((waiting.id, 1)) < epochs_trained.index((long.id, 3))
    assert epochs_trained.index((long.id, 2)) < epochs_trained.index((long.id, 3))


@pytest.fixture
def two_generations(tiny, photos):
    """A teacher, its student, and a longer run that has nothing to do with them."""
    teacher = tiny(epochs=1)
    folder = f"folder:{photos(count=20)}"
    others = {"digits": tiny(epochs=6, seed=1), "photos": tiny(epochs=6, batch=4, data=folder)}
    return teacher, tiny(epochs=2, seed=2, method=KD(teacher)), others


@pytest.mark.parametrize("data", ["digits", "photos"])
def test_a_student_begins_as_soon_as_its_teacher_is_trained_whatever_else_trains(
    two_generations, elsewhere, epochs_trained, data
):
    teacher, student, others = two_generations
    long = others[data]
    alone = elsewhere(student, long, teacher, parallel=1)
    epochs_trained.clear()
    together = train([student, long, teacher], parallel=2)
    assert epochs_trained.index((teacher.id, 1)) < epochs_trained.index((student.id, 1))
    assert epochs_trained.index((student.id, 2)) < epochs_trained.index((long.id, 6))
    assert len(epochs_trained) == len({*epochs_trained}) == 9
    assert [t.summary["weights"] for t in together] == [t.summary["weights"] for t in alone]
    assert all(map(same_log, together, alone))


def test_a_teacher_that_fails_beside_other_runs_takes_only_its_students_with_it(
    tiny, epochs_trained
):
    bad, long = tiny(lr=1e30), tiny(epochs=4, seed=1)
    students = [tiny(method=KD(bad)), tiny(method=KD(long), seed=2)]
    with pytest.warns(UserWarning, match=bad.id):
        results = train([long, *students], parallel=2, partial=True)
    assert [trained and trained.run for trained in results] == [long, None, students[1]]
    assert {run for run, _ in epochs_trained} == {bad.id, long.id, students[1].id}


def test_a_run_that_another_process_trains_holds_up_no_other_teachers_students(
    two_generations, epochs_trained
):
    teacher, student, others = two_generations
    theirs = others["digits"]
    held, told = ExitStack(), []
    held.enter_context(store.lock(theirs))

    def then(trained):
        told.append(trained.run)
        if trained.run == student:
            held.close()

    train([theirs, student], then=then)
    assert told == [student, theirs]
    assert [run for run, _ in epochs_trained] == [teacher.id, *[student.id] * 2, *[theirs.id] * 6]


def test_a_run_that_is_trained_again_keeps_all_that_it_kept(tiny, epochs_trained):
    train([tiny(epochs=3, keep=(1,), save_logits=True)])
    with pytest.warns(UserWarning, match="is trained again"):
        again = train([tiny(epochs=3, keep=(2,))])[0]
    assert len(epochs_trained) == 6
    assert again.summary["logits"].keys() == again.summary["weights"].keys() == {"1", "2", "3"}


# --- out of memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_at_the_start_reduces_the_number_and_changes_no_result(
    tiny, elsewhere, monkeypatch, error
):
    runs = [tiny(seed=seed) for seed in range(4)]
    expected = elsewhere(*runs)
    alive, init = [], Trainer.__init__

    def start(trainer, *arguments, **options):
        init(trainer, *arguments, **options)
        alive.append(trainer)
        if len({t.run.id for t in alive if not t.finished}) > 2:
            alive.clear()
            raise error

    monkeypatch.setattr(Trainer, "__init__", start)
    with pytest.warns(UserWarning, match="Out of memory with 3 students in parallel: 2 from now"):
        results = train(runs, parallel=4)
    assert list(map(final_weights, results)) == list(map(final_weights, expected))


def test_out_of_memory_in_a_step_halves_the_number_and_no_epoch_is_counted_twice(
    tiny, elsewhere, monkeypatch
):
    """Neither epochs that were lost as memory ran out, nor saved ones; no result changes."""
    runs = [tiny(epochs=3, seed=seed) for seed in range(4)]
    expected = elsewhere(*runs)
    counted, begin, step, failed = [], Progress.begin, Trainer.step, []
    monkeypatch.setattr(writer_module, "SAVING_SHARE", 1e-9)  # save the first epoch alone

    def note(progress, run, epoch):
        begin(progress, run, epoch)
        counted.append((progress.bar.n, progress.bar.total))

    def out_of_memory(trainer):
        if trainer.epoch == 2 and not failed:
            failed.append(trainer.run)
            raise torch.OutOfMemoryError
        step(trainer)

    monkeypatch.setattr(Progress, "begin", note)
    monkeypatch.setattr(Trainer, "step", out_of_memory)
    with pytest.warns(UserWarning, match="Out of memory with 4 students in parallel: 2 from now"):
        results = train(runs, parallel=4)
    assert list(map(final_weights, results)) == list(map(final_weights, expected))
    assert counted == [*[(0, 12)] * 4, (4, 12), (4, 12), (7, 12), (8, 12)]


def test_out_of_memory_with_one_student_is_raised(tiny, monkeypatch):
    def fail(trainer):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "begin_epoch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train([tiny()])


def test_a_failed_trainer_frees_its_memory(tiny, monkeypatch):
    trainers, init, alive = [], Trainer.__init__, []

    def start(trainer, *arguments, **options):
        init(trainer, *arguments, **options)
        alive.append(any(other() for other in trainers))
        trainers.append(weakref.ref(trainer))

    monkeypatch.setattr(Trainer, "__init__", start)
    wrong, right = tiny(milestones=(1,), decay=1e30), tiny(seed=1)
    with pytest.warns(UserWarning, match=wrong.id):
        train([wrong, right], partial=True)
    assert alive == [False, False]
