"""Packs: what goes in, and how training goes on elsewhere."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from found_students import chain as found_student
from helpers import flip_a_bit, garble, same_log, truncate
from packs import NAME, SMOKE, contents_of, here, pack_runs, packed_names, weights_in

from kdbook import pack as pack_module
from kdbook import unpack
from kdbook.exhibits import Exhibit
from kdbook.pack import size_of
from kdbook.packed import INDEX
from kdbook.remaining import epochs_left, unfinished
from kdlib import KD, measure, store, train
from kdlib.errors import StoreError
from kdlib.files import ROOT

# --- going on elsewhere ---------------------------------------------------------------------------


def test_training_goes_on_elsewhere_with_the_same_bits(
    tiny, out, machine, elsewhere, train_until, epochs_trained
):
    teacher = tiny()
    student = tiny(epochs=3, seed=1, method=KD(teacher), keep=(1,))
    (expected,) = elsewhere(student)
    train_until(student, 2)
    line = pack_runs(out, [student], size=20_000)
    assert line.startswith("Packed 2 runs, 1 unfinished")
    machine("second")
    line = unpack.unpack(out)
    assert line.startswith("Merged 1 record, 2 files of weights, 1 state, 0 other files, 0.")
    assert line.endswith(" MB; 0 files already there.")
    assert (unfinished([student]), epochs_left(student)) == ([student], 1)
    epochs_trained.clear()
    (resumed,) = train([student])
    assert epochs_trained == [(student.id, 3)]
    assert same_log(resumed, expected)
    assert resumed.summary["weights"] == expected.summary["weights"]
    assert resumed.summary["weights"].keys() == {"1", "3"}


def test_a_pack_of_a_pack_is_the_same(out, tmp_path, machine, family):
    train(family)
    pack_runs(out, family)
    machine("second")
    unpack.unpack(out)
    pack_runs(tmp_path / "again", family)
    assert contents_of(tmp_path / "again") == contents_of(out)


def test_a_found_student_goes_on_elsewhere(out, machine, epochs_trained):
    item = found_student()
    train([item.search])
    (student,) = unfinished([item])
    pack_runs(out, [item])
    machine("second")
    unpack.unpack(out)
    assert unfinished([item]) == [student]
    epochs_trained.clear()
    assert train([item])[0].run == student
    assert {run for run, _ in epochs_trained} == {student.id}


# --- what goes in ---------------------------------------------------------------------------------


def test_only_weights_that_something_asks_for_go_in(tiny, out, machine, family):
    teacher, student = family
    train(family)
    line = pack_runs(out, family)
    assert weights_in(out) == set()
    assert "Left out: 2 files" in line
    new = tiny(seed=2, method=KD(teacher))
    pack_runs(out, [*family, new])
    assert weights_in(out) == {f"runs/{teacher.id}/epoch-0002.safetensors"}
    machine("second")
    unpack.unpack(out)
    assert unfinished([*family, new]) == [new]
    assert not store.find_record(student).in_store


def parameters(trained):
    import pandas as pd

    return pd.DataFrame({"n": [sum(p.numel() for p in trained.model().parameters())]})


def test_weights_stay_until_their_exhibit_is_rendered(out, machine, family):
    trained = train(family)
    pack_runs(out, family, measured=[NAME])
    assert weights_in(out) == {f"runs/{run.id}/epoch-0002.safetensors" for run in family}
    exhibit = Exhibit(NAME, SMOKE)
    table = measure(trained[1], parameters)
    exhibit.add("Student", "cifar10", trained[1:], lambda t: table.n[0])
    exhibit.record()
    pack_runs(out, family, measured=[NAME])
    assert weights_in(out) == set()
    machine("second")
    unpack.unpack(out)
    assert measure(store.find_record(family[1]), parameters).equals(table)
    assert (exhibit.folder / "table.md").exists()


def test_an_empty_store_is_refused(tiny, out):
    with pytest.raises(StoreError, match="There is nothing to pack"):
        pack_runs(out, [tiny()])
    assert not out.exists()


def test_the_state_of_a_run_in_training_is_left_out(tiny, out, train_until):
    run = tiny()
    train_until(run, 1)
    with store.lock(run):
        line = pack_runs(out, [run])
    assert "states of runs in training now: 1" in line
    assert packed_names(out) == set()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, garble])
def test_damaged_weights_are_not_carried_along(tiny, out, family, damage):
    teacher, _ = family
    train(family)
    new = tiny(seed=2, method=KD(teacher))
    path = store.weights_path(teacher, 2)
    damage(path)
    line = pack_runs(out, [*family, new])
    assert weights_in(out) <= {f"runs/{family[1].id}/epoch-0002.safetensors"}
    assert (str(path) in line) == (damage is flip_a_bit)
    unpack.unpack(out)


# --- parts ----------------------------------------------------------------------------------------


def test_parts_have_at_most_the_size_and_files_are_split(out, family):
    train(family)
    pack_runs(out, family, measured=[NAME], size=10_000)
    index = json.loads((out / INDEX).read_text())
    assert max(entry["size"] for entry in index["files"]) > 10_000
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert max(sizes.values()) == 10_000
    assert len(sizes) == len(index["parts"]) + 1 > 5
    before = contents_of(out)
    pack_runs(out, family, measured=[NAME], size=10_000)
    assert contents_of(out) == before


def test_a_new_pack_replaces_an_old_one_when_it_is_whole(out, family, monkeypatch, machine):
    train(family)
    pack_runs(out, family, measured=[NAME], size=10_000)
    old, wanted = contents_of(out), here()
    monkeypatch.setattr(pack_module, "check_content", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_runs(out, family, size=5_000)
    monkeypatch.undo()
    machine("second")
    unpack.unpack(out)
    assert here() == wanted
    pack_runs(out, family, size=10_000)
    assert contents_of(out).keys() & old.keys() == {INDEX}


def test_an_index_larger_than_a_part_is_refused(out, family):
    train(family)
    with pytest.raises(ValueError, match=r"index.json alone has \d+ bytes: give --parts"):
        pack_runs(out, family, size=100)


@pytest.mark.parametrize(
    ("text", "size"),
    [("15M", 15_000_000), ("1.5g", 1_500_000_000), ("20KB", 20_000), ("70000", 70_000)],
)
def test_sizes(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1M", "M", "15X", "0.1", "7", "many"])
def test_nonsense_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no size. Write .* 15M or 1G"):
        size_of(text)


# --- the programs ---------------------------------------------------------------------------------

NO_JUPYTER = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jupyterlab", "papermill", "snakemake", "nbformat"}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def call(module, *words):
    """Run a program with ``words``, on a machine without Jupyter."""
    command = [sys.executable, "-c", NO_JUPYTER, f"kdbook.{module}", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_programs_move_an_exhibit(out, machine, monkeypatch, capsys, family):
    train(family[:1])
    monkeypatch.setattr(pack_module, "declared_runs", lambda notebook, **parameters: family)
    monkeypatch.setattr(sys, "argv", ["pack", str(out), "--only", NAME, "--parts", "15M"])
    assert pack_module.main() == 0
    assert capsys.readouterr().out.startswith("Packed 2 runs, 1 unfinished, into")
    machine("second")
    done = call("unpack", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Merged 1 record, 1 file of weights, 0 states, 0 other files, ")
    assert unfinished(family) == family[1:]


def test_an_exhibit_that_nobody_has_trained_is_not_packed(out):
    done = call("pack", out, "--only", NAME)
    assert done.returncode == 1
    assert done.stderr.startswith("There is nothing to pack: ")
    assert done.stderr.count("\n") == 1


def test_the_path_of_an_image_folder_is_relative_to_the_current_folder(
    out, family, photos, monkeypatch
):
    train(family[:1])
    given = []

    def declared(notebook, **parameters):
        given.append(parameters["data"])
        return family

    monkeypatch.chdir(photos().parent)
    monkeypatch.setattr(pack_module, "declared_runs", declared)
    words = ["--only", NAME, "--data", "cifar10=folder:photos"]
    monkeypatch.setattr(sys, "argv", ["pack", str(out), *words])
    assert pack_module.main() == 0
    assert given == [{"cifar10": f"folder:{os.getcwd()}/photos"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "15X"], "'15X' is no size"),
        (["--only", "kr/tabel1"], "no exhibit or chapter 'kr/tabel1'"),
        (["--profile", "tiny"], "no profile 'tiny'"),
        (["--data", "cifar10"], "write NAME=DATA"),
        (["--only", ""], "--only names no exhibit"),
    ],
)
def test_mistakes_are_explained(out, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["pack", str(out), *words])
    with pytest.raises(SystemExit):
        sys.exit(pack_module.main())  # argparse leaves by itself
    assert message in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(sys, "argv", ["unpack", str(out)])
    assert unpack.main() == 1
    assert "the folder holds no pack" in capsys.readouterr().err
