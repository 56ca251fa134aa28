"""Fixtures of many tests. Every test has its own store and its own results."""

import numpy as np
import pytest
import torch
from helpers import same_log
from PIL import Image

from kdlib import Recipe, Run, store, train
from kdlib.data import datasets
from kdlib.engine import LogitCache
from kdlib.engine import writer as writer_module
from kdlib.engine.train import CACHES
from kdlib.engine.trainer import Trainer
from kdlib.store import fingerprint

# A second thread gains nothing for such small networks, and costs much on a busy core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Give each test its own store, results and data."""
    for variable, folder in (("HOME", "home"), ("RESULTS", "results"), ("DATA", "data")):
        monkeypatch.setenv(f"KDLIB_{variable}", str(tmp_path / folder))
    monkeypatch.setenv("KDLIB_PROGRESS", "quiet")
    monkeypatch.delenv("KDLIB_LOG", raising=False)
    if not torch.cuda.is_available():  # the same numbers on every CPU
        monkeypatch.setenv("KDLIB_PRECISION", "float32")
    monkeypatch.setattr(datasets, "_folders", {})
    CACHES.clear()


@pytest.fixture
def fresh_data():
    """Forget all loaded data sets before and after the test, and at each call."""
    datasets._load.cache_clear()
    yield datasets._load.cache_clear
    datasets._load.cache_clear()


@pytest.fixture
def tiny():
    """Make a run of a fraction of a second; ``others`` are fields of its Recipe or Run."""

    def make(epochs=2, batch=24, lr=0.05, model="resnet8-x0.25", data="digits", **others):
        names = {"milestones", "decay", "momentum", "weight_decay", "nesterov"} & others.keys()
        recipe = Recipe(epochs, batch, lr, **{name: others.pop(name) for name in names})
        return Run(data, model, recipe, images=128, **others)

    return make


@pytest.fixture
def photos(tmp_path):
    """Make a folder of random images, ``count`` of each class in each split."""

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
    """Train runs in another store, which is empty before the first call."""

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
    """The list of all (run id, epoch) that are trained from now on."""
    trained, begin = [], Trainer.begin_epoch

    def note(trainer):
        trained.append((trainer.run.id, trainer.epoch + 1))
        begin(trainer)

    monkeypatch.setattr(Trainer, "begin_epoch", note)
    return trained


@pytest.fixture
def train_until(monkeypatch):
    """Interrupt the training of ``runs`` when ``run`` has so many epochs."""

    def stop(run, epoch, runs=None):
        end = Trainer.end_epoch

        def stopped(trainer):
            row = end(trainer)
            if trainer.run == run and trainer.epoch == epoch:
                raise KeyboardInterrupt
            return row

        with monkeypatch.context() as patch:
            patch.setattr(writer_module, "SAVING_SHARE", 1e9)  # save after every epoch
            patch.setattr(Trainer, "end_epoch", stopped)
            with pytest.raises(KeyboardInterrupt):
                train(runs or [run])
        assert store.find_record(run) is None
        CACHES.clear()

    return stop


@pytest.fixture
def computed_logits(monkeypatch):
    """The list of all logits that teachers compute from now on for a LogitCache.

    Each is (fingerprint of the teacher, split, image, view).
    """
    computed, names, init, compute = [], {}, LogitCache.__init__, LogitCache._pass

    def name(cache, teacher, images, *dtype):
        init(cache, teacher, images, *dtype)
        # a teacher that another cache has folded has its name already
        names.setdefault(cache.teacher, fingerprint(teacher.state_dict()))

    def note(cache, index, view):
        teacher = names[cache.teacher], cache.images.split
        computed.extend((*teacher, *p) for p in zip(index.tolist(), view.tolist(), strict=True))
        return compute(cache, index, view)

    monkeypatch.setattr(LogitCache, "__init__", name)
    monkeypatch.setattr(LogitCache, "_pass", note)
    return computed


@pytest.fixture
def only_records(tmp_path, monkeypatch):
    """Keep only the committed records of trained runs, as a fresh clone has them."""

    def forget(*results):
        for trained in results:
            store.copy_record(trained, tmp_path / "results" / "course" / "records")
        monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "fresh"))

    return forget


@pytest.fixture
def assert_resumes(tmp_path, elsewhere, train_until, epochs_trained):
    """Check that a run of three epochs, interrupted after two, equals an uninterrupted one."""

    def check(run):
        (expected,) = elsewhere(run)
        train_until(run, 2)
        epochs_trained.clear()
        resumed = train([run])[0]
        assert epochs_trained == [(run.id, 3)]
        for key in ("weights", "teachers", "curve"):
            assert resumed.summary.get(key) == expected.summary.get(key)
        assert same_log(resumed, expected)
        path = store.weights_path(run, 3)
        assert path.read_bytes() == (tmp_path / "elsewhere" / run.id / path.name).read_bytes()

    return check
