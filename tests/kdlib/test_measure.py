"""Measurements of several runs: made once, and again where a run differs."""

from dataclasses import replace

import pandas as pd
import pytest

from kdlib import measure, store, train

calls = []


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def ids(*several, note=""):
    calls.append([trained.run.id for trained in several])
    return pd.DataFrame({"run": [trained.run.id for trained in several], "note": note})


def test_a_measurement_of_several_runs_is_made_once_and_kept_beside_the_first(tiny):
    several = train([tiny(seed=seed) for seed in range(3)])
    first = measure(several, ids)
    assert first.run.tolist() == [trained.run.id for trained in several]
    assert measure(tuple(several), ids).equals(first)
    assert len(calls) == 1
    found = [len(list(store.folder(t.run).glob("measure-ids-*.json"))) for t in several]
    assert found == [1, 0, 0]


def test_a_measurement_of_several_runs_is_made_again_where_one_of_them_differs(tiny):
    a, b, c, d = train([tiny(seed=seed) for seed in range(4)])
    groups = [(a, b, c), (a, b, d), (a, d, c), (d, b, c), (a, b), (a,), (a, c, b)]
    for group in groups:
        assert measure(group, ids).run.tolist() == [trained.run.id for trained in group]
    measure(groups[0], ids, note="another option")
    assert len(calls) == len(groups) + 1
    moved = replace(b, summary=b.summary | {"weights": {"2": "0123"}})
    measure((a, moved, c), ids)
    assert len(calls) == len(groups) + 2


def test_one_run_alone_or_in_a_list_is_one_measurement(tiny):
    trained = train([tiny()])[0]
    assert measure(trained, ids).equals(measure([trained], ids))
    assert len(calls) == 1
