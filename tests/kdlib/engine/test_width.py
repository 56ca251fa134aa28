"""How many students train in parallel."""

from types import SimpleNamespace

import pytest
import torch

from kdlib import train
from kdlib.engine import width as width_module
from kdlib.engine.width import Width, asked_parallel

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PLENTY = 10**12


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv("KDLIB_PARALLEL", raising=False)


@pytest.fixture
def widths(monkeypatch):
    """The widths that a GPU tries, then the final one, given the seconds of an epoch at each."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(width_module.time, "perf_counter", lambda: clock.now)

    def run(seconds, memory=PLENTY, slowness=lambda student: 1):
        width, tried = Width(GPU, None), []
        monkeypatch.setattr(width_module, "free_memory", lambda _: memory - 1000 * width.now)
        while width.growing:
            parallel = width.now
            tried.append(parallel)
            width.opened(1000)
            started, clock.now = clock.now, clock.now + 1
            width.epoch_over("begun before the last student", started - 1, parallel)
            for k in range(parallel):
                clock.now = started + seconds[parallel] * slowness(k)
                width.epoch_over(f"run {k}", started, parallel)
        return [*tried, width.now]

    return run


def test_a_cpu_trains_one_student_at_a_time():
    width = Width(CPU, asked_parallel(None))
    assert (width.now, width.growing) == (1, False)


@pytest.mark.parametrize("asked", [3, "3"])
def test_a_number_that_is_asked_for_holds_on_every_device(monkeypatch, asked):
    for device in (CPU, GPU):
        width = Width(device, asked_parallel(asked))
        assert (width.now, width.growing) == (3, False)
    monkeypatch.setenv("KDLIB_PARALLEL", "5")
    assert asked_parallel(None) == 5
    assert asked_parallel(asked) == 3


@pytest.mark.parametrize("asked", ["0", "-1", "many", "2.5"])
def test_an_invalid_number_is_refused(monkeypatch, asked):
    monkeypatch.setenv("KDLIB_PARALLEL", asked)
    with pytest.raises(ValueError, match="KDLIB_PARALLEL"):
        train([])


@pytest.mark.parametrize(
    ("seconds", "options", "expected"),
    [
        ({4: 1, 8: 1.1, 16: 1.3, 32: 2.5}, {}, [4, 8, 16, 32, 32]),
        ({4: 1, 8: 1.1, 16: 2.3}, {}, [4, 8, 16, 8]),  # slower than before
        ({4: 1, 8: 1, 16: 1.9}, {"slowness": lambda k: 1 if k < 4 else 10}, [4, 8, 16, 16]),
        # of 7,500 bytes 4,000 are in use, and nine tenths of the others may be used
        ({4: 1, 7: 1}, {"memory": 7500}, [4, 7, 7]),
        (dict.fromkeys((4, 8, 16, 32, 64), 1), {}, [4, 8, 16, 32, 64, 64]),
    ],
    ids=["gains end", "slower", "larger networks join", "memory", "upper limit"],
)
def test_a_gpu_doubles_the_number_while_that_is_faster(widths, seconds, options, expected):
    assert widths(seconds, **options) == expected


def test_a_number_that_memory_allows_no_more_is_not_tried_again():
    width = Width(GPU, None)
    width.limit(3)
    assert (width.now, width.growing) == (3, False)
    width.limit(5)
    assert width.now == 3
