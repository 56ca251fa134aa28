"""Small things that many tests need; every test has a store and results of its own."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib import Recipe, Run
from kdlib.data import datasets
from kdlib.engine.train import BANKS

# Networks as small as these gain nothing from a second thread and lose much where a core is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    for variable, folder in (("HOME", "home"), ("RESULTS", "results"), ("DATA", "data")):
        monkeypatch.setenv(f"KDLIB_{variable}", str(tmp_path / folder))
    monkeypatch.setenv("KDLIB_PROGRESS", "quiet")
    monkeypatch.delenv("KDLIB_LOG", raising=False)
    monkeypatch.setattr(datasets, "_folders", {})
    BANKS.clear()


@pytest.fixture
def fresh_data():
    """No data set is remembered from before, or for later."""
    datasets._load.cache_clear()
    yield datasets._load.cache_clear
    datasets._load.cache_clear()


@pytest.fixture
def tiny():
    """A run of a fraction of a second: ``tiny(epochs, **what differs)``."""

    def make(epochs=2, batch=24, lr=0.05, model="resnet8-x0.25", data="digits", **others):
        recipe = {"milestones", "decay", "momentum", "weight_decay"} & others.keys()
        settings = {name: others.pop(name) for name in recipe}
        return Run(data, model, Recipe(epochs, batch, lr, **settings), images=128, **others)

    return make


@pytest.fixture
def photos(tmp_path):
    """A folder of random images: ``photos(name, count, seed)``."""

    def make(name="photos", count=4, seed=0):
        random = np.random.default_rng(seed)
        for split in ("train", "test"):
            for label in ("cat", "dog"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for k in range(count):
                    pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{k}.png")
        return tmp_path / name

    return make
