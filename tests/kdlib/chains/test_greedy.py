"""Greedy search: a chain of stages, each anchor found with the student of the stage before."""

import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from helpers import final_weights, truncate

from kdlib import KD, Recipe, Run, store, train
from kdlib.chains.divergence import divergence_from_route
from kdlib.chains.greedy import GreedySearch, anchors, divergences, stages
from kdlib.engine import pool as pool_module
from kdlib.errors import NotFinite
from kdlib.methods.route import multi_stage

ALWAYS, NEVER = -10.0, 1e9  # with these values of delta every epoch, or none, is too hard


@pytest.fixture
def search(tiny):
    """Make a search of fractions of a second."""

    def make(first=1, delta=0.05, student_epochs=2, teacher_epochs=4, **others):
        teacher = tiny(epochs=teacher_epochs, model="resnet14-x0.25")
        student = tiny(epochs=student_epochs, seed=1, method=KD(teacher))
        return GreedySearch(student, first, delta, **others)

    return make


def teacher_of(search):
    return search.student.method.teacher


def algorithm_2(h, i, delta):
    """As printed in the paper, with its 1-based table in a list."""
    n = len(h) - 1
    return next((j - 1 for j in range(i + 1, n) if (h[j] - h[i]) / h[i] > delta), n)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"delta": NEVER}, [1, 4]),
        ({"delta": NEVER, "first": 4}, [4]),
        ({"delta": ALWAYS}, [1, 2, 3, 4]),
        ({"delta": ALWAYS, "first": 2}, [2, 3, 4]),
        ({"delta": ALWAYS, "candidates": (2, 4), "teacher_epochs": 5}, [1, 2, 4, 5]),
        ({"delta": ALWAYS, "most": 3}, [1, 2, 4]),
        ({"delta": ALWAYS, "most": 2}, [1, 4]),
    ],
)
def test_a_search_leads_from_its_first_anchor_to_the_teachers_last_epoch(
    search, settings, expected
):
    searched = search(**settings)
    trained = train([searched])[0]
    assert anchors(trained) == expected
    chain = stages(trained)
    assert chain[-1].summary == trained.summary
    assert [stage.run.start for stage in chain] == [None, *(stage.run for stage in chain[:-1])]
    assert [stage.run.id for stage in chain] == [
        stage.id for stage in multi_stage(searched.student, expected)
    ]
    allowed = searched.candidates or range(1, 5)
    weights = store.find_record(teacher_of(searched)).summary["weights"]
    last = str(teacher_of(searched).recipe.epochs)
    assert weights.keys() == {str(k) for k in allowed} | {str(searched.first), last}


@pytest.mark.parametrize("delta", [-0.05, 0.05])
def test_the_anchors_follow_from_the_divergences(search, delta):
    trained = train([search(delta=delta, teacher_epochs=6, most=6)])[0]
    found, seen = anchors(trained), divergences(trained)
    assert list(seen.columns) == ["epoch", "kl", "anchor"]
    assert seen.anchor.unique().tolist() == found[:-1]
    for anchor, after in pairwise(found):
        table = seen[seen.anchor == anchor]
        assert table.epoch.tolist() == [1, 2, 3, 4, 5, 6]
        assert max(algorithm_2([math.nan, *table.kl], anchor, delta), anchor + 1) == after
    assert found[-1] == 6


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"delta": ALWAYS, "most": 3}, True),
        ({"delta": ALWAYS, "most": 4}, False),  # Algorithm 2 leads to epoch 4 as well
        ({"delta": NEVER, "most": 2}, False),
        ({"delta": ALWAYS, "first": 4, "most": 1}, False),
    ],
)
def test_a_search_is_cut_where_its_limit_chose_the_last_anchor(search, settings, cut):
    searched = search(**settings)
    assert searched.was_cut(train([searched])[0]) is cut


def test_the_divergences_are_those_of_each_stages_student(search):
    trained = train([search(delta=ALWAYS)])[0]
    seen = divergences(trained)
    for stage in stages(trained)[:-1]:
        expected = divergence_from_route(stage).kl.tolist()
        assert seen[seen.anchor == stage.run.method.teacher_epoch].kl.tolist() == expected
    assert seen.kl.nunique() == len(seen) == 12


def test_a_search_of_one_stage_has_no_divergences(search):
    assert divergences(train([search(first=4)])[0]).empty


def test_a_second_call_trains_nothing_and_another_delta_only_other_stages(search, epochs_trained):
    first = train([search(delta=ALWAYS)])[0]
    epochs_trained.clear()
    second = train([search(delta=ALWAYS)])[0]
    assert (second.run, second.summary) == (first.run, first.summary)
    assert not epochs_trained
    other = train([search(delta=NEVER)])[0]
    assert epochs_trained == [(other.run.id, 1), (other.run.id, 2)]


def test_searches_and_runs_are_trained_together(tiny, search, elsewhere, computed_logits):
    searched, other = search(delta=NEVER), search(delta=ALWAYS, first=3)
    plain = replace(teacher_of(searched), keep=(), save_logits=False)  # it names one teacher
    jobs = [tiny(seed=3), searched, tiny(seed=1, lr=0.02, method=KD(plain, at=2)), other]
    alone = [elsewhere(job)[0] for job in jobs]
    computed_logits.clear()
    together = train(jobs)
    assert [trained.run for trained in together] == [trained.run for trained in alone]
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert [anchors(together[k]) for k in (1, 3)] == [[1, 4], [3, 4]]
    twice = {one for one, count in Counter(computed_logits).items() if count > 1}
    # an epoch may hold one image twice in one view: its own, and one left over from the last
    assert len(twice) < 0.02 * len(computed_logits)
    assert not [one for one in twice if one[1] == "test"]


def test_a_failed_run_stops_no_search_beside_it(tiny, search):
    bad, searched = tiny(lr=1e30), search(delta=NEVER)
    with pytest.raises(NotFinite, match=bad.id):
        train([bad, searched])
    assert store.find_record(multi_stage(searched.student, [1, 4])[-1]) is not None


# --- clones and repairs ---------------------------------------------------------------------------


@pytest.fixture
def committed(search, only_records):
    """Train a search and keep only its records, with or without its measurements."""

    def make(measurements, **settings):
        trained = train([search(**settings)])[0]
        seen = divergences(trained)
        if not measurements:
            forget_measurements(trained)
        only_records(store.find_record(teacher_of(search())), *stages(trained))
        return trained, seen

    return make


def forget_measurements(trained):
    for stage in stages(trained):
        for path in store.folder(stage.run).glob("measure-*.json"):
            path.unlink()


def test_a_clone_of_records_knows_the_result_of_a_search(search, committed, monkeypatch):
    trained, seen = committed(measurements=True, delta=ALWAYS)
    monkeypatch.setattr(pool_module, "Trainer", None)
    found = train([search(delta=ALWAYS)])[0]
    assert (found.run, found.summary) == (trained.run, trained.summary)
    assert anchors(found) == [1, 2, 3, 4]
    assert divergences(found).equals(seen)


def test_a_clone_whose_remade_weights_differ_begins_again_from_the_first_stage(
    search, committed, monkeypatch
):
    """As on another machine, whose rounding differs."""
    committed(measurements=False, delta=ALWAYS, first=2)
    searched, asked = search(delta=ALWAYS, first=2), []
    next_run = GreedySearch.next_run
    monkeypatch.setattr(
        GreedySearch,
        "next_run",
        lambda chain, trained: asked.append(trained and trained.run) or next_run(chain, trained),
    )
    save = store.save_modules

    def save_other(run, epoch, weights):
        if run.method == searched.student.method or run.start is None:
            weights = {n: 1.001 * t if t.is_floating_point() else t for n, t in weights.items()}
        return save(run, epoch, weights)

    monkeypatch.setattr(store, "save_modules", save_other)
    with pytest.warns(UserWarning, match="trained again"):
        found = train([searched])[0]
    first, second, third = multi_stage(searched.student, (2, 3, 4))
    assert asked[:4] == [None, first, None, first]
    assert anchors(found) == [2, 3, 4]
    assert found.run == third
    chain = stages(found)
    assert [stage.run for stage in chain] == [first, second, third]
    for before, after in pairwise(chain):
        assert after.summary["teachers"][f"{before.run.id}@2"] == final_weights(before)


@pytest.mark.parametrize("damage", ["logits", "teacher"])
def test_a_search_repairs_the_files_that_it_needs(search, damage):
    searched = search(delta=ALWAYS, first=3)
    trained = train([searched])[0]
    seen = divergences(trained)
    forget_measurements(trained)
    folder = store.folder(teacher_of(searched))
    if damage == "teacher":
        shutil.rmtree(folder)
    else:
        truncate(folder / "logits-0002.safetensors")
    assert final_weights(train([searched])[0]) == final_weights(trained)
    assert divergences(trained).equals(seen)


# --- settings -------------------------------------------------------------------------------------


def test_impossible_searches_are_refused(search, tiny):
    with pytest.raises(ValueError, match="has the epochs 1 to 4, so not epoch 5"):
        search(first=5)
    with pytest.raises(ValueError, match="does not learn from a checkpoint"):
        GreedySearch(tiny(), first=1)


def test_the_estimate_of_a_search_has_stages_at_even_intervals():
    teacher = Run("cifar100", "resnet50", Recipe(240, 64, 0.05))
    student = Run("cifar100", "mobilenetv2-t4-w0.35", Recipe(240, 64, 0.01), KD(teacher))
    estimate = GreedySearch(student, first=30).estimate()
    assert [run.method.teacher_epoch for run in estimate] == [30, 100, 170, 240]
    assert estimate[-1].epochs_before == 720
