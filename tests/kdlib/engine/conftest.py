"""Fixtures of the tests on a GPU."""

import shutil
from itertools import count

import pytest
import torch
from gpu_trainers import PARAPHRASER, SAME, WIDER

from kdlib import load_data, train
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.trainer import Trainer


@pytest.fixture
def same_kernels_every_time(monkeypatch):
    monkeypatch.setenv("KDLIB_DETERMINISTIC", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def another_home(tmp_path, monkeypatch):
    """Change to a copy of the present store; later runs are trained in the copy alone."""
    number = count()

    def move():
        here, there = tmp_path / "home", tmp_path / f"home{next(number)}"
        if here.exists():
            shutil.copytree(here, there)
        monkeypatch.setenv("KDLIB_HOME", str(there))

    return move


@pytest.fixture
def start(gpu, another_home):
    """A trainer at the start of its first epoch, in a store of its own."""

    def make(run, capture, graph=None):
        another_home()
        images = load_data(run.data, "train", gpu).first(run.images)
        trainer = Trainer(
            run, images, load_data(run.data, "test", gpu), CachePool(), capture=capture
        )
        trainer.begin_epoch()
        assert (trainer.graph is not None) == (capture if graph is None else graph)
        return trainer

    return make


@pytest.fixture
def teachers(gpu):
    """The trained teachers of ``gpu_trainers.METHODS``, and the lender of a paraphraser."""
    return train([WIDER, SAME, PARAPHRASER], device=gpu)
