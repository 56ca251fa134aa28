"""Records of trained runs: their content, damage, and clones that have only records."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import final_weights, truncate

from kdlib import KD, store, train
from kdlib.engine import pool as pool_module
from kdlib.errors import StoreError


@pytest.fixture
def trained(tiny):
    return train([tiny()])[0]


def record_of(run):
    return store.folder(run) / "record.jsonl"


def test_a_record_describes_the_run_and_its_environment(trained):
    lines = record_of(trained.run).read_text().splitlines()
    head, *rows, last = map(json.loads, lines)
    assert (head["id"], head["run"]) == (trained.run.id, trained.run.description)
    assert rows == trained.rows
    assert last == {"summary": trained.summary}
    environment = trained.summary["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["precision"] == "float32"
    assert environment["peak_memory_mb"] > 0


def test_a_trained_run_has_rows_a_log_and_a_summary(trained):
    assert [row["epoch"] for row in trained.rows] == [1, 2]
    assert trained.log.to_dict("records") == trained.rows
    assert trained.final == trained.rows[-1] | {"test_error": 100 - trained.rows[-1]["test_top1"]}
    assert trained.epochs == trained.epochs_used == 2
    assert trained.in_store
    ended_early = replace(trained, summary=trained.summary | {"stopped_after": 1.25})
    assert (ended_early.epochs, ended_early.epochs_used) == (2, 1.25)


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
def test_a_damaged_record_is_named_and_its_run_is_trained_again(trained, damage):
    path = record_of(trained.run)
    damage(path)
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        again = train([trained.run])[0]
    assert final_weights(again) == final_weights(trained)
    assert store.find_record(trained.run).summary == again.summary


def test_a_record_of_another_run_is_ignored(tiny, trained):
    other = tiny(seed=1)
    store.folder(other).mkdir()
    shutil.copy(record_of(trained.run), record_of(other))
    with pytest.warns(UserWarning, match="describes another run"):
        assert store.find_record(other) is None
    with (
        pytest.warns(UserWarning, match="describes another run"),
        pytest.raises(StoreError, match="no record of"),
    ):
        store.require_record(other)


def test_weights_that_the_record_does_not_name_are_not_used_but_trained_again(trained):
    other = replace(trained, summary=trained.summary | {"weights": {"2": "0123"}})
    with pytest.raises(StoreError, match="does not hold the weights that the record"):
        other.model()
    store.write_record(trained.run, trained.rows, other.summary)
    again = train([trained.run], weights=True)[0]
    assert again.summary["weights"] == trained.summary["weights"]


# --- records without a store ----------------------------------------------------------------------


def test_a_clone_finds_committed_records(tiny, only_records, monkeypatch):
    teacher, student = train([tiny(), tiny(method=KD(tiny()), seed=1)])
    only_records(teacher, student)
    monkeypatch.setattr(pool_module, "Trainer", None)
    found = train([student.run, teacher.run])
    assert [f.rows for f in found] == [student.rows, teacher.rows]
    assert [f.summary for f in found] == [student.summary, teacher.summary]
    assert not any(f.in_store for f in found)


def test_a_damaged_committed_record_is_named_and_ignored(trained, only_records, tmp_path):
    only_records(trained)
    (path,) = (tmp_path / "results").glob("*/records/*.jsonl")
    truncate(path)
    with pytest.warns(UserWarning, match=f"{path} is damaged"):
        assert final_weights(train([trained.run])[0]) == final_weights(trained)
