"""Passes of teachers over the images: the counted number, and the real one."""

from collections import Counter
from dataclasses import replace

import pytest

from kdlib import KD, KDGAN, load_data, store, train
from kdlib.engine.passes import TeacherPasses, teacher_passes
from kdlib.engine.plan import plan
from kdlib.engine.train import CACHES
from kdlib.methods import STC, AttentionTransfer, FactorTransfer, Hint, paraphrase
from kdlib.methods.route import OneStage, multi_stage


def simulated(runs):
    """Passes by checkpoint: the distinct (image, view) of the plans, per image."""
    images = load_data("digits")
    asked = {}
    for run in runs:
        for epoch in range(run.recipe.epochs):
            order, views = plan(run.seed, run.epochs_before + epoch, len(images), images.views)
            pairs = zip(order.tolist(), views.tolist(), strict=True)
            asked.setdefault(run.method.teacher_at(epoch), set()).update(pairs)
    return {checkpoint: len(pairs) / len(images) for checkpoint, pairs in asked.items()}


@pytest.fixture
def on_all_images(tiny):
    return lambda epochs, **others: replace(tiny(epochs=epochs, **others), images=None)


# --- counted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [1, 4])
def test_the_expected_passes_are_those_of_the_plans(on_all_images, gap):
    teacher = on_all_images(9)
    runs = [on_all_images(9, seed=seed, method=OneStage(KD(teacher), gap)) for seed in range(3)]
    expected, passes = simulated(runs), teacher_passes(runs)
    assert passes.keys() == expected.keys()
    for checkpoint, counted in passes.items():
        assert counted.cached == pytest.approx(expected[checkpoint], rel=0.03)
        assert counted.cached < counted.uncached
    assert sum(counted.uncached for counted in passes.values()) == 27


def test_a_cache_needs_no_more_passes_than_there_are_views(on_all_images):
    runs = [on_all_images(60, seed=seed, method=KD(on_all_images(9))) for seed in range(4)]
    (counted,) = teacher_passes(runs).values()
    assert counted.uncached == 240
    assert counted.cached == pytest.approx(9, rel=1e-6)


def test_students_of_one_seed_share_their_logits(on_all_images):
    teacher = on_all_images(9)
    models = ("resnet8-x0.25", "resnet8-x0.5", "resnet8-x0.75")
    several = [on_all_images(4, model=model, method=KD(teacher)) for model in models]
    (alone,), (together,) = (teacher_passes(runs).values() for runs in (several[:1], several))
    assert (alone.uncached, together.uncached) == (4, 12)
    assert together.cached == alone.cached
    assert together.cached == pytest.approx(simulated(several)[teacher, 9], rel=0.03)


def test_later_stages_see_other_views(on_all_images):
    """They continue the order of images, so that one checkpoint twice is two plans."""
    student = on_all_images(3, method=KD(on_all_images(9)))
    runs = multi_stage(student, (9, 9))
    (counted,) = teacher_passes(runs).values()
    assert counted.cached == pytest.approx(simulated(runs)[student.method.teacher, 9], rel=0.03)
    assert counted.cached > 1.5 * teacher_passes(runs[:1])[student.method.teacher, 9].cached


def test_passes_for_features_are_never_cached(on_all_images):
    teacher = on_all_images(9)
    lender = paraphrase(teacher, teacher.recipe)
    methods = [
        Hint(teacher),
        AttentionTransfer(teacher, kd_weight=0.9),
        FactorTransfer(teacher, paraphraser=lender),
        STC(teacher, target="truth"),
    ]
    for method in methods:
        (counted,) = teacher_passes([on_all_images(6, method=method)]).values()
        assert counted == TeacherPasses(uncached=6, cached=6, features=6)
    assert teacher_passes([lender]) == {(teacher, 9): TeacherPasses(9, 9, 9)}
    together = teacher_passes([on_all_images(6, method=m) for m in [*methods, KD(teacher)]])
    assert together[teacher, 9].uncached == 30
    assert together[teacher, 9].features == 24
    assert together[teacher, 9].cached == pytest.approx(24 + 9 * (1 - (8 / 9) ** 6))


@pytest.mark.parametrize("settings", [{}, {"target": "soft"}, {"target": "label"}])
def test_collaboration_needs_the_logits_of_kd_and_runs_its_teacher_as_well(on_all_images, settings):
    teacher = on_all_images(9)
    runs = [on_all_images(6, seed=seed, method=STC(teacher, **settings)) for seed in range(2)]
    kd = [on_all_images(6, seed=seed, method=KD(teacher)) for seed in range(2)]
    (counted,), (of_kd,) = teacher_passes(runs).values(), teacher_passes(kd).values()
    assert (counted.uncached, counted.features) == (24, 12)
    assert counted.cached - counted.features == pytest.approx(of_kd.cached)
    truth = STC(teacher, target="truth", kd_weight=0.9)
    assert teacher_passes([on_all_images(6, method=truth)]) == teacher_passes(runs[:1])


def test_the_teacher_of_kdgan_makes_no_pass(on_all_images, computed_logits):
    """Only its copy, which the student's run trains, runs in every step."""
    teacher = on_all_images(1)
    method = KDGAN(teacher, discriminator=teacher.recipe, copy=teacher.recipe)
    assert teacher_passes([on_all_images(6, method=method)]) == {
        (teacher, 1): TeacherPasses(0, 0, 0)
    }
    train([on_all_images(1, method=method)])
    assert {split for _, split, *_ in computed_logits} == {"test"}


def test_runs_without_a_teacher_need_no_pass(on_all_images):
    assert teacher_passes([on_all_images(3)]) == {}


@pytest.mark.parametrize(
    ("uncached", "cached", "features", "share", "saves"),
    [
        (100, 90, 0, 0.1, True),
        (100, 90.1, 0, 0.1, False),
        (110, 100, 10, 0.1, True),  # ten of a hundred passes for logits
        (110, 100.5, 10, 0.1, False),
        (1, 1, 0, 0.1, False),
        (50, 50, 50, 0.1, True),  # no pass for logits
        (10, 10, 0, 0.0, True),
    ],
)
def test_a_cache_is_worth_its_memory_by_the_passes_for_logits_alone(
    uncached, cached, features, share, saves
):
    assert TeacherPasses(uncached, cached, features).saves(share) is saves


# --- real -----------------------------------------------------------------------------------------


def passes(computed, split, images):
    return sum(one[1] == split for one in computed) / images


@pytest.mark.parametrize(
    "method",
    [
        KD,
        lambda teacher: OneStage(KD(teacher), gap=4),
        STC,
        lambda teacher: STC(teacher, target="truth"),
    ],
    ids=["KD", "OneStage", "STC", "STC truth"],
)
def test_training_makes_the_counted_passes(on_all_images, computed_logits, method):
    run = on_all_images(4, batch=64, method=method(on_all_images(4, batch=64)))
    train([run])
    (counted,) = teacher_passes([run]).values()
    # the images that fill no batch in the last epoch need no logits
    expected = counted.cached - counted.features
    assert passes(computed_logits, "train", 1438) == pytest.approx(expected, rel=0.03)
    assert passes(computed_logits, "test", 359) == 1
    assert len(computed_logits) - len({*computed_logits}) <= 0.01 * len(computed_logits)


def train_caches():
    """For each cache of training images, whether it keeps logits."""
    return [cache.place is not None for key, cache in CACHES.caches.items() if key[2] == "train"]


@pytest.mark.parametrize(("epochs", "gap", "kept"), [(3, 1, [False] * 3), (6, 3, [True] * 2)])
def test_logits_are_kept_unless_their_teacher_is_short_lived(tiny, epochs, gap, kept):
    train([tiny(epochs=epochs, method=OneStage(KD(tiny(epochs=epochs)), gap))])
    assert train_caches() == kept


@pytest.mark.parametrize("parallel", [1, 2])
def test_students_share_the_logits_of_teachers_of_one_epoch(tiny, computed_logits, parallel):
    teacher = tiny(epochs=2)
    runs = [tiny(lr=lr, method=OneStage(KD(teacher), gap=1)) for lr in (0.05, 0.1)]
    train(runs, parallel=parallel)
    assert train_caches() == [True] * 2
    weights = store.find_record(teacher).summary["weights"]
    computed = Counter(one[0] for one in computed_logits if one[1] == "train")
    assert computed.keys() == {weights["1"], weights["2"]}
    assert max(computed.values()) <= 128 + 24


def test_logits_of_a_formerly_short_lived_teacher_are_kept_for_many_students(tiny, computed_logits):
    teacher = tiny()
    train([tiny(method=KD(teacher))])
    computed_logits.clear()
    train([tiny(method=KD(teacher), lr=lr) for lr in (0.1, 0.2, 0.3)], parallel=3)
    assert passes(computed_logits, "train", 128) <= 2
