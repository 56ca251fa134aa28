"""How many lanes there are, who takes a free one, and what happens when memory runs out."""

from types import SimpleNamespace

import pytest
import torch

from kdlib import KD, train
from kdlib.engine import lanes as lanes_module
from kdlib.engine.lane import Lane
from kdlib.engine.lanes import Width

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLENTY = 10**12


# --- how many -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("KDLIB_LANES", raising=False)


@pytest.fixture
def chosen(monkeypatch):
    """``chosen(speeds)``: the widths that a GPU tries, by images/s at each, and where it stays."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(lanes_module.time, "perf_counter", lambda: clock.now)

    def run(speeds, memory=PLENTY, width=None):
        width = width or Width(GPU)
        width.lane_bytes, tried = 1000, []
        monkeypatch.setattr(lanes_module, "_free_memory", lambda _: memory - 1000 * width.now)
        while width.growing:
            tried.append(width.now)
            width.measure()
            width.images, clock.now = speeds[width.now], clock.now + 1
            for k in range(tried[-1]):
                width.epoch_over(SimpleNamespace(run=SimpleNamespace(id=k)), tried[-1])
        return [*tried, width.now]

    return run


def test_a_cpu_has_one_lane():
    assert Width(CPU).now == 1


@pytest.mark.parametrize("asked", [3, "3"])
def test_lanes_that_are_asked_for_are_not_chosen(monkeypatch, asked):
    for device in (CPU, GPU):
        width = Width(device, asked)
        assert (width.now, width.growing) == (3, False)
        monkeypatch.setenv("KDLIB_LANES", "5")
        assert Width(device).now == 5
        assert Width(device, asked).now == 3


@pytest.mark.parametrize("asked", ["0", "-1", "many", "2.5"])
def test_what_is_no_number_of_lanes_is_refused(monkeypatch, asked):
    monkeypatch.setenv("KDLIB_LANES", asked)
    with pytest.raises(ValueError, match="KDLIB_LANES"):
        train([])


def test_lanes_double_while_that_pays(chosen):
    assert chosen({4: 100, 8: 190, 16: 300, 32: 310}) == [4, 8, 16, 32, 32]


def test_lanes_that_made_it_slower_are_given_back(chosen):
    assert chosen({4: 100, 8: 190, 16: 150}) == [4, 8, 16, 8]


def test_there_are_no_more_lanes_than_memory_lasts_for(chosen):
    assert chosen({4: 100, 6: 140}, memory=6500) == [4, 6, 6]


def test_there_is_an_upper_limit(chosen):
    assert chosen({4: 1, 8: 2, 16: 4, 32: 8, 64: 16}) == [4, 8, 16, 32, 64, 64]


def test_other_runs_are_measured_anew_within_what_memory_lasted_for(chosen):
    width = Width(GPU)
    width.limit(10)
    assert chosen({4: 1, 8: 2, 10: 3}, width=width) == [4, 8, 10, 10]
    width.restart()
    assert width.now == 4


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
    assert [t.closing["weights"] for t in refilled] == [t.closing["weights"] for t in alone]


# --- out of memory --------------------------------------------------------------------------------


def test_out_of_memory_in_a_step_halves_the_lanes_and_changes_no_number(
    tiny, elsewhere, monkeypatch
):
    runs = [tiny(epochs=3, seed=seed) for seed in range(4)]
    expected = elsewhere(*runs)
    step, moved = Lane.step, set()

    def out_of_memory(lane):
        if len({*moved, lane.run.id}) == 4:
            moved.clear()
            raise torch.OutOfMemoryError
        moved.add(lane.run.id)
        step(lane)
        if lane.taken + 1 == lane.steps and lane.epoch + 1 == lane.run.recipe.epochs:
            moved.discard(lane.run.id)

    monkeypatch.setattr(Lane, "step", out_of_memory)
    with pytest.warns(UserWarning, match="Out of memory with 4 lanes: 2 from now"):
        results = train(runs, lanes=4)
    assert [t.closing["weights"] for t in results] == [t.closing["weights"] for t in expected]
