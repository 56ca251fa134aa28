"""Measurements: tables that are computed once and kept beside a record."""

from dataclasses import replace

import pandas as pd
import pytest
from helpers import truncate

from kdlib import measure, store, train
from kdlib.store import measurements

calls = []


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch):
    """Nothing was computed before, and no measurement was used before."""
    calls.clear()
    monkeypatch.setattr(measurements, "_used", type(measurements._used)(set))
    monkeypatch.setattr(measurements, "_measured", {})


def count_weights(trained, times=1):
    calls.append(times)
    return pd.DataFrame({"times": [times], "weights": [trained.model().head[2].bias.numel()]})


def seeds(*several):
    calls.append([trained.run.seed for trained in several])
    return pd.DataFrame({"seed": calls[-1]})


@pytest.fixture
def trained(tiny):
    return train([tiny()])[0]


def test_a_measurement_is_computed_once(tiny, trained):
    first = measure(trained, count_weights, times=3)
    assert first.to_dict("list") == {"times": [3], "weights": [10]}
    assert measure(train([tiny()])[0], count_weights, times=3).equals(first)
    assert calls == [3]


def test_other_options_and_other_weights_are_measured_anew(tiny, trained):
    other = train([tiny(seed=1)])[0]
    measure(trained, count_weights, times=3)
    measure(trained, count_weights, times=4)
    measure(other, count_weights, times=3)
    assert calls == [3, 4, 3]
    trained.summary["weights"]["2"] = "0123"
    with pytest.raises(OSError, match="0002"):
        measure(trained, count_weights, times=3)
    other.summary["teachers"]["some teacher@1"] = "0123"
    measure(other, count_weights, times=3)
    assert calls == [3, 4, 3, 3, 3]


def test_two_functions_of_one_name_and_functions_without_a_name_are_refused(trained):
    measure(trained, count_weights)

    def other(trained):
        return pd.DataFrame({"weights": [0]})

    other.__name__ = "count_weights"
    with pytest.raises(ValueError, match=r"Version 1 of count_weights names .* another"):
        measure(trained, other)
    with pytest.raises(ValueError, match="lambda"):
        measure(trained, lambda trained: pd.DataFrame())


def test_the_key_depends_on_the_functions_name_and_version_and_not_on_its_body(trained):
    first = measure(trained, count_weights)

    def edited(trained, times=1):
        """Another docstring and another body, under the same name."""
        calls.append("edited")
        return count_weights(trained, times)

    edited.__name__ = "count_weights"
    measurements._measured.clear()  # in a later process
    assert measure(trained, edited).equals(first)
    edited.version = 1
    assert measure(trained, edited).equals(first)
    assert calls == [1]
    edited.version = 2
    assert measure(trained, edited).equals(first)
    assert calls == [1, "edited", 1]
    edited.__name__ = "count_all_weights"
    measure(trained, edited)
    assert calls == [1, "edited", 1, "edited", 1]


def test_a_measurement_of_several_runs_is_kept_beside_the_first(tiny):
    several = train([tiny(seed=seed) for seed in range(3)])
    first = measure(several, seeds)
    assert first.seed.tolist() == [0, 1, 2]
    assert measure(tuple(several), seeds).equals(first)
    assert calls == [[0, 1, 2]]
    found = [len([*store.folder(t.run).glob("measure-seeds-*.json")]) for t in several]
    assert found == [1, 0, 0]


def test_every_run_of_several_and_their_order_count(tiny):
    a, b, c, d = train([tiny(seed=seed) for seed in range(4)])
    moved = replace(b, summary=b.summary | {"weights": {"2": "0123"}})
    groups = [(a, b, c), (a, b, d), (a, d, c), (d, b, c), (a, b), (a,), (a, c, b), (a, moved, c)]
    for group in groups:
        assert measure(group, seeds).seed.tolist() == [t.run.seed for t in group]
    assert len(calls) == len(groups)
    measure(a, seeds)  # the same as (a,)
    assert len(calls) == len(groups)


def test_a_damaged_measurement_is_computed_again(trained):
    first = measure(trained, count_weights)
    (path,) = store.folder(trained.run).glob("measure-*.json")
    truncate(path)
    assert measure(trained, count_weights).equals(first)
    assert calls == [1, 1]


def test_only_measurements_that_this_process_used_are_copied(trained, tmp_path, monkeypatch):
    measure(trained, count_weights, times=3)
    monkeypatch.setattr(measurements, "_used", type(measurements._used)(set))
    monkeypatch.setattr(measurements, "_measured", {})
    measure(trained, count_weights, times=4)
    store.copy_record(trained, tmp_path / "copy")
    name = measurements.measurement_name([trained], "count_weights", 1, {"times": 4})
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert copied == {f"{trained.run.id}.jsonl", f"{trained.run.id}.{name}"}
    measure(trained, count_weights, times=3)  # found in the store counts as used
    store.copy_record(trained, tmp_path / "copy")
    assert len([*(tmp_path / "copy").iterdir()]) == 3
    assert calls == [3, 4]
