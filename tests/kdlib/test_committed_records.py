"""The committed records and measurements have the names that kdlib looks up."""

import hashlib
import json

import pytest

from kdbook.recorded import rebuild
from kdlib import runs, store
from kdlib.files import ROOT
from kdlib.store.measurements import measurement_name

RECORDS = sorted(ROOT.glob("results/*/records/*.jsonl"))
MEASUREMENTS = sorted(ROOT.glob("results/*/records/*.measure-*.json"))
# The functions of the notebooks whose measurements are committed, and their options.
MEASURED = [("training_curve", {}), ("kernel_sparsity", {}), ("kernels", {"layer": 1})]


def content(path):
    head, *rows, last = map(json.loads, path.read_text().splitlines())
    return head, rows, last["summary"]


def trained(path):
    head, rows, summary = content(path)
    return store.Trained(rebuild(head["run"]), rows, summary)


def test_there_are_committed_records():
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_name_of_a_record_is_the_id_of_its_run(path):
    head, *_ = content(path)
    text = json.dumps([runs.ENGINE_VERSION, head["run"]], sort_keys=True)
    assert path.stem == head["id"] == hashlib.sha256(text.encode()).hexdigest()[:12]
    run = rebuild(head["run"])
    assert run.id == path.stem
    assert json.loads(json.dumps(run.description)) == head["run"]


def test_a_committed_record_is_found_by_its_run(monkeypatch):
    monkeypatch.setenv("KDLIB_RESULTS", str(ROOT / "results"))
    for path in RECORDS:
        head, rows, summary = content(path)
        found = store.find_record(rebuild(head["run"]))
        assert (found.rows, found.summary, found.in_store) == (rows, summary, False)


@pytest.mark.parametrize("path", MEASUREMENTS, ids=lambda path: path.stem)
def test_the_name_of_a_measurement_is_its_key(path):
    run, _, name = path.name.partition(".")
    record = trained(path.with_name(f"{run}.jsonl"))
    assert name in {measurement_name([record], f, 1, options) for f, options in MEASURED}
