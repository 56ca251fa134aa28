"""The counted cost of whole trainings, and differences at equal cost."""

from dataclasses import replace

import numpy as np
import pytest

from kdbook.contrasts import interval
from kdbook.costs import at_equal_cost, spent, step_macs
from kdbook.exhibits import Exhibit
from kdbook.profiles import open_profile
from kdlib import (
    FSP,
    KD,
    KR,
    STC,
    AttentionTransfer,
    FactorTransfer,
    MutualLearning,
    build_model,
    count_cost,
    load_data,
    multi_stage,
    paraphrase,
)
from kdlib.methods import CrossEntropy

IMAGES, SIZE = 128, 8


def forward(model):
    return count_cost(build_model(model, classes=10, channels=1, seed=0), SIZE, channels=1)


def trained_from_labels(model):
    """Three passes, but for the gradient of the first layer's input, which nothing needs."""
    cost = forward(model)
    first = next(iter(cost.layers.values()))
    return 3 * cost.macs - first


@pytest.fixture
def teacher(tiny):
    return tiny(epochs=3, model="resnet14-x0.25")


def test_a_training_from_labels_is_a_forward_pass_and_two_backward(tiny):
    run = tiny(epochs=2)
    found = spent(run)
    assert found == (2 * IMAGES * trained_from_labels(run.model), 0, 0, 0)
    assert found.given_teacher == sum(found)


def test_a_fixed_teacher_labels_each_view_once(tiny, teacher):
    found = spent(tiny(epochs=2, method=KD(teacher)))
    views = load_data("digits").views
    passes = views * (1 - (1 - 1 / views) ** 2)
    assert found.labels == pytest.approx(passes * IMAGES * forward(teacher.model).macs)
    assert found.beside == 0
    assert found.teachers == 3 * IMAGES * trained_from_labels(teacher.model)
    assert found.given_teacher == sum(found) - found.teachers


def test_a_teacher_of_features_runs_forward_in_every_step(tiny, teacher):
    found = spent(tiny(epochs=2, method=AttentionTransfer(teacher)))
    stages = forward(teacher.model).macs - forward(teacher.model).layers["head.2"]
    assert found.beside == pytest.approx(2 * IMAGES * stages, rel=0.01)
    assert found.labels == 0


def test_a_peer_is_trained_along(tiny):
    run = tiny(epochs=2, method=MutualLearning("resnet14-x0.25", tiny().recipe))
    assert spent(run).beside == 2 * IMAGES * trained_from_labels("resnet14-x0.25")
    assert spent(run).teachers == 0


def test_two_updates_of_the_student_cost_twice_its_steps(tiny, teacher):
    run = tiny(epochs=2, method=KR(teacher, prior=tiny().recipe))
    plain = 2 * IMAGES * trained_from_labels(run.model)
    assert spent(run).student == plain
    assert spent(run).beside > 0.9 * plain + 2 * IMAGES * 0.9 * forward(teacher.model).macs


def test_the_back_of_the_teacher_is_passed_twice(tiny, teacher):
    """Forward, and backward to its input; its weights have no gradient."""
    run = tiny(method=STC(teacher, alpha=0.3, cut=2))
    layers = forward(teacher.model).layers
    back = sum(macs for name, macs in layers.items() if name.startswith(("body.2", "head")))
    extra = step_macs(run) - step_macs(run, CrossEntropy())
    assert extra == 2 * back


def test_all_stages_count_and_a_shared_teacher_once(tiny, teacher):
    first = tiny(epochs=2, method=KD(teacher))
    chain = multi_stage(first, (1, 3))[-1]
    assert spent(chain).student == 2 * spent(first).student
    assert spent(chain).teachers == spent(first).teachers
    flowing = tiny(epochs=1, model="resnet8-x0.25", method=FSP(teacher, ce_weight=0))
    after = replace(tiny(epochs=2), start=flowing)
    assert spent(after).student == 3 * IMAGES * trained_from_labels(after.model)
    assert spent(after).beside == spent(flowing).beside > 0


def test_a_paraphraser_counts_beside_its_student(tiny, teacher):
    factors = paraphrase(teacher, tiny(epochs=1).recipe)
    run = tiny(epochs=2, method=FactorTransfer(teacher, paraphraser=factors))
    own = 2 * IMAGES * (step_macs(run) - step_macs(run, CrossEntropy()))
    assert spent(run).student == 2 * IMAGES * trained_from_labels(run.model)
    assert spent(run).beside == own + IMAGES * step_macs(factors)
    assert spent(run).teachers == 3 * IMAGES * trained_from_labels(teacher.model)


def test_a_difference_at_equal_cost_is_interpolated_by_seed():
    made = Exhibit("book/methods", open_profile("smoke"))
    made.cells.update(
        {
            ("one", "top1"): {0: 50.0, 1: 52.0},
            ("four", "top1"): {0: 54.0, 1: 58.0},
            ("new", "top1"): {0: 53.0, 1: 56.0, 2: 99.0},
        }
    )
    costs = {"one": 1.0, "four": 4.0, "new": 2.0}
    table = at_equal_cost(made, "top1", ["new", "four"], ["four", "one"], costs)
    gaps = np.array([53.0 - 52.0, 56.0 - 55.0])  # 2 is in the middle between 1 and 4
    assert table.ours["new"] == pytest.approx(1)
    assert (table.low["new"], table.high["new"]) == pytest.approx(interval(gaps))
    assert table.ours["four"] == 0
    assert table.place.tolist() == ["between", "between"]
    for cost, place, gap in ((0.5, "below", (3.0, 4.0)), (8.0, "above", (-1.0, -2.0))):
        table = at_equal_cost(made, "top1", ["new"], ["one", "four"], costs | {"new": cost})
        assert table.place["new"] == place
        assert table.ours["new"] == pytest.approx(np.mean(gap))
