"""Committed runs are trained again, from their records alone, and compared bit by bit."""

import json
import re
import shutil
import sys
import time

import pytest
import torch

from kdbook import verify as verify_module
from kdbook.cli import run_all
from kdbook.cli import verify as verify_program
from kdbook.cli.notebooks import ROOT
from kdbook.recorded import CLASSES, Records, rebuild
from kdbook.verify import as_recorded, repeats
from kdlib import KD, Penalised, files, store, train
from kdlib.engine.train import CACHES

EXHIBIT, PROFILE = "kr/table1", "course"


@pytest.fixture
def verify(monkeypatch, capsys, fresh_data):
    """Call ./run_all.sh --verify in this process: the exit status, and what it prints."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run_all", "--verify", *words])
        monkeypatch.setattr(run_all.signal, "signal", lambda *arguments: None)
        monkeypatch.setattr(verify_program, "STARTED", time.monotonic())
        status = run_all.main()
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.fixture
def commit(tmp_path):
    """Train runs, put the records of some into the results of an exhibit, and empty the store."""

    def make(runs, recorded=None, exhibit=EXHIBIT):
        trained = train(runs)
        folder = files.results() / PROFILE
        committed = [t for t in trained if recorded is None or t.run in recorded]
        for result in committed:
            store.copy_record(result, folder / "records")
        about = {"exhibit": exhibit, "runs": [t.run.id for t in committed]}
        files.write_atomic(folder / exhibit / "table.md.json", json.dumps(about))
        shutil.rmtree(files.home())
        CACHES.clear()
        return [folder / "records" / f"{t.run.id}.jsonl" for t in committed]

    return make


@pytest.fixture
def family(tiny):
    """A teacher that keeps its first epoch and all logits, and its student."""
    teacher = tiny(keep=[1], save_logits=True)
    return [teacher, tiny(seed=1, method=KD(teacher))]


def alter(path, line, key, value):
    """Change one value of a record, such as a row of its log (line 1 is epoch 1)."""
    lines = [*map(json.loads, path.read_text().splitlines())]
    part = lines[line].get("summary", lines[line])
    part[key] = value(part[key])
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")


# --- equal ----------------------------------------------------------------------------------------


def test_a_run_and_its_teacher_are_trained_in_an_empty_store_and_equal_in_every_bit(
    verify, commit, family, epochs_trained
):
    commit(family)
    epochs_trained.clear()
    teacher, student = family
    status, printed = verify(student.id)
    assert status == 0, printed
    assert epochs_trained == [(run.id, epoch) for run in family for epoch in (1, 2)]
    assert f"ancestor {teacher}" in printed
    assert "Trained again: 2 recorded runs, 2 equal in every bit." in printed
    assert "the log is equal in every bit: 2 epochs of 7 columns\n" in printed
    assert "the weights after epoch 1, 2 are equal in every bit\n" in printed
    assert "1 thread, float32" in printed
    assert not files.home().exists()  # the reader's store is not touched


def test_threads_and_precision_are_those_of_the_record(verify, commit, tiny, monkeypatch):
    monkeypatch.setenv("KDLIB_PRECISION", "bfloat16")
    torch.set_num_threads(2)
    commit([tiny(epochs=1, batch=64)])  # few steps: two threads are slow on a busy machine
    torch.set_num_threads(1)
    monkeypatch.setenv("KDLIB_PRECISION", "float32")
    status, printed = verify(EXHIBIT)
    assert status == 0, printed
    assert "2 threads, bfloat16" in printed
    assert torch.get_num_threads() == 1


def test_a_teacher_without_a_record_is_trained_as_well(verify, commit, family):
    commit(family, recorded=family[1:])
    status, printed = verify("--profile", PROFILE)
    assert status == 0, printed
    assert f"ancestor {family[0]}\n    no committed record" in printed
    assert "Trained again: 1 recorded run, 1 equal in every bit." in printed


def test_all_takes_every_run_and_each_only_once(verify, commit, family, tiny, epochs_trained):
    commit([*family, tiny(seed=2, method=KD(family[0]))])
    epochs_trained.clear()
    status, printed = verify("all")
    assert status == 0
    assert "Trained again: 3 recorded runs, 3 equal in every bit." in printed
    assert len(epochs_trained) == len({*epochs_trained}) == 6


def test_a_choice_can_be_repeated_and_is_short(verify, commit, tiny):
    commit([tiny(epochs=epochs, seed=seed) for epochs in (1, 9) for seed in range(3)])
    choices = {verify("--dry-run", "--seed", f"{seed}")[1] for seed in range(9)}
    assert len({text.partition("would train")[2] for text in choices}) == 3
    assert all(": 1 epoch, " in text for text in choices)
    assert verify("--dry-run", "--seed", "3") == verify("--dry-run", "--seed", "3")


def test_a_short_time_is_enough_for_some_runs_only(verify, commit, tiny):
    (short, *longer) = commit([tiny(), tiny(epochs=3), tiny(epochs=4)])
    for path in longer:
        alter(path, -1, "seconds", lambda seconds: 9999)
    alter(short, -1, "seconds", lambda seconds: 1)
    for seed in range(20):  # where the first choice is the short run
        if short.stem in verify("--dry-run", "--seed", f"{seed}")[1]:
            break
    status, printed = verify("--minutes", "5", "--seed", f"{seed}")
    assert status == 0, printed
    assert "There was no time for 2 of 3 chosen runs." in printed
    assert "Trained again: 1 recorded run, 1 equal in every bit." in printed


# --- different ------------------------------------------------------------------------------------


def test_an_altered_log_is_reported_with_its_epoch(verify, commit, tiny):
    (path,) = commit([tiny(epochs=3)])
    alter(path, 2, "train_ce", lambda value: value + 1e-3)
    status, printed = verify(EXHIBIT)
    assert status == 1
    assert "DIFFERENT log since epoch 2 of 3, at most train_ce by 0.001\n" in printed
    assert "the weights after epoch 3 are equal" in printed
    assert "1 differ on a machine with the same description" in printed


def test_altered_weights_are_reported_with_their_epoch(verify, commit, tiny):
    (path,) = commit([tiny(keep=[1])])
    alter(path, -1, "weights", lambda weights: weights | {"1": "0" * 16})
    status, printed = verify(EXHIBIT)
    assert status == 1
    assert "the log is equal in every bit: 2 epochs" in printed
    assert "the weights after epoch 2 are equal" in printed
    assert "DIFFERENT weights after epoch 1\n" in printed


def test_weights_are_not_compared_where_their_hash_was_over_the_curve_as_well(verify, commit, tiny):
    (path,) = commit([tiny(method=Penalised(), model="lenet")])
    *rows, last = map(json.loads, path.read_text().splitlines())
    del last["summary"]["curve"]  # as in records of an earlier version
    last["summary"]["weights"] = {"2": "0" * 16}
    path.write_text("\n".join(map(json.dumps, [*rows, last])) + "\n")
    status, printed = verify(EXHIBIT)
    assert status == 0, printed
    assert "the weights were not compared" in printed
    assert "Of 1 of them only the log was compared." in printed


def test_other_weights_of_a_teacher_are_reported(verify, commit, family):
    path = commit(family)[1]
    alter(path, -1, "teachers", lambda teachers: dict.fromkeys(teachers, "0" * 16))
    status, printed = verify(family[1].id)
    assert status == 1
    assert "DIFFERENT in the summary: teachers" in printed


def test_a_difference_on_another_machine_is_expected(verify, commit, family):
    paths = commit(family)
    alter(paths[0], -1, "environment", lambda about: about | {"torch": "1.0"})
    alter(paths[1], 1, "train_loss", lambda value: value + 1)
    status, printed = verify(family[1].id)
    assert status == 3
    assert "torch 1.0" in printed
    assert "1 differ where that is expected: this machine has another description" in printed


def test_equal_bits_on_another_machine_count(verify, commit, tiny):
    (path,) = commit([tiny()])
    alter(path, -1, "environment", lambda about: about | {"torch": "1.0"})
    assert verify(EXHIBIT)[0] == 0


def test_a_gpu_need_not_repeat_its_bits():
    about = {"device": "x86_64 CPU", "threads": 1, "precision": "float32", "torch": "2.15.0"}
    assert repeats({"environment": about}, about | {"instructions": "AVX2", "compiled": False})
    gpu = about | {"device": "NVIDIA H200"}
    assert not repeats({"environment": gpu}, gpu)
    two = {"environment": about, "earlier_environments": [about | {"threads": 2}]}
    assert not repeats(two, about)


@pytest.mark.parametrize(
    ("precision", "labels", "asked"),
    [
        ("float32", None, "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", ""),
    ],
)
def test_mixed_precision_on_a_cpu_is_left_to_the_engine(precision, labels, asked):
    about = {"device": "arm64 CPU", "threads": 1, "precision": precision, "label_precision": labels}
    with as_recorded(about) as device:
        assert device.type == "cpu"
        assert verify_module.os.environ["KDLIB_PRECISION"] == asked


# --- what cannot be verified ----------------------------------------------------------------------


def test_an_altered_description_is_refused(verify, commit, tiny):
    (path,) = commit([tiny()])
    path.write_text(path.read_text().replace('"images": 128', '"images": 127'))
    status, printed = verify(EXHIBIT)
    assert status == 2
    assert f"{path} cannot be trained again: it describes the run" in printed


def test_a_missing_data_set_is_named(verify, commit, tiny, photos, tmp_path):
    folder = photos(count=40)
    commit([tiny(data=f"folder:{folder}")])
    status, printed = verify(EXHIBIT)
    assert status == 2
    assert "needs the image folder 'photos' with the hash" in printed
    assert "Add --data NAME=folder:PATH" in printed
    other = photos("other")
    status, printed = verify(EXHIBIT, "--data", f"cifar10=folder:{other}")
    assert status == 2
    assert "Given: other@" in printed
    status, printed = verify(EXHIBIT, "--data", f"cifar10=folder:{folder}")
    assert status == 0, printed
    assert not files.home().exists()


def test_data_that_can_be_downloaded_are_named(verify, commit, tiny, monkeypatch):
    commit([tiny()])
    monkeypatch.setattr(verify_module, "split_name", lambda name: ("mnist", ""))
    status, printed = verify(EXHIBIT)
    assert status == 2
    assert "python -m kdlib.data mnist" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kr/table2"], "kr/table2 has no records in .*Exhibits with records: kr/table1."),
        (["kr/tabel1"], "There is no exhibit or recorded run 'kr/tabel1'. Did you mean kr/table1"),
        (["--profile", "paper"], "There is no folder of results with records 'paper'"),
    ],
)
def test_names_without_records_are_refused(verify, commit, tiny, words, message):
    commit([tiny()])
    status, printed = verify(*words)
    assert status == 2
    assert re.search(message, printed), printed


def test_results_without_records_are_refused(verify):
    status, printed = verify()
    assert status == 2
    assert "has no folder with records" in printed


def test_records_of_a_smoke_run_are_verified_only_if_named(verify, commit, tiny):
    commit([tiny()])
    (files.results() / PROFILE).rename(files.results() / "smoke+digits")
    assert verify()[0] == 2
    assert verify("--profile", "smoke")[0] == 0


# --- records --------------------------------------------------------------------------------------


def test_committed_records_are_of_exhibits(monkeypatch):
    monkeypatch.setenv("KDLIB_RESULTS", str(ROOT / "results"))
    records = Records("paper")
    assert {"kr/figure4", "kr/figure5"} <= records.by_exhibit.keys()
    assert all(records.by_id[i].run.id == i for ids in records.by_exhibit.values() for i in ids)


def test_a_class_that_is_not_kdlibs_is_not_made():
    assert "KD" in CLASSES
    with pytest.raises(ValueError, match=r"kdlib has no os\.system"):
        rebuild({"kind": "os.system", "command": "ls"})
