"""How many lanes there are, who takes a free one, and what happens when memory runs out."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from kdlib import KD, store, train
from kdlib.engine import pool as pool_module
from kdlib.engine import trainer as trainer_module
from kdlib.engine.pool import Width, asked_parallel
from kdlib.engine.progress import Progress
from kdlib.engine.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLENTY = 10**12


# --- how many -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("KDLIB_PARALLEL", raising=False)


@pytest.fixture
def chosen(monkeypatch):
    """``chosen(seconds)``: the widths that a GPU tries, by seconds of an epoch at each, and where
    it stays."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pool_module.time, "perf_counter", lambda: clock.now)

    def run(seconds, memory=PLENTY, width=None, networks=lambda lane: 1):
        width, tried = width or Width(GPU, None), []
        monkeypatch.setattr(pool_module, "_free_memory", lambda _: memory - 1000 * width.now)
        while width.growing:
            lanes = width.now
            tried.append(lanes)
            width.opened(1000)
            started, clock.now = clock.now, clock.now + 1
            width.epoch_over("of before the last lane was opened", started - 1, lanes)
            for k in range(lanes):
                clock.now = started + seconds[lanes] * networks(k)
                width.epoch_over(f"run {k}", started, lanes)
        return [*tried, width.now]

    return run


def test_a_cpu_has_one_lane():
    assert Width(CPU, asked_parallel(None)).now == 1


@pytest.mark.parametrize("asked", [3, "3"])
def test_lanes_that_are_asked_for_are_not_chosen(monkeypatch, asked):
    for device in (CPU, GPU):
        width = Width(device, asked_parallel(asked))
        assert (width.now, width.growing) == (3, False)
    monkeypatch.setenv("KDLIB_PARALLEL", "5")
    assert asked_parallel(None) == 5
    assert asked_parallel(asked) == 3


@pytest.mark.parametrize("asked", ["0", "-1", "many", "2.5"])
def test_what_is_no_number_of_lanes_is_refused(monkeypatch, asked):
    monkeypatch.setenv("KDLIB_PARALLEL", asked)
    with pytest.raises(ValueError, match="KDLIB_PARALLEL"):
        train([])


def test_lanes_double_while_that_pays(chosen):
    assert chosen({4: 1, 8: 1.1, 16: 1.3, 32: 2.5}) == [4, 8, 16, 32, 32]


def test_lanes_that_made_it_slower_are_given_back(chosen):
    assert chosen({4: 1, 8: 1.1, 16: 2.3}) == [4, 8, 16, 8]


def test_larger_networks_that_join_are_not_taken_for_slowness(chosen):
    larger = lambda lane: 1 if lane < 4 else 10  # noqa: E731
    assert chosen({4: 1, 8: 1, 16: 1.9}, networks=larger) == [4, 8, 16, 16]


def test_there_are_no_more_lanes_than_memory_lasts_for(chosen):
    """Of 7,500 bytes 4,000 are taken, and of the rest nine tenths may be."""
    assert chosen({4: 1, 7: 1}, memory=7500) == [4, 7, 7]


def test_there_is_an_upper_limit(chosen):
    assert chosen(dict.fromkeys((4, 8, 16, 32, 64), 1)) == [4, 8, 16, 32, 64, 64]


def test_what_memory_did_not_last_for_is_not_tried_again():
    width = Width(GPU, None)
    width.limit(3)
    assert (width.now, width.growing) == (3, False)


# --- who is on them -------------------------------------------------------------------------------


def test_a_waiting_run_takes_a_free_lane_at_once(tiny, epochs_trained):
    short, long, next_one = tiny(epochs=1), tiny(epochs=4, seed=1), tiny(epochs=1, seed=2)
    train([short, long, next_one], lanes=2)
    assert epochs_trained.index((next_one.id, 1)) < epochs_trained.index((long.id, 3))


def test_a_run_that_takes_a_free_lane_gives_the_same_numbers(tiny, elsewhere):
    teacher = tiny(model="resnet14-x0.25")
    runs = [tiny(epochs=k + 1, seed=k, method=KD(teacher)) for k in range(4)]
    alone = elsewhere(*runs, lanes=1)
    refilled = train(runs, lanes=2)
    assert [t.summary["weights"] for t in refilled] == [t.summary["weights"] for t in alone]


# --- out of memory --------------------------------------------------------------------------------


def test_out_of_memory_in_a_step_halves_the_lanes_and_changes_no_number(
    tiny, elsewhere, monkeypatch
):
    runs = [tiny(epochs=3, seed=seed) for seed in range(4)]
    expected = elsewhere(*runs)
    step, moved = Trainer.step, set()

    def out_of_memory(lane):
        if len({*moved, lane.run.id}) == 4:
            moved.clear()
            raise torch.OutOfMemoryError
        moved.add(lane.run.id)
        step(lane)
        if lane.taken + 1 == lane.steps and lane.epoch + 1 == lane.run.recipe.epochs:
            moved.discard(lane.run.id)

    monkeypatch.setattr(Trainer, "step", out_of_memory)
    with pytest.warns(UserWarning, match="Out of memory with 4 lanes: 2 from now"):
        results = train(runs, lanes=4)
    assert [t.summary["weights"] for t in results] == [t.summary["weights"] for t in expected]


def test_the_time_left_counts_no_epoch_twice(tiny, monkeypatch):
    """Neither those that lanes lost as memory ran out, nor those they had saved."""
    told, begin, step, count = [], Progress.begin, Trainer.step, []
    monkeypatch.setattr(trainer_module, "SAVING_SHARE", 1e9)  # save every epoch, however short

    def note(progress, run, epoch):
        begin(progress, run, epoch)
        told.append((progress.done, progress.epochs))

    def out_of_memory(lane):
        count.append(lane)
        if len(count) == 2 * (2 * lane.steps + 1):  # both lanes' first step of the third epoch
            raise torch.OutOfMemoryError
        step(lane)

    monkeypatch.setattr(Progress, "begin", note)
    monkeypatch.setattr(Trainer, "step", out_of_memory)
    with pytest.warns(UserWarning, match="Out of memory with 2 lanes: 1 from now"):
        train([tiny(epochs=4, seed=seed) for seed in range(2)], lanes=2)
    assert told == [(0, 8), (0, 8), (4, 8), (6, 8)]


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_other_words_for_out_of_memory_are_understood(tiny, monkeypatch, words):
    init = Trainer.__init__

    def start(lane, run, *arguments):
        if run.seed == 1 and not store.find_record(tiny()):
            raise RuntimeError(words)
        init(lane, run, *arguments)

    monkeypatch.setattr(Trainer, "__init__", start)
    with pytest.warns(UserWarning, match="Out of memory with 2 lanes: 1 from now"):
        assert len(train([tiny(seed=seed) for seed in range(2)], lanes=2)) == 2


def test_a_lane_that_failed_is_gone(tiny, monkeypatch):
    """Its memory is wanted by the others."""
    lanes, init, alive = [], Trainer.__init__, []

    def start(lane, *arguments):
        init(lane, *arguments)
        alive.append(any(other() for other in lanes))
        lanes.append(weakref.ref(lane))

    monkeypatch.setattr(Trainer, "__init__", start)
    wrong, right = tiny(milestones=(1,), decay=1e30), tiny(seed=1)
    train([wrong, right], partial=True)
    assert alive == [False, False]
