"""Training by the slice: stopped, killed, moved to another machine, and continued there."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime

import psutil
import pytest

from kdbook.cli import options, slice
from kdbook.cli.declared import Declared
from kdbook.cli.notebooks import ROOT
from kdbook.cli.train_all import train_all
from kdbook.remaining import follow
from kdlib import KD, store, train

# Teachers and their students, ten runs; a measurement reads the weights.
EXHIBIT = "rco/figure3"
BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "IPython", "ipywidgets", "nbformat", "nbclient", "papermill", "snakemake",
            "jupyter_client", "jupyterlab", "psutil", "torchvision",
        }:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def machine(tmp_path):
    """Make a machine with a store of its own, and without Jupyter: a function that starts it."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)

    def make(name):
        environment = os.environ | {
            "PYTHONPATH": f"{tmp_path / 'bare'}{os.pathsep}{ROOT}",
            "KDLIB_HOME": str(tmp_path / name / "runs"),
            "KDLIB_RESULTS": str(tmp_path / name / "results"),
            "KDLIB_PROGRESS": "lines",
        }

        def start(module, *words):
            return subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                # a background process of a shell ignores Ctrl-C
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

        return start

    return make


def finish(process):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return text


def results_in(folder):
    """The tables of an exhibit, and what its records say, without times and machines."""
    tables = {path.name: path.read_text() for path in folder.rglob(f"{EXHIBIT}/*.csv")}
    records = {}
    for path in folder.rglob("records/*.jsonl"):
        head, *rows, last = map(json.loads, path.read_text().splitlines())
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        summary = {k: last["summary"][k] for k in ("weights", "teachers")}
        records[path.name] = [head, rows, summary]
    return tables, records


def test_a_slice_that_is_stopped_and_moved_gives_the_bits_of_a_run_never_stopped(machine, tmp_path):
    command = ("kdbook.cli.run_all", "--only", EXHIBIT, "--jobs", "1", "--minutes")
    first, second, third = (machine(name) for name in ("first", "second", "third"))
    before = datetime.now()
    text = finish(third(*command, "20"))
    first_line = rf"Profile smoke until (\d\d:\d\d:\d\d) on .+: {EXHIBIT}\."
    end = datetime.strptime(re.fullmatch(first_line, text.splitlines()[0])[1], "%H:%M:%S")
    seconds = (end - before).seconds  # the date does not matter; imports count
    assert 20 * 60 - 1 <= seconds <= 20 * 60 + 10
    assert f"1 of 1 exhibits are complete: {EXHIBIT}." in text
    assert "Nothing is left to train." in text

    killed = first(*command, "20")  # as by a machine that disappears
    wait_for(tmp_path / "first", "*/epoch-*.safetensors", 2)
    workers = subprocess.run(["pkill", "-KILL", "-P", str(killed.pid)])
    killed.kill()
    killed.communicate()
    assert workers.returncode == 0
    orphaned = first(*command, "20")  # its worker ends, too
    (worker,) = wait_until(lambda: psutil.Process(orphaned.pid).children())
    wait_until(lambda: [*(tmp_path / "first").glob("runs/*/record.jsonl")])
    orphaned.kill()
    worker.wait(60)
    assert len([*(tmp_path / "first").glob("runs/*/record.jsonl")]) < 10  # it did not go on
    stopped = first(*command, "20")  # as by a scheduler that gives notice
    wait_for(tmp_path / "first", "*/record.jsonl", 2)
    stopped.send_signal(signal.SIGTERM)
    text = finish(stopped)
    assert f"0 of 1 exhibits are complete.\nNot complete: {EXHIBIT}.\n" in text
    assert "Left:" in text
    assert "The same command goes on." in text

    finish(first("kdbook.pack", str(tmp_path / "pack"), "--only", EXHIBIT, "--parts", "1M"))
    finish(second("kdbook.unpack", str(tmp_path / "pack")))
    finish(second(*command, "20"))
    expected = results_in(tmp_path / "third" / "results")
    assert expected[0]
    assert len(expected[1]) == 8  # the exhibit shows no student of labels
    assert results_in(tmp_path / "second" / "results") == expected
    measured = sorted(p.name for p in (tmp_path / "third").rglob("records/*.measure-*"))
    assert measured
    assert measured == sorted(p.name for p in (tmp_path / "second").rglob("records/*.measure-*"))


def wait_for(folder, pattern, count):
    wait_until(lambda: len([*folder.glob(f"runs/{pattern}")]) >= count)


def wait_until(there):
    """What ``there`` returns, as soon as it is true."""
    until = time.monotonic() + 300
    while not (found := there()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


# Slow, because it is not certain: torch may try an interrupted import of numpy again, which fails
# with an ImportError and its traceback.
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.5])  # torch is imported then
def test_ctrl_c_in_the_first_seconds_ends_with_a_sentence(machine, seconds):
    process = machine("first")("kdbook.cli.run_all", "--only", EXHIBIT, "--minutes", "20")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1] == (
        "Interrupted. Finished work is kept. The same command continues."
    )
    assert "Traceback" not in text


# --- what is trained ------------------------------------------------------------------------------


@pytest.fixture
def train_declared(monkeypatch):
    """Train what a notebook declares, as a slice does."""

    def call(*declared):
        monkeypatch.setattr("kdbook.cli.declared.declared", lambda notebook: Declared(*declared))
        train_all([None], None)

    return call


def test_a_run_that_failed_is_not_tried_again(tiny, train_declared, epochs_trained):
    bad = tiny(lr=1e30)
    for _ in range(2):
        with pytest.warns(UserWarning, match=bad.id):
            train_declared([bad])
    assert epochs_trained == [(bad.id, 1)]


def test_weights_that_a_notebook_asks_for_are_made_again(tiny, train_declared, only_records):
    run = tiny()
    only_records(*train([run]))
    train_declared([run])
    assert not store.find_record(run).in_store
    train_declared([run], None, True)
    assert store.find_record(run).in_store


# --- what is left ---------------------------------------------------------------------------------


def test_time_is_estimated_from_complete_runs(tiny):
    small, large = tiny(epochs=2), tiny(epochs=2, model="resnet14-x0.5")
    (trained,) = train([small])
    seconds = trained.summary["seconds"] = 10.0
    store.write_record(small, trained.rows, trained.summary)
    assert slice.seconds_for({small: 2}, [], 1) is None
    assert slice.seconds_for({small: 1}, [small], 1) == pytest.approx(seconds / 2)
    one = slice.seconds_for({large: 2}, [small], 1)
    assert one > seconds
    both = {large: 2, tiny(epochs=2, model="resnet14-x0.5", seed=1): 2}
    assert slice.seconds_for(both, [small], 1) == pytest.approx(2 * one)
    assert slice.seconds_for(both, [small], 16) == pytest.approx(one)  # there are only two
    trained.summary["environment"]["device"] = "another machine"
    store.write_record(small, trained.rows, trained.summary)
    assert slice.seconds_for({large: 2}, [small], 1) is None


def test_runs_that_failed_are_named_and_not_counted(tiny, capsys):
    bad, good = tiny(lr=1e30), tiny(seed=1)
    runs = [tiny(method=KD(bad)), good]
    with pytest.warns(UserWarning, match=bad.id):
        train(runs, partial=True)
    slice.report_left({EXHIBIT: follow(runs)}, students=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{bad} failed: its loss was not finite.")
    assert lines[1:] == ["Nothing is left to train but what failed."]
    slice.report_left({EXHIBIT: follow([*runs, tiny(seed=3)])}, students=1)
    assert "Left: 1 runs with 2 epochs; about 1 min" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "two", "nan", "inf"])
def test_wrong_minutes_are_refused(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all", "--minutes", text])
    with pytest.raises(SystemExit):
        options.parse()
    assert "is not a number of minutes above 0" in capsys.readouterr().err


def test_minutes_do_not_go_with_a_cluster(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all", "--minutes", "1", "--executor", "slurm"])
    with pytest.raises(SystemExit):
        options.parse()
    assert "--minutes trains on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(5, "1 min"), (125, "2 min"), (3600, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_times_are_told_in_hours_and_minutes(seconds, expected):
    assert slice.clock(seconds) == expected
