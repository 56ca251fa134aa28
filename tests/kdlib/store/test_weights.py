"""Weights in the store: damaged, missing and replaced files, and a full disk."""

import contextlib
import errno
import os
import resource

import pytest
import torch
from helpers import final_weights, flip_a_bit, garble, truncate
from torch import nn

from kdlib import KD, build_model, store, train
from kdlib.errors import StoreError


@pytest.fixture
def trained(tiny):
    return train([tiny()])[0]


def assert_same_weights(again, before):
    assert store.fingerprint(again.model().state_dict()) == final_weights(before)


def test_a_loaded_model_is_frozen_and_in_eval_mode(trained):
    model = trained.model()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_holds_the_student_and_the_auxiliary_modules(tiny):
    modules = nn.ModuleDict({"student": nn.Linear(2, 3), "peer": nn.Linear(4, 5)})
    found = store.save_modules(tiny(), 1, modules.state_dict())
    tensors = store.load_modules(tiny(), 1, expected=found)
    assert tensors.keys() == modules.state_dict().keys()
    assert all(torch.equal(tensors[n], t) for n, t in modules.state_dict().items())
    with pytest.raises(StoreError, match="does not hold the expected weights"):
        store.load_modules(tiny(), 1, expected="0123")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, garble])
def test_a_damaged_checkpoint_is_named_and_trained_again_on_request(trained, damage):
    path = store.weights_path(trained.run, 2)
    damage(path)
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        trained.model()
    assert_same_weights(train([trained.run], weights=True)[0], trained)


def test_no_student_learns_from_a_damaged_teacher(tiny, trained):
    flip_a_bit(store.weights_path(trained.run, 2))
    student = tiny(method=KD(trained.run), seed=1)
    with contextlib.suppress(StoreError):  # the first call may end when it finds the damage
        train([student])
    again = train([student])[0]
    assert again.summary["teachers"] == {f"{trained.run.id}@2": final_weights(trained)}


def test_a_missing_checkpoint_is_named_and_trained_again_on_request(trained):
    with pytest.raises(StoreError, match=r"epoch-0001\.safetensors does not exist"):
        trained.model(1)
    store.weights_path(trained.run, 2).unlink()
    with pytest.raises(StoreError, match=r"does not exist.*weights=True"):
        trained.model()
    assert_same_weights(train([trained.run], weights=True)[0], trained)


def test_the_last_linear_layer_of_a_checkpoint_has_the_number_of_classes(tiny):
    """LeNet has three linear layers."""
    run = tiny(data="mnist", model="lenet")
    network = build_model("lenet", classes=7, channels=1, seed=0)
    found = store.save_modules(run, 1, nn.ModuleDict({"student": network}).state_dict())
    model, loaded = store.load_checkpoint(run, 1)
    assert loaded == found
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def short_files():
    """Let no file be longer than 1 kB; nothing else may be written inside, no report either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_without_space_leave_the_old_file(tiny):
    run, path = tiny(), store.weights_path(tiny(), 1)
    store.save_tensors(path, {"a": torch.zeros(3)}, {})
    with short_files(), pytest.raises(StoreError, match="epoch-0001"):
        store.save_tensors(path, {"a": torch.zeros(3000)}, {})
    assert store.load_tensors(path)[0]["a"].shape == (3,)
    assert list(store.folder(run).iterdir()) == [path]


def test_a_store_that_cannot_be_made_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "folder"  # nobody can make it, not even root
    monkeypatch.setenv("KDLIB_HOME", str(folder))
    with pytest.raises(StoreError, match=f"Cannot write {folder}.*KDLIB_HOME"):
        train([tiny()])


def test_a_store_that_cannot_be_locked_is_named(tiny, monkeypatch):
    def refuse(lock):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), lock.lock_file)

    monkeypatch.setattr(store.weights.FileLock, "_acquire", refuse)
    with pytest.raises(StoreError, match=r"Cannot write .*KDLIB_HOME"):
        train([tiny()])
