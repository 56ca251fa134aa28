"""Small things that many tests need; every test has a store and results of its own."""

import numpy as np
import pytest
import torch
from helpers import same_log
from PIL import Image

from kdlib import Recipe, Run, store, train
from kdlib.data import datasets
from kdlib.engine import LogitCache
from kdlib.engine import trainer as trainer_module
from kdlib.engine.train import CACHES
from kdlib.engine.trainer import Trainer
from kdlib.store import fingerprint

# Networks as small as these gain nothing from a second thread and lose much where a core is busy.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    for variable, folder in (("HOME", "home"), ("RESULTS", "results"), ("DATA", "data")):
        monkeypatch.setenv(f"KDLIB_{variable}", str(tmp_path / folder))
    monkeypatch.setenv("KDLIB_PROGRESS", "quiet")
    monkeypatch.delenv("KDLIB_LOG", raising=False)
    monkeypatch.setattr(datasets, "_folders", {})
    CACHES.clear()


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


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Train in another store, as if nothing had happened before."""

    def train_elsewhere(*runs, **options):
        with monkeypatch.context() as patch:
            patch.setenv("KDLIB_HOME", str(tmp_path / "elsewhere"))
            CACHES.clear()
            results = train(runs, **options)
            CACHES.clear()
        return results

    return train_elsewhere


@pytest.fixture
def epochs_trained(monkeypatch):
    """The list of (run id, epoch) that are trained from now on."""
    trained, begin = [], Trainer.begin_epoch

    def note(lane):
        trained.append((lane.run.id, lane.epoch + 1))
        begin(lane)

    monkeypatch.setattr(Trainer, "begin_epoch", note)
    return trained


@pytest.fixture
def train_until(monkeypatch):
    """Train, but be stopped: ``train_until(run, epoch, runs)``, when the run has so many epochs."""

    def stop(run, epoch, runs=None):
        end = Trainer.end_epoch

        def stopped(lane):
            row = end(lane)
            if lane.run == run and lane.epoch == epoch:
                raise KeyboardInterrupt
            return row

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "SAVING_SHARE", 1e9)  # save every epoch, however short
            patch.setattr(Trainer, "end_epoch", stopped)
            with pytest.raises(KeyboardInterrupt):
                train(runs or [run])
        assert store.find_record(run) is None
        CACHES.clear()

    return stop


@pytest.fixture
def swept(monkeypatch):
    """The list of (teacher's fingerprint, split, image, view) that a bank asks its teacher for."""
    asked, names, init, sweep = [], {}, LogitCache.__init__, LogitCache._sweep

    def name(bank, teacher, images):
        init(bank, teacher, images)
        # one that another bank folded has its name already
        names.setdefault(bank.teacher, fingerprint(teacher.state_dict()))

    def note(bank, index, view):
        teacher = names[bank.teacher], bank.images.split
        asked.extend((*teacher, *p) for p in zip(index.tolist(), view.tolist(), strict=True))
        return sweep(bank, index, view)

    monkeypatch.setattr(LogitCache, "__init__", name)
    monkeypatch.setattr(LogitCache, "_sweep", note)
    return asked


@pytest.fixture
def only_records(tmp_path, monkeypatch):
    """Keep of runs their records, as a fresh clone has them."""

    def forget(*runs):
        for run in runs:
            store.copy_record(run, tmp_path / "results" / "course" / "records")
        monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "fresh"))

    return forget


@pytest.fixture
def assert_resumes(elsewhere, train_until, epochs_trained):
    """That a run of three epochs, stopped after two, ends as one that was never stopped."""

    def check(run):
        (expected,) = elsewhere(run)
        train_until(run, 2)
        epochs_trained.clear()
        resumed = train([run])[0]
        assert epochs_trained == [(run.id, 3)]
        assert resumed.summary["weights"] == expected.summary["weights"]
        assert resumed.summary["teachers"] == expected.summary["teachers"]
        assert same_log(resumed, expected)
        path = store.weights_path(run, 3)
        other = path.parent.parent.parent / "elsewhere" / run.id / path.name
        assert path.read_bytes() == other.read_bytes()

    return check
