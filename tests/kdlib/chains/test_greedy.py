"""RCO: checkpoints of the teacher's route as anchors, in one stage, in several, searched for."""

import hashlib
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import (
    batches,
    final_weights,
    flip_a_bit,
    garble,
    interrupted,
    move,
    new_trainer,
    same_log,
    truncate,
)
from scipy.special import rel_entr, softmax
from torch.nn import functional as F

from kdbook.rco import divergence_from_route
from kdlib import KD, Recipe, Run, build_model, load_data, measure, store, train
from kdlib.chains.greedy import GreedySearch, anchors, divergences, stages
from kdlib.engine import pool as pool_module
from kdlib.engine.plan import validation
from kdlib.engine.trainer import Trainer
from kdlib.errors import NotFinite, StoreError
from kdlib.methods.route import OneStage, hardness, multi_stage, next_anchor
from kdlib.models import load_weights
from kdlib.store import fingerprint


def route_of(teacher):
    """The same run, all of its checkpoints and logits kept."""
    return replace(teacher, keep=range(1, teacher.recipe.epochs + 1), route=True)


@pytest.fixture
def at_most_16_epochs(monkeypatch):
    count, begin = [], Trainer.begin_epoch

    def note(lane):
        count.append(lane)
        if len(count) > 16:
            raise RuntimeError("This goes on and on.")
        begin(lane)

    monkeypatch.setattr(Trainer, "begin_epoch", note)
    return count


# --- one stage ------------------------------------------------------------------------------------


def labels(method, epochs):
    """The teacher's epoch that labels each of the student's."""
    return [method.teacher_at(epoch)[1] for epoch in range(epochs)]


def test_one_anchor_for_all_epochs_is_plain_distillation_to_the_bit(tiny):
    teacher = tiny(epochs=3, model="resnet14-x0.25")
    plain, one = train(
        [
            tiny(epochs=3, milestones=(2,), method=method)
            for method in (KD(teacher), OneStage(KD(teacher), gap=3))
        ]
    )
    assert one.run.id != plain.run.id
    assert final_weights(one) == final_weights(plain)
    assert same_log(one, plain)


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7, 7, 7]),
        (2, [2, 2, 4, 4, 6, 6, 7, 7, 7]),  # 8 is beyond the teacher's end
        (3, [3, 3, 3, 6, 6, 6, 7, 7, 7]),
        (5, [5, 5, 5, 5, 5, 7, 7, 7, 7]),
        (7, [7] * 9),
        (100, [7] * 9),
    ],
)
def test_the_anchor_changes_every_gap_epochs(tiny, gap, expected):
    assert labels(OneStage(KD(tiny(epochs=7)), gap), epochs=9) == expected


@pytest.mark.parametrize(
    ("gap", "count"), [(1, 240), (2, 120), (4, 60), (10, 24), (20, 12), (60, 4), (240, 1)]
)
def test_there_are_as_many_anchors_as_table_6_says(gap, count):
    teacher = Run("cifar100", "resnet50", Recipe(240, 64, 0.05))
    found = OneStage(KD(teacher), gap).anchors(240)
    assert len(found) == count
    assert max(epoch for _, epoch in found) == 240


@pytest.mark.parametrize("gap", [0, -1, 1.28e-3])
def test_a_gap_below_one_epoch_is_refused(tiny, gap):
    with pytest.raises(ValueError, match=rf"gap of {gap} epochs.*RocketLaunching"):
        OneStage(KD(tiny()), gap)


@pytest.mark.parametrize("gap", [2.0, 1.5])
def test_a_gap_that_is_a_float_is_an_integer_or_refused(tiny, at_most_16_epochs, gap):
    """As 240 / 20 is."""
    teacher = tiny(epochs=4)
    try:
        method = OneStage(KD(teacher), gap)
    except (TypeError, ValueError):
        return
    trained = train([tiny(epochs=4, method=method)])[0]
    assert trained.summary["teachers"].keys() == {f"{teacher.id}@{k}" for k in (2, 4)}


def test_each_epoch_learns_from_its_own_anchor_at_a_rate_that_goes_on(tiny):
    teacher = tiny(epochs=4)
    one, first = train(
        [
            tiny(epochs=4, milestones=(1, 3), decay=0.5, method=method)
            for method in (OneStage(KD(teacher), gap=2), KD(teacher, at=2))
        ]
    )
    kept = store.find_record(teacher).summary["weights"]
    assert one.summary["teachers"] == {f"{teacher.id}@{k}": kept[str(k)] for k in (2, 4)}
    assert one.log.lr.tolist() == [0.05, 0.025, 0.025, 0.0125]
    columns = ["train_loss", "train_kd", "test_ce", "test_kl"]
    assert one.log[columns][:2].equals(first.log[columns][:2])
    assert (one.log[columns][2:] != first.log[columns][2:]).all(axis=None)


# --- several stages -------------------------------------------------------------------------------


@pytest.fixture
def chain(tiny):
    """Two stages, of anchors 1 and 3, whose batches cross the borders of epochs."""
    teacher = tiny(epochs=3, model="resnet14-x0.25", keep=(1, 2))
    student = tiny(epochs=3, milestones=(2,), decay=0.3, seed=1, method=KD(teacher))
    return multi_stage(student, (1, 3))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_one_stage_of_one_anchor_is_plain_distillation_from_it(tiny, elsewhere, at):
    teacher = tiny(epochs=3)
    (stage,) = multi_stage(tiny(method=KD(teacher)), [at])
    plain = tiny(method=KD(teacher, at=at))
    assert (stage, stage.id) == (plain, plain.id)
    (staged,), (expected,) = elsewhere(stage), train([plain])
    assert final_weights(staged) == final_weights(expected)
    assert same_log(staged, expected)


def test_each_stage_starts_from_the_last_ones_weights_and_nothing_else(chain):
    first, second = train(chain)
    lane = new_trainer(second.run)
    assert fingerprint(lane.state.networks["student"].state_dict()) == final_weights(first)
    assert not lane.state.optimizers["student"].state
    assert second.log.lr.tolist() == first.log.lr.tolist() == [0.05, 0.05, pytest.approx(0.015)]
    assert final_weights(second) != final_weights(first)


def test_a_stage_says_what_it_started_from_and_learned_from(chain):
    first, second = train(chain)
    teacher = first.run.method.teacher
    kept = store.find_record(teacher).summary["weights"]
    assert first.summary["teachers"] == {f"{teacher.id}@1": kept["1"]}
    assert second.summary["teachers"] == {
        f"{teacher.id}@3": kept["3"],
        f"{first.run.id}@3": final_weights(first),
    }


def test_the_order_of_images_goes_on_from_stage_to_stage(tiny, chain, monkeypatch):
    seen, begin = {}, Trainer.begin_epoch

    def note(lane):
        begin(lane)
        pairs = torch.stack([lane.index[: lane.steps], lane.view[: lane.steps]], 2)
        seen.setdefault(lane.run.id, []).append(pairs)

    monkeypatch.setattr(Trainer, "begin_epoch", note)
    long = tiny(epochs=6, seed=1)
    train([*chain, long])
    staged = [epoch for stage in chain for epoch in seen[stage.id]]
    assert all(map(torch.equal, staged, seen[long.id]))
    assert len(staged) == len(seen[long.id]) == 6


def test_a_later_stage_equals_a_plain_pytorch_loop(chain):
    first, second = train(chain)
    run, images = second.run, load_data("digits").first(128)
    teacher, recipe = store.find_record(run.method.teacher).model(), run.recipe
    model = build_model(run.model, classes=10, channels=1)
    load_weights(model, first.model().state_dict())
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch, index, view in batches(run, images):
        optimizer.param_groups[0]["lr"] = recipe.lr * (recipe.decay if epoch >= 2 else 1)
        x = images.batch(index, view)
        logits = model(x)
        with torch.no_grad():
            taught = F.softmax(teacher(x) / 5, 1)
        kl = (taught * (taught.log() - F.log_softmax(logits / 5, 1))).sum(1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(logits, images.labels[index]) + 25 * kl).backward()
        optimizer.step()
    trained = second.model().state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_what_a_run_starts_from_is_part_of_it(chain):
    first, second = chain
    assert second != replace(second, start=None)
    assert second.id != replace(second, start=None).id
    assert second.start == first
    assert (first.epochs_before, second.epochs_before) == (0, 3)


@pytest.mark.parametrize("other", [{"model": "resnet14-x0.25"}, {"data": "mnist"}])
def test_a_run_cannot_start_from_another_network_or_data_set(tiny, other):
    with pytest.raises(ValueError, match=r"A resnet8-x0\.25 on digits cannot start from"):
        tiny(start=tiny(**other))


def test_a_moved_stage_makes_the_later_ones_train_again(tiny, chain, epochs_trained):
    third = replace(chain[1], seed=2, start=chain[1])
    before = train([third])[0]
    moved = move(chain[0], tiny(epochs=3, seed=5))
    epochs_trained.clear()
    with pytest.warns(UserWarning, match=f"{third}.* learned from other weights.*{chain[1]}"):
        after = train([third])[0]
    again = store.find_record(chain[1])
    assert again.summary["teachers"][f"{chain[0].id}@3"] == moved
    assert [run for run, _ in epochs_trained] == [chain[1].id] * 3 + [third.id] * 3
    assert after.summary["teachers"][f"{chain[1].id}@3"] == final_weights(again)
    assert final_weights(after) != final_weights(before)


def test_a_half_trained_stage_whose_start_moved_starts_anew(
    tiny, chain, monkeypatch, epochs_trained
):
    first, second = chain
    train([first])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train([second])
    moved = move(first, tiny(epochs=3, seed=5))
    epochs_trained.clear()
    after = train([second])[0]
    assert [pair for pair in epochs_trained if pair[0] == second.id] == [
        (second.id, epoch) for epoch in (1, 2, 3)
    ]
    assert after.summary["teachers"][f"{first.id}@3"] == moved


def test_a_resumed_stage_equals_an_uninterrupted_one(chain, elsewhere, train_until, epochs_trained):
    second = chain[1]
    (expected,) = elsewhere(second)
    train_until(second, 2)
    epochs_trained.clear()
    resumed = train([second])[0]
    assert epochs_trained == [(second.id, 3)]
    assert final_weights(resumed) == final_weights(expected)
    assert same_log(resumed, expected)


def test_the_teacher_of_several_stages_is_trained_once(tiny, epochs_trained):
    teacher = tiny(epochs=3)
    train(multi_stage(tiny(method=KD(teacher), seed=1), (1, 2, 3)))
    assert [epoch for run, epoch in epochs_trained if run == teacher.id] == [1, 2, 3]


def test_the_first_stage_keeps_the_students_own_start(tiny):
    student = tiny(method=KD(tiny()), start=tiny(seed=3))
    assert multi_stage(student, [1, 2])[0].start == tiny(seed=3)


# --- the next anchor ------------------------------------------------------------------------------

# H of students of different anchors, by the teacher's epoch; the last, 7, is never tested.
H = {1: 0.5, 2: 0.6, 3: 0.8, 4: 1.0, 5: 2.0, 6: 0.5, 7: 9.0}


def test_hardness_is_the_relative_rise_of_the_divergence():
    assert hardness(H, 4) == {5: 1.0, 6: -0.5, 7: 8.0}
    assert hardness(H, 1) == pytest.approx({2: 0.2, 3: 0.6, 4: 1.0, 5: 3.0, 6: 0.0, 7: 17.0})
    assert hardness(H, 7) == {}


@pytest.mark.parametrize(
    ("anchor", "delta", "expected"),
    [
        (1, 0.8, 3),  # r = 0.2, 0.6, 1.0: epoch 4 is the first too hard one
        (1, 1.5, 4),  # … 1.0, 3.0
        (1, 3.5, 7),  # nothing is too hard, and 7 with its r = 17 is not asked
        (2, 0.8, 4),  # r = 1/3, 2/3, 7/3
        (2, 0.5, 3),
        (3, 0.8, 4),  # r = 1/4, 3/2
        (4, 0.8, 5),  # r = 1: no progress, so one epoch on
        (4, 1.0, 7),  # r = 1 is not above 1
        (5, 0.8, 7),  # the rest is easier than the anchor itself
        (6, 0.8, 7),  # only 7 follows, which is not asked
        (1, 0.1, 2),  # epoch 2 is too hard: 6, easier again, does not count
        (1, -2.0, 2),
    ],
)
def test_the_next_anchor_is_the_last_before_one_too_hard(anchor, delta, expected):
    assert next_anchor(H, anchor, delta) == expected
    backwards = dict(reversed(H.items()))
    assert next_anchor(backwards, anchor, delta) == expected


def test_delta_is_the_papers_where_none_is_given():
    assert next_anchor(H, 1) == next_anchor(H, 1, 0.8) != next_anchor(H, 1, 1.5)


@pytest.mark.parametrize(
    ("anchor", "delta", "every", "expected"),
    [
        (1, 0.8, 2, 2),  # 4 is too hard, 3 is not allowed
        (1, 0.1, 2, 2),
        (1, 0.1, 3, 3),  # 2 is too hard: the next one allowed
        (2, 0.5, 2, 4),  # 4 is too hard, 3 is not allowed: no progress
        (4, 0.8, 3, 6),  # 5 is too hard though it is not allowed
        (6, -2.0, 6, 7),  # nothing allowed is left but the last
        (1, 0.8, 10, 7),
        (1, 3.5, 2, 7),
    ],
)
def test_only_allowed_epochs_and_the_last_become_anchors(anchor, delta, every, expected):
    assert next_anchor(H, anchor, delta, range(every, 100, every)) == expected


def algorithm_2(h, i, delta):
    """As printed, its 1-based table in a list."""
    n = len(h) - 1
    j = i + 1
    while j < n:
        r = (h[j] - h[i]) / h[i]
        if r > delta:
            return j - 1
        j += 1
    return n


def test_the_next_anchor_is_that_of_algorithm_2_as_printed():
    random = np.random.default_rng(0)
    stuck = 0
    for _ in range(300):
        h = [math.nan, *random.uniform(0.5, 1.5, size=random.integers(2, 12))]
        i = int(random.integers(1, len(h) - 1))
        printed = algorithm_2(h, i, delta=0.8)
        stuck += printed == i
        divergence = dict(enumerate(h[1:], 1))
        assert next_anchor(divergence, i, 0.8) == max(printed, i + 1)
    assert 0 < stuck < 200


def test_nothing_follows_the_last_epoch():
    with pytest.raises(ValueError, match="Nothing follows epoch 7: the teacher has 7"):
        next_anchor(H, 7)


# --- greedy search --------------------------------------------------------------------------------

ALWAYS, NEVER = -10.0, 1e9  # thresholds above which everything, or nothing, is too hard


@pytest.fixture
def search(tiny):
    """A search of fractions of a second: ``search(**what differs)``."""

    def make(first=1, delta=0.05, student_epochs=2, teacher_epochs=4, **others):
        teacher = tiny(epochs=teacher_epochs, model="resnet14-x0.25")
        student = tiny(epochs=student_epochs, seed=1, method=KD(teacher))
        return GreedySearch(student, first, delta, **others)

    return make


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
def test_a_search_goes_from_its_first_anchor_to_the_teachers_last_epoch(search, settings, expected):
    searched = search(**settings)
    trained = train([searched])[0]
    assert anchors(trained) == expected
    chain = stages(trained)
    assert chain[-1].summary == trained.summary
    assert [stage.run.start for stage in chain] == [None, *(stage.run for stage in chain[:-1])]
    assert [stage.run.id for stage in chain] == [
        stage.id for stage in multi_stage(searched.student, expected)
    ]
    assert trained.run.epochs_before + 2 == 2 * len(expected)


def test_a_thinned_search_keeps_only_checkpoints_that_may_be_anchors(search):
    searched = search(candidates=(2, 4), teacher_epochs=5, delta=NEVER)
    train([searched])
    teacher = store.find_record(searched.student.method.teacher)
    assert teacher.summary["weights"].keys() == {"1", "2", "4", "5"}
    assert teacher.summary["logits"].keys() == {"1", "2", "3", "4", "5"}


@pytest.mark.parametrize("delta", [-0.05, 0.05])
def test_the_anchors_follow_from_the_divergences_that_were_seen(search, delta):
    trained = train([search(delta=delta, teacher_epochs=6)])[0]
    found, seen = anchors(trained), divergences(trained)
    assert list(seen.columns) == ["epoch", "kl", "anchor"]
    assert seen.anchor.unique().tolist() == found[:-1]
    for anchor, after in pairwise(found):
        table = seen[seen.anchor == anchor]
        assert table.epoch.tolist() == [1, 2, 3, 4, 5, 6]
        assert max(algorithm_2([math.nan, *table.kl], anchor, delta), anchor + 1) == after
    assert found[-1] == 6


def test_the_divergences_are_those_of_each_stages_student(search):
    trained = train([search(delta=ALWAYS)])[0]
    seen = divergences(trained)
    for stage in stages(trained)[:-1]:
        expected = divergence_from_route(stage).kl.tolist()
        assert seen[seen.anchor == stage.run.method.anchor].kl.tolist() == expected
    assert seen.kl.nunique() == len(seen) == 12


def test_a_search_of_one_stage_saw_no_divergences(search):
    assert divergences(train([search(first=4)])[0]).empty


def test_a_second_call_of_a_search_trains_nothing(search, monkeypatch):
    first = train([search(delta=ALWAYS)])[0]
    monkeypatch.setattr(pool_module, "Trainer", None)
    second = train([search(delta=ALWAYS)])[0]
    assert (second.run, second.summary) == (first.run, first.summary)


def test_another_threshold_trains_only_the_stages_that_differ(search, epochs_trained):
    train([search(delta=ALWAYS)])
    epochs_trained.clear()
    trained = train([search(delta=NEVER)])[0]
    assert {run for run, _ in epochs_trained} == {trained.run.id}
    assert len(epochs_trained) == 2


def test_searches_and_runs_are_trained_side_by_side(tiny, search, elsewhere):
    searched, other = search(delta=NEVER), search(delta=ALWAYS, first=3)
    teacher = searched.student.method.teacher
    jobs = [tiny(seed=3), searched, tiny(seed=1, lr=0.02, method=KD(teacher, at=2)), other]
    alone = [elsewhere(job)[0] for job in jobs]
    together = train(jobs)
    assert [trained.run for trained in together] == [trained.run for trained in alone]
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert [anchors(together[k]) for k in (1, 3)] == [[1, 4], [3, 4]]


def test_a_search_and_runs_beside_it_share_their_labels(search, swept):
    searched = search(delta=NEVER, student_epochs=3)
    teacher = searched.student.method.teacher
    students = [
        replace(searched.student, model="resnet8-x0.5", method=KD(teacher, at=at)) for at in (1, 4)
    ]
    trained = train([*students, searched])
    assert anchors(trained[-1]) == [1, 4]
    kept = store.find_record(teacher).summary["weights"]
    assert {weights for weights, *_ in swept} == {kept["1"], kept["4"]}
    twice = {ask for ask, count in Counter(swept).items() if count > 1}
    # an epoch may hold one image twice in one view: as a left-over of the last one, and its own
    assert len(twice) < 0.02 * len(swept)
    assert not [ask for ask in twice if ask[1] == "test"]


def test_an_interrupted_search_goes_on_where_it_was(search, elsewhere, train_until, epochs_trained):
    searched = search(delta=ALWAYS, first=2)
    (expected,) = elsewhere(searched)
    second = expected.run.start
    train_until(second, 1, [searched])
    epochs_trained.clear()
    resumed = train([searched])[0]
    assert epochs_trained == [(second.id, 2), (resumed.run.id, 1), (resumed.run.id, 2)]
    assert final_weights(resumed) == final_weights(expected)
    assert resumed.summary["teachers"] == expected.summary["teachers"]


def test_a_clone_of_records_alone_tells_what_a_search_found(search, only_records, monkeypatch):
    searched = search(delta=ALWAYS)
    trained = train([searched])[0]
    seen = divergences(trained)
    runs = [searched.student.method.teacher, *(stage.run for stage in stages(trained))]
    only_records(*runs)
    monkeypatch.setattr(pool_module, "Trainer", None)
    found = train([searched])[0]
    assert (found.run, found.summary) == (trained.run, trained.summary)
    assert anchors(found) == [1, 2, 3, 4]
    assert divergences(found).equals(seen)


def test_a_clone_without_the_measurements_finds_the_same_anchors(search, only_records):
    searched = search(delta=ALWAYS, first=3)
    trained = train([searched])[0]
    for stage in stages(trained):
        for path in store.folder(stage.run).glob("measure-*.json"):
            path.unlink()
    only_records(searched.student.method.teacher, *(stage.run for stage in stages(trained)))
    found = train([searched])[0]
    assert anchors(found) == anchors(trained) == [3, 4]
    assert final_weights(found) == final_weights(trained)


def test_a_search_mends_the_damaged_logits_that_it_looks_at(search):
    searched = search(delta=ALWAYS, first=3)
    trained = train([searched])[0]
    seen = divergences(trained)
    for path in store.folder(trained.run.start).glob("measure-*.json"):
        path.unlink()
    truncate(store.logits_path(searched.student.method.teacher, 2))
    assert final_weights(train([searched])[0]) == final_weights(trained)
    assert divergences(trained).equals(seen)


def test_a_search_whose_teacher_was_removed_trains_it_again(search):
    searched = search(delta=ALWAYS, first=3)
    trained = train([searched])[0]
    for path in store.folder(trained.run.start).glob("measure-*.json"):
        path.unlink()
    shutil.rmtree(store.folder(searched.student.method.teacher))
    assert final_weights(train([searched])[0]) == final_weights(trained)


def test_a_first_anchor_beyond_the_teachers_end_is_refused(search):
    with pytest.raises(ValueError, match=r"There is no epoch 5 of .* it has 1 to 4"):
        search(first=5)


def test_a_search_is_foreseen_as_stages_at_even_intervals():
    teacher = Run("cifar100", "resnet50", Recipe(240, 64, 0.05))
    student = Run("cifar100", "mobilenetv2-t4-w0.35", Recipe(240, 64, 0.01), KD(teacher))
    estimate = GreedySearch(student, first=30).estimate()
    assert [run.method.anchor for run in estimate] == [30, 100, 170, 240]
    assert estimate[-1].epochs_before == 720


# --- one teacher, named with and without what is kept of it ---------------------------------------


@pytest.mark.parametrize("more", [{"keep": (1,)}, {"route": True}])
def test_students_may_name_one_teacher_with_different_things_kept(tiny, at_most_16_epochs, more):
    teacher = tiny(epochs=3)
    students = [tiny(method=KD(teacher)), tiny(seed=1, method=KD(replace(teacher, **more)))]
    train(students)
    assert len(at_most_16_epochs) == 3 + 2 + 2


def test_a_search_and_a_plain_student_may_share_its_first_anchor(tiny, search, at_most_16_epochs):
    searched = search(delta=NEVER)
    plain = replace(searched.student.method.teacher, keep=(), route=False)
    results = train([tiny(method=KD(plain, at=1)), searched])
    assert anchors(results[1]) == [1, 4]
    assert len(at_most_16_epochs) == 4 + 2 + 2 + 2


# --- how far a student is from the route ----------------------------------------------------------


@pytest.mark.parametrize("tau", [5.0, 1.0])
def test_the_divergence_from_the_route_is_that_of_eq_6(tiny, tau):
    teacher = route_of(tiny(epochs=3, model="resnet14-x0.25"))
    student = train([tiny(method=KD(teacher, at=2), seed=1)])[0]
    images, x_prime = load_data("digits").first(128), validation(128)
    assert len(x_prime) == 25
    own = softmax(student.model()(images.batch(x_prime)).double().numpy() / tau, axis=1)
    expected = []
    for epoch in (1, 2, 3):
        logits = store.load_logits(store.find_record(teacher), epoch)
        taught = softmax(logits.double().numpy() / tau, axis=1)
        expected.append(np.mean([rel_entr(t, s).sum() for t, s in zip(taught, own, strict=True)]))
    options = {} if tau == 5.0 else {"temperature": tau}
    table = measure(student, divergence_from_route, **options)
    assert table.epoch.tolist() == [1, 2, 3]
    assert table.kl.tolist() == pytest.approx(expected, rel=1e-6)
    assert min(expected) > 1e-6


def test_the_divergence_is_least_from_where_the_student_is(tiny):
    """Here at its teacher's end, learning nothing more."""
    teacher = route_of(tiny(epochs=3))
    student = tiny(epochs=1, lr=0.0, method=KD(teacher), start=teacher, momentum=0.0)
    train([student])
    table = divergence_from_route(store.find_record(student))
    assert table.epoch[table.kl.idxmin()] == 3
    assert table.kl.min() < 0.1 * table.kl.nsmallest(2).max()


# --- logits along the route -----------------------------------------------------------------------


def test_the_route_holds_the_logits_of_every_epoch(tiny):
    run = route_of(tiny(epochs=3))
    trained = train([run])[0]
    x = load_data("digits").first(128).batch(validation(128))
    assert trained.summary["logits"].keys() == {"1", "2", "3"}
    for epoch in (1, 2, 3):
        logits, exact = store.load_logits(trained, epoch), trained.model(epoch)(x)
        assert (logits.dtype, logits.shape) == (torch.float32, (25, 10))
        torch.testing.assert_close(logits, exact, rtol=2**-10, atol=1e-4)
        assert not torch.equal(logits, exact)


def test_without_a_route_no_logits_are_kept(tiny):
    trained = train([tiny()])[0]
    assert "logits" not in trained.summary
    assert not list(store.folder(trained.run).glob("logits-*"))
    with pytest.raises(StoreError, match=r"logits-0001\.safetensors is not there"):
        store.load_logits(trained, 1)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, garble])
def test_damaged_logits_are_named_put_aside_and_made_again(tiny, damage):
    run = tiny(route=True)
    trained = train([run])[0]
    before, path = store.load_logits(trained, 1), store.logits_path(run, 1)
    damage(path)
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        store.load_logits(trained, 1)
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()
    again = train([run])[0]
    assert torch.equal(store.load_logits(again, 1), before)
    assert final_weights(again) == final_weights(trained)


def test_logits_that_the_record_does_not_tell_of_are_not_used(tiny):
    run = tiny(route=True)
    trained = train([run])[0]
    store.save_logits(run, 1, torch.zeros(25, 10))
    with pytest.raises(StoreError, match="not the logits that the record"):
        store.load_logits(trained, 1)


def test_training_again_mends_logits_that_the_record_does_not_tell_of(tiny):
    """As the message promises."""
    run = tiny(route=True)
    trained = train([run])[0]
    before = store.load_logits(trained, 1)
    store.save_logits(run, 1, torch.zeros(25, 10))
    again = train([run], weights=True)[0]
    assert torch.equal(store.load_logits(again, 1), before)


def test_a_run_asked_later_for_its_route_is_trained_again_to_the_same_weights(tiny, epochs_trained):
    run = tiny()
    student = tiny(method=KD(run), seed=1)
    first, taught = train([run, student])
    epochs_trained.clear()
    second = train([replace(run, route=True)])[0]
    assert epochs_trained == [(run.id, 1), (run.id, 2)]
    assert final_weights(second) == final_weights(first)
    assert store.holds_logits(second)
    epochs_trained.clear()
    assert train([run, student])[1].summary == taught.summary
    assert epochs_trained == []


def test_a_route_outlives_a_training_for_another_checkpoint(tiny, epochs_trained):
    train([tiny(route=True)])
    again = train([tiny(keep=(1,))])[0]
    assert len(epochs_trained) == 4
    assert again.summary["logits"].keys() == {"1", "2"}
    assert again.summary["weights"].keys() == {"1", "2"}


def test_a_route_asked_for_twice_in_one_call_is_kept(tiny, epochs_trained):
    for trained in train([tiny(), tiny(route=True), tiny()]):
        assert trained.summary["logits"].keys() == {"1", "2"}
    assert len(epochs_trained) == 2


def test_a_resumed_route_equals_an_uninterrupted_one(tiny, elsewhere, train_until, epochs_trained):
    run = tiny(epochs=3, route=True)
    (expected,) = elsewhere(run)
    train_until(run, 2)
    epochs_trained.clear()
    resumed = train([run])[0]
    assert epochs_trained == [(run.id, 3)]
    assert resumed.summary["logits"] == expected.summary["logits"]
    assert store.holds_logits(resumed)


def test_a_half_trained_run_asked_for_its_route_starts_anew(tiny, train_until, epochs_trained):
    run = tiny(epochs=3)
    train_until(run, 2)
    epochs_trained.clear()
    trained = train([replace(run, route=True)])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 3]
    assert store.holds_logits(trained)


# --- the validation images ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 128, 1438, 50_000])
def test_validation_is_a_fifth_of_the_training_images_sorted_and_distinct(n):
    chosen = validation(n)
    assert chosen.dtype == torch.int64
    assert len(chosen) == n // 5
    assert (chosen.diff() > 0).all()
    assert ((chosen >= 0) & (chosen < n)).all()


def test_validation_is_drawn_from_everywhere():
    quarters = torch.bincount(validation(50_000) // 12_500, minlength=4)
    assert ((quarters - 2500).abs() < 200).all()


def test_validation_depends_on_the_number_of_images_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = validation(1000)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(validation(1000), first)


def test_the_validation_images_are_those_the_published_results_were_made_with():
    """Fails where torch draws other numbers: raise ENGINE_VERSION then."""
    digest = hashlib.sha256(validation(50_000).numpy().tobytes()).hexdigest()
    assert digest[:16] == "b277d4d7cffefc31"


def test_a_run_that_fails_stops_no_search_beside_it(tiny, search):
    bad, searched = tiny(lr=1e30), search(delta=NEVER)
    with pytest.raises(NotFinite, match=bad.id):
        train([bad, searched])
    stages_trained = store.find_record(multi_stage(searched.student, [1, 4])[-1])
    assert stages_trained is not None


def test_the_students_of_a_teacher_that_fails_are_not_trained(tiny, epochs_trained):
    bad = tiny(lr=1e30)
    good = tiny(seed=1)
    with pytest.raises(NotFinite, match=bad.id):
        train([tiny(method=KD(bad)), good])
    assert {run for run, _ in epochs_trained} == {bad.id, good.id}
