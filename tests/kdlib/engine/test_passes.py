"""What labels cost: counted before, and asked of the teachers in fact."""

from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
from helpers import final_weights, same_log

from kdlib import KD, load_data, store, train
from kdlib.engine import plan
from kdlib.engine.passes import TeacherPasses, ancestry, teacher_passes
from kdlib.engine.train import CACHES
from kdlib.methods import STC, AttentionTransfer, FactorTransfer, Hint, paraphrase
from kdlib.methods.route import OneStage, multi_stage

train_module = import_module("kdlib.engine.train")


def simulated(runs):
    """Passes by anchor: the distinct (image, view) of the plans themselves, per image."""
    images = load_data("digits")
    asked = {}
    for run in runs:
        for epoch in range(run.recipe.epochs):
            order, views = plan(run.seed, run.epochs_before + epoch, len(images), images.views)
            pairs = zip(order.tolist(), views.tolist(), strict=True)
            asked.setdefault(run.method.teacher_at(epoch), set()).update(pairs)
    return {anchor: len(pairs) / len(images) for anchor, pairs in asked.items()}


@pytest.fixture
def whole(tiny):
    """Runs on all training images: ``whole(epochs, **what differs)``."""
    return lambda epochs, **others: replace(tiny(epochs=epochs, **others), images=None)


# --- counted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 3, 4, 9])
def test_the_expected_sweeps_are_those_of_actual_plans(whole, gap):
    teacher = whole(9)
    runs = [whole(9, seed=seed, method=OneStage(KD(teacher), gap)) for seed in range(3)]
    expected, sweeps = simulated(runs), teacher_passes(runs)
    assert sweeps.keys() == expected.keys()
    for anchor, counted in sweeps.items():
        assert counted.banked == pytest.approx(expected[anchor], rel=0.03)
        assert counted.banked < counted.live
    assert sum(counted.live for counted in sweeps.values()) == 27


def test_no_more_is_swept_than_there_are_views(whole):
    runs = [whole(60, seed=seed, method=KD(whole(9))) for seed in range(4)]
    (counted,) = teacher_passes(runs).values()
    assert counted.live == 240
    assert counted.banked == pytest.approx(9, rel=1e-6)


def test_students_of_one_seed_share_their_labels(whole):
    teacher = whole(9)
    one = [whole(4, method=KD(teacher))]
    several = [*one, *(whole(4, model=f"resnet8-x{x}", method=KD(teacher)) for x in (0.5, 0.75))]
    (alone,), (together,) = (teacher_passes(runs).values() for runs in (one, several))
    assert (alone.live, together.live) == (4, 12)
    assert together.banked == alone.banked
    assert together.banked == pytest.approx(simulated(several)[teacher, 9], rel=0.03)


def test_later_stages_see_other_views(whole):
    """They go on in the order of images, so that one anchor twice is two plans."""
    student = whole(3, method=KD(whole(9)))
    runs = multi_stage(student, (9, 9))
    (counted,) = teacher_passes(runs).values()
    assert counted.banked == pytest.approx(simulated(runs)[student.method.teacher, 9], rel=0.03)
    assert counted.banked > 1.5 * teacher_passes(runs[:1])[student.method.teacher, 9].banked


def test_live_teachers_are_never_banked(whole):
    teacher = whole(9)
    runs = [whole(6, method=Hint(teacher)), whole(6, method=Hint(teacher, hint_weight=2.0))]
    (counted,) = teacher_passes(runs).values()
    assert counted.live == counted.banked == 12
    mixed = teacher_passes([*runs, whole(6, method=KD(teacher))])[teacher, 9]
    assert mixed.live == 18
    assert mixed.banked == pytest.approx(12 + 9 * (1 - (8 / 9) ** 6))


def test_what_is_made_for_features_is_told_apart(whole):
    teacher = whole(9)
    lender = paraphrase(teacher, teacher.recipe)
    live = [
        Hint(teacher),
        AttentionTransfer(teacher, kd_weight=0.9),
        FactorTransfer(teacher, paraphraser=lender),
        STC(teacher, target="truth"),
    ]
    for method in live:
        (counted,) = teacher_passes([whole(6, method=method)]).values()
        assert counted == TeacherPasses(live=6, banked=6, features=6)
    assert teacher_passes([lender]) == {(teacher, 9): TeacherPasses(live=9, banked=9, features=9)}
    together = teacher_passes([whole(6, method=method) for method in [*live, KD(teacher)]])
    assert together[teacher, 9].live == 30
    assert together[teacher, 9].features == 24
    assert together[teacher, 9].banked == pytest.approx(24 + 9 * (1 - (8 / 9) ** 6))


@pytest.mark.parametrize("settings", [{}, {"target": "soft"}, {"target": "label"}])
def test_collaboration_asks_for_labels_as_kd_does_and_runs_its_teacher_besides(whole, settings):
    teacher = whole(9)
    runs = [whole(6, seed=seed, method=STC(teacher, **settings)) for seed in range(2)]
    kd = [whole(6, seed=seed, method=KD(teacher)) for seed in range(2)]
    (counted,), (labels,) = teacher_passes(runs).values(), teacher_passes(kd).values()
    assert (counted.live, counted.features) == (24, 12)
    assert counted.banked - counted.features == pytest.approx(labels.banked)
    truth = STC(teacher, target="truth", kd_weight=0.9)
    assert teacher_passes([whole(6, method=truth)]) == teacher_passes(runs[:1])


@pytest.mark.parametrize(
    ("live", "banked", "features", "share", "worth"),
    [
        (100, 90, 0, 0.1, True),
        (100, 90.1, 0, 0.1, False),
        (100, 9, 0, 0.1, True),
        (110, 100, 10, 0.1, True),  # ten of a hundred passes for labels
        (110, 100.5, 10, 0.1, False),
        (200, 189.5, 100, 0.1, True),
        (1, 1, 0, 0.1, False),
        (50, 50, 50, 0.1, True),  # nothing to save, nothing to hold
        (10, 10, 0, 0.0, True),
    ],
)
def test_a_bank_is_worth_its_memory_by_the_passes_for_labels_alone(
    live, banked, features, share, worth
):
    assert TeacherPasses(live, banked, features).worth(share) is worth


def test_runs_without_a_teacher_cost_no_sweeps(whole):
    assert teacher_passes([whole(3)]) == {}


def test_ancestry_is_each_run_once_the_oldest_first(tiny):
    teacher = tiny(seed=7)
    chain = multi_stage(tiny(method=KD(teacher)), (1, 2))
    found = ancestry([chain[1], tiny(seed=3), tiny(seed=5, method=KD(teacher)), chain[0]])
    assert found == [teacher, *chain, tiny(seed=3), tiny(seed=5, method=KD(teacher))]


# --- asked in fact --------------------------------------------------------------------------------


def passes(swept, split, images):
    return sum(ask[1] == split for ask in swept) / images


@pytest.mark.parametrize("method", [KD, lambda teacher: OneStage(KD(teacher), gap=6)])
def test_training_sweeps_its_teacher_as_often_as_was_counted(whole, swept, method):
    run = whole(6, batch=64, method=method(whole(6, batch=64)))
    train([run])
    (counted,) = teacher_passes([run]).values()
    # the last, broken batch of the last epoch asks for no labels
    assert passes(swept, "train", 1438) == pytest.approx(counted.banked, rel=0.03)
    assert passes(swept, "test", 359) == 1
    assert max(Counter(swept).values()) == 1 or len(swept) - len(set(swept)) < 0.01 * len(swept)


def train_banks():
    """Of the training images, whether they remember."""
    return [bank.place is not None for key, bank in CACHES.banks.items() if key[2] == "train"]


def test_a_teacher_of_one_epoch_is_not_remembered_and_no_number_changes(
    tiny, elsewhere, monkeypatch
):
    run = tiny(epochs=3, method=OneStage(KD(tiny(epochs=3)), gap=1))
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "WORTH", -1.0)  # then nothing is passing
        seen = []
        clear = CACHES.clear
        patch.setattr(CACHES, "clear", lambda: (seen.extend(train_banks()), clear()))
        (remembered,) = elsewhere(run)
    assert seen == [True] * 3
    passing = train([run])[0]
    assert train_banks() == [False] * 3
    assert final_weights(passing) == final_weights(remembered)
    assert same_log(passing, remembered)


def test_teachers_of_many_epochs_are_remembered(tiny):
    train([tiny(epochs=6, method=OneStage(KD(tiny(epochs=6)), gap=3))])
    assert train_banks() == [True] * 2


def test_a_bank_is_kept_beside_students_of_features(tiny):
    """Whose passes for features would hide that it saves most of those for labels."""
    teacher = tiny(epochs=4)
    features = [tiny(epochs=20, seed=seed, method=Hint(teacher)) for seed in range(2)]
    shared = [tiny(epochs=3, lr=lr, method=KD(teacher)) for lr in (0.05, 0.02)]
    counted = teacher_passes([*features, *shared])[teacher, 4]
    assert counted.banked > 0.9 * counted.live
    train([*features, *shared])
    assert train_banks() == [True]


@pytest.mark.parametrize("target", ["output", "truth"])
def test_collaboration_sweeps_its_teacher_as_often_as_was_counted(whole, swept, target):
    run = whole(3, batch=64, method=STC(whole(3, batch=64), target=target))
    train([run])
    (counted,) = teacher_passes([run]).values()
    expected = counted.banked - counted.features
    assert passes(swept, "train", 1438) == pytest.approx(expected, rel=0.03)
    assert passes(swept, "test", 359) == 1


def test_teachers_of_one_epoch_that_several_lanes_share_are_remembered(tiny, swept):
    teacher = tiny(epochs=2)
    runs = [tiny(lr=lr, method=OneStage(KD(teacher), gap=1)) for lr in (0.05, 0.1)]
    train(runs, lanes=2)
    assert train_banks() == [True] * 2
    kept = store.find_record(teacher).summary["weights"]
    for anchor in ("1", "2"):
        asked = [ask for ask in swept if ask[:2] == (kept[anchor], "train")]
        assert len(asked) == pytest.approx(128, abs=24)


def test_only_a_few_teachers_of_one_epoch_are_at_hand(tiny):
    epochs = 12
    train([tiny(epochs=epochs, method=OneStage(KD(tiny(epochs=epochs)), gap=1))])
    assert len(CACHES.banks) == CACHES.AT_HAND


PASSING = "whether a bank remembers is asked once, of the lanes that run just then: _run_lanes"


def test_students_of_one_seed_share_labels_one_after_another_too(tiny, swept):
    """As on a CPU, or where there are more of them than lanes."""
    teacher = tiny(epochs=2)
    train([tiny(lr=lr, method=OneStage(KD(teacher), gap=1)) for lr in (0.05, 0.1)], lanes=1)
    assert passes(swept, "train", 128) <= 2


def test_a_bank_that_was_passing_remembers_when_many_ask(tiny, swept):
    teacher = tiny()
    train([tiny(method=KD(teacher))])
    swept.clear()
    train([tiny(method=KD(teacher), lr=lr) for lr in (0.1, 0.2, 0.3)], lanes=3)
    assert passes(swept, "train", 128) <= 2


@pytest.mark.parametrize("method", [KD, Hint])
def test_test_images_are_labelled_once_by_each_anchor(tiny, swept, method):
    train([tiny(method=method(tiny()))])
    assert passes(swept, "test", 359) == 1
