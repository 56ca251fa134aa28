import contextlib
import errno
import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import flip_a_bit, garble, truncate

from kdlib import KD, CrossEntropy, Recipe, Run, files, measure, store, train
from kdlib.engine import pool as pool_module
from kdlib.errors import StoreError, UnknownName
from kdlib.runs import describe

RECIPE = Recipe(epochs=3, batch=32, lr=0.1)
RUN = Run("digits", "resnet8", RECIPE)


def weights_of(trained):
    return trained.summary["weights"]


# --- descriptions and ids -------------------------------------------------------------------------


def test_the_id_of_a_run_is_the_one_it_always_had():
    """Fails where a change would orphan every stored run: then ENGINE_VERSION is to be raised."""
    assert Run("digits", "resnet8", Recipe(epochs=1, batch=32, lr=0.1)).id == "5f710f0d1877"


@pytest.mark.parametrize(
    "other",
    [
        replace(RUN, data="mnist"),
        replace(RUN, model="resnet14"),
        replace(RUN, seed=1),
        replace(RUN, images=100),
        replace(RUN, method=KD(RUN)),
        replace(RUN, recipe=replace(RECIPE, epochs=4)),
        replace(RUN, recipe=replace(RECIPE, batch=16)),
        replace(RUN, recipe=replace(RECIPE, lr=0.2)),
        replace(RUN, recipe=replace(RECIPE, milestones=(2,))),
        replace(RUN, recipe=replace(RECIPE, decay=0.5)),
        replace(RUN, recipe=replace(RECIPE, momentum=0.8)),
        replace(RUN, recipe=replace(RECIPE, weight_decay=1e-4)),
    ],
    ids=lambda run: json.dumps(run.description)[-40:],
)
def test_every_part_of_a_run_changes_its_id(other):
    assert other.id != RUN.id
    assert other != RUN


def test_every_part_of_a_method_and_of_its_teacher_changes_the_id():
    method = KD(RUN)
    changes = [
        method,
        replace(method, teacher=replace(RUN, seed=1)),
        replace(method, teacher=replace(RUN, method=KD(RUN))),
        replace(method, at=1),
        replace(method, temperature=4.0),
        replace(method, ce_weight=0.1),
        replace(method, kd_weight=0.9),
    ]
    assert len({replace(RUN, method=change).id for change in changes}) == len(changes)


def test_what_is_kept_is_not_part_of_a_run():
    kept = replace(RUN, keep=(1, 2))
    assert kept == RUN
    assert kept.id == RUN.id
    assert replace(RUN, method=KD(kept)).id == replace(RUN, method=KD(RUN)).id


def test_equal_runs_have_equal_ids():
    ones = [Run("digits", "resnet8", Recipe(epochs=3, batch=32, lr=one)) for one in (1, 1.0)]
    assert ones[0] == ones[1]
    assert ones[0].id == ones[1].id


def test_defaults_are_left_out_of_a_description():
    """So that a new field with a default changes no id."""
    explicit = Run(
        "digits", "resnet8", Recipe(3, 32, 0.1, (), 0.1, 0.9, 5e-4), CrossEntropy(), seed=0
    )
    assert explicit.id == RUN.id
    assert describe(RUN) == {
        "kind": "Run",
        "data": "digits",
        "model": "resnet8",
        "recipe": {"kind": "Recipe", "epochs": 3, "batch": 32, "lr": 0.1},
    }


def test_a_description_is_the_whole_ancestry():
    middle = replace(RUN, model="resnet14", method=KD(RUN, at=2))
    description = replace(RUN, seed=1, method=KD(middle)).description
    assert description["method"]["teacher"]["method"]["teacher"] == RUN.description
    assert description["method"]["teacher"]["method"]["at"] == 2
    assert json.loads(json.dumps(description)) == description


def test_a_folder_of_images_is_described_by_its_content(photos, tmp_path):
    folder = photos()
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "photos")
    runs = [replace(RUN, data=f"folder:{place}") for place in (folder, moved)]
    assert runs[0].id == runs[1].id
    assert str(tmp_path) not in json.dumps(runs[0].description)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "digit"}, UnknownName, "digits"),
        ({"model": "resnet9"}, UnknownName, "resnet"),
        ({"keep": (4,)}, ValueError, r"\[4\] to keep are not within 3 epochs"),
        ({"keep": (0,)}, ValueError, r"\[0\] to keep"),
    ],
)
def test_a_run_that_cannot_be_is_refused_at_once(change, error, message):
    with pytest.raises(error, match=message):
        replace(RUN, **change)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch": 0}])
def test_a_recipe_without_epochs_or_images_is_refused(change):
    with pytest.raises(ValueError, match="at least one"):
        replace(RECIPE, **change)


# --- writing --------------------------------------------------------------------------------------


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_full_disk_leaves_what_stood_there(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    if where == "replace":
        monkeypatch.setattr(os, "replace", no_space)
    else:
        write = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda p, b: (write(p, b[:1]), no_space()))
    with pytest.raises(StoreError, match=f"Cannot write {path}: No space left.*free some space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def short_files():
    """Files can be no longer than 1 kB, by the operating system's own limit: pytest's output, too,
    so that no report may be written inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_find_no_space_leave_what_stood_there(tiny):
    run = tiny()
    store.save_weights(run, 1, {"a": torch.zeros(3)})
    with short_files(), pytest.raises(StoreError, match="epoch-0001"):
        store.save_weights(run, 1, {"a": torch.zeros(3000)})
    assert store.load_tensors(store.weights_path(run, 1))[0]["a"].shape == (3,)
    assert [path.name for path in store.folder(run).iterdir()] == ["epoch-0001.safetensors"]


def test_a_write_broken_off_by_ctrl_c_leaves_what_stood_there(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def broken_off():
        with files.replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def unwritable(tmp_path):
    """A folder that nobody can make, not even root."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "folder"


def test_a_store_that_cannot_be_made_says_what_to_do(tiny, unwritable, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(unwritable))
    with pytest.raises(StoreError, match=f"Cannot write {unwritable}.*KDLIB_HOME"):
        train([tiny()])


def test_a_store_that_cannot_be_written_says_what_to_do(tiny, monkeypatch):
    def refused(lock):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), lock.lock_file)

    monkeypatch.setattr(store.FileLock, "_acquire", refused)
    with pytest.raises(StoreError, match=r"Cannot write .*KDLIB_HOME"):
        train([tiny()])


def test_a_disk_that_fills_while_training_says_so_and_the_run_goes_on_later(tiny, monkeypatch):
    run = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(StoreError, match="free some space"):
            train([run])
    assert store.find_record(run) is None
    assert len(train([run])[0].log) == 2


# --- damage ---------------------------------------------------------------------------------------


def lines_of(path):
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 10),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_text("".join(lines_of(path)[:-1])),
        lambda path: path.write_text("".join(lines_of(path)[:1] + lines_of(path)[2:])),
        lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
        lambda path: path.write_text("[1]\n[2]\n"),
    ],
    ids=["cut short", "empty", "no last line", "an epoch missing", "no text", "other JSON"],
)
def test_a_damaged_record_is_named_and_its_run_trained_again(tiny, damage):
    run = tiny()
    before = train([run])[0]
    path = store.folder(run) / "record.jsonl"
    damage(path)
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        after = train([run])[0]
    assert weights_of(after) == weights_of(before)
    assert weights_of(store.find_record(run)) == weights_of(before)


def test_a_record_of_another_run_is_not_believed(tiny):
    run, other = tiny(), tiny(seed=1)
    train([run])
    store.folder(other).mkdir()
    shutil.copy(store.folder(run) / "record.jsonl", store.folder(other) / "record.jsonl")
    with pytest.warns(UserWarning, match="describes another run"):
        assert store.find_record(other) is None


damages = pytest.mark.parametrize("damage", [truncate, flip_a_bit, garble])


@damages
def test_a_damaged_checkpoint_is_named(tiny, damage):
    trained = train([tiny()])[0]
    path = store.weights_path(trained.run, 2)
    damage(path)
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        trained.model()


@damages
def test_training_again_mends_a_damaged_checkpoint(tiny, damage):
    """As the message promises."""
    trained = train([tiny()])[0]
    damage(store.weights_path(trained.run, 2))
    with pytest.raises(StoreError, match="damaged"):
        trained.model()
    again = train([trained.run], weights=True)[0]
    assert store.fingerprint(again.model().state_dict()) == weights_of(trained)["2"]


@damages
def test_no_student_learns_from_a_damaged_teacher(tiny, damage):
    teacher = train([tiny()])[0]
    damage(store.weights_path(teacher.run, 2))
    student = tiny(method=KD(teacher.run), seed=1)
    with contextlib.suppress(StoreError):  # the first call may end with finding the damage
        train([student])
    trained = train([student])[0]
    assert trained.summary["teachers"] == {f"{teacher.run.id}@2": weights_of(teacher)["2"]}


def test_a_checkpoint_that_is_not_there_is_named(tiny):
    trained = train([tiny()])[0]
    with pytest.raises(StoreError, match=r"epoch-0001\.safetensors is not there"):
        trained.model(1)


def test_weights_that_were_removed_are_made_again_on_request(tiny):
    trained = train([tiny()])[0]
    store.weights_path(trained.run, 2).unlink()
    with pytest.raises(StoreError, match=r"is not there.*weights=True"):
        trained.model()
    again = train([trained.run], weights=True)[0]
    assert store.fingerprint(again.model().state_dict()) == weights_of(trained)["2"]


def test_a_loaded_model_is_frozen_and_in_eval_mode(tiny):
    model = train([tiny()])[0].model()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- records without a store ----------------------------------------------------------------------


def test_committed_records_are_found_without_a_store(tiny, only_records, monkeypatch):
    teacher, student = train([tiny(), tiny(method=KD(tiny()), seed=1)])
    only_records(teacher.run, student.run)
    monkeypatch.setattr(pool_module, "Trainer", None)
    found = train([student.run, teacher.run])
    assert found[0].log.equals(student.log)
    assert found[1].summary == teacher.summary


def test_a_student_of_a_committed_teacher_trains_that_teacher_first(tiny, only_records):
    teacher = train([tiny()])[0]
    only_records(teacher.run)
    student = train([tiny(method=KD(teacher.run), seed=1)])[0]
    assert student.summary["teachers"] == {f"{teacher.run.id}@2": weights_of(teacher)["2"]}


def test_weights_of_a_committed_run_are_made_on_request(tiny, only_records):
    trained = train([tiny()])[0]
    only_records(trained.run)
    with pytest.raises(StoreError, match=r"is not there"):
        train([trained.run])[0].model()
    again = train([trained.run], weights=True)[0]
    assert store.fingerprint(again.model().state_dict()) == weights_of(trained)["2"]


def test_a_damaged_committed_record_is_passed_over(tiny, only_records, tmp_path):
    trained = train([tiny()])[0]
    only_records(trained.run)
    (path,) = (tmp_path / "results").glob("*/records/*.jsonl")
    truncate(path)
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        assert weights_of(train([trained.run])[0]) == weights_of(trained)


def test_a_record_says_what_it_was_made_with(tiny):
    run = tiny()
    summary = train([run])[0].summary
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["environment"]["precision"] == "float32"
    assert summary["environment"]["peak_memory_mb"] > 0
    head = json.loads(lines_of(store.folder(run) / "record.jsonl")[0])
    assert (head["id"], head["run"]) == (run.id, run.description)


# --- measurements ---------------------------------------------------------------------------------

calls = []


def count_weights(trained, times=1):
    calls.append(times)
    return pd.DataFrame({"times": [times], "weights": [trained.model().head[2].bias.numel()]})


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def test_a_measurement_is_made_once(tiny):
    trained = train([tiny()])[0]
    first = measure(trained, count_weights, times=3)
    assert first.to_dict("list") == {"times": [3], "weights": [10]}
    assert measure(train([tiny()])[0], count_weights, times=3).equals(first)
    assert calls == [3]


def test_a_measurement_is_made_anew_for_other_options_and_weights(tiny):
    trained, other = train([tiny(), tiny(seed=1)])
    measure(trained, count_weights, times=3)
    measure(trained, count_weights, times=4)
    measure(other, count_weights, times=3)
    assert calls == [3, 4, 3]


def test_weights_that_the_record_does_not_tell_of_are_not_used(tiny):
    trained = train([tiny()])[0]
    moved = replace(trained, summary=trained.summary | {"weights": {"2": "0123"}})
    with pytest.raises(StoreError, match="not the weights that the record"):
        moved.model()


def test_a_record_of_other_weights_is_trained_again_and_only_once(tiny):
    run = tiny()
    trained = train([run])[0]
    other = trained.summary | {"weights": {"2": "0123"}}
    store.write_record(run, trained.log.to_dict("records"), other)
    assert train([run], weights=True)[0].summary["weights"] == trained.summary["weights"]


def test_a_damaged_measurement_is_made_anew(tiny):
    trained = train([tiny()])[0]
    first = measure(trained, count_weights)
    (path,) = store.folder(trained.run).glob("measure-*.json")
    truncate(path)
    assert measure(trained, count_weights).equals(first)
    assert calls == [1, 1]


def test_committed_measurements_are_found_without_a_store(tiny, only_records):
    trained = train([tiny()])[0]
    first = measure(trained, count_weights)
    only_records(trained.run)
    assert measure(train([trained.run])[0], count_weights).equals(first)
    assert calls == [1]
