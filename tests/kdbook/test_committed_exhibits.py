"""What the committed exhibits show comes from committed records alone, without weights."""

import json

import pytest

from kdbook import kr
from kdbook.cli.declared import declared_runs
from kdbook.cli.notebooks import all_notebooks
from kdlib import measure, store
from kdlib.engine.graph import next_level
from kdlib.files import ROOT

NOTEBOOKS = {notebook.exhibit: notebook for notebook in all_notebooks()}
# By exhibit, the functions that its notebook measures, with their options.
MEASURED = {
    "kr/figure4": [(kr.kernel_sparsity, {}), (kr.kernels, {"layer": 1})],
    "kr/figure5": [(kr.training_curve, {})],
}


@pytest.mark.parametrize("exhibit", MEASURED)
def test_nothing_is_left_to_train_or_to_measure(exhibit, monkeypatch):
    monkeypatch.setenv("KDLIB_RESULTS", str(ROOT / "results"))
    about = json.loads((ROOT / "results" / "paper" / exhibit / "figure.csv.json").read_text())
    declared = declared_runs(NOTEBOOKS[exhibit], profile_name="paper")
    runs = [run for run in declared if run.id in about["runs"]]
    assert len(runs) >= 12
    assert next_level(runs, weights=False, failures={}) == []
    for function, options in MEASURED[exhibit]:
        found = [
            measure(store.find_record(run), function, **options) for run in used(runs, options)
        ]
        assert not any(table.empty for table in found)


def used(runs, options):
    """The runs that a notebook measures: kernels are drawn for the first seed alone."""
    return [run for run in runs if run.seed == 0] if options else runs
