"""RCO: checkpoints of the teacher's route as anchors, in one stage or in several."""

import math

import numpy as np
import pytest
from by_hand import assert_same_weights, first_student, kl, train_by_hand
from helpers import final_weights, new_trainer
from torch.nn import functional as F

from kdlib import KD, store, train
from kdlib.methods.route import OneStage, hardness, multi_stage, next_anchor
from kdlib.models import load_weights
from kdlib.store import fingerprint

# --- one stage ------------------------------------------------------------------------------------


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
    method = OneStage(KD(tiny(epochs=7)), gap)
    assert [method.teacher_at(epoch).epoch for epoch in range(9)] == expected
    assert {checkpoint.epoch for checkpoint in method.checkpoints(9)} == {*expected}


@pytest.mark.parametrize("gap", [0, -1, 1.28e-3, 1.5])
def test_a_gap_that_is_no_positive_whole_number_is_refused(tiny, gap):
    with pytest.raises(ValueError, match=rf"gap={gap}"):
        OneStage(KD(tiny()), gap)


def test_a_whole_gap_may_be_a_float(tiny):
    """As 240 / 20 is."""
    method = OneStage(KD(tiny(epochs=4)), 2.0)
    assert method == OneStage(KD(tiny(epochs=4)), 2)
    assert isinstance(method.gap, int)


@pytest.mark.parametrize(
    ("gap", "stride", "expected"),
    [(1, 3, [3, 6, 9, 10]), (2, 5, [5, 5, 10, 10]), (2, None, [2, 2, 4, 4])],
)
def test_a_teacher_with_longer_training_has_anchors_in_its_own_epochs(tiny, gap, stride, expected):
    method = OneStage(KD(tiny(epochs=10)), gap, stride)
    assert [method.teacher_at(epoch).epoch for epoch in range(4)] == expected


def test_a_stride_of_one_gap_is_none_and_changes_no_id(tiny):
    teacher = tiny(epochs=4)
    same = [tiny(method=OneStage(KD(teacher), 2, stride), seed=1) for stride in (None, 2, 2.0)]
    assert len({run.id for run in same}) == 1
    assert tiny(method=OneStage(KD(teacher), 2, 4), seed=1).id != same[0].id
    for stride in (0, 1.5):
        with pytest.raises(ValueError, match=f"stride={stride}"):
            OneStage(KD(teacher), 2, stride)


def test_each_epoch_learns_from_its_own_anchor_at_a_rate_that_continues(tiny):
    teacher = tiny(epochs=4)
    methods = OneStage(KD(teacher), gap=2), KD(teacher, at=2)
    one, first = train(
        [tiny(epochs=4, milestones=(1, 3), decay=0.5, method=method) for method in methods]
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
    """Two stages, of anchors 1 and 3; their batches cross the borders of epochs."""
    teacher = tiny(epochs=3, model="resnet14-x0.25", keep=(1, 2))
    student = tiny(epochs=3, milestones=(2,), decay=0.3, seed=1, method=KD(teacher))
    return multi_stage(student, (1, 3))


@pytest.mark.parametrize("at", [1, 3])
def test_one_stage_alone_is_plain_distillation_from_its_anchor(tiny, at):
    teacher = tiny(epochs=3)
    (stage,) = multi_stage(tiny(method=KD(teacher)), [at])
    plain = tiny(method=KD(teacher, at=at))
    assert (stage, stage.id) == (plain, plain.id)


def test_each_stage_starts_from_the_weights_of_the_one_before_and_nothing_else(chain):
    first, second = train(chain)
    state = new_trainer(second.run).state
    assert fingerprint(state.modules["student"].state_dict()) == final_weights(first)
    assert not state.optimizers["student"].state
    assert second.log.lr.tolist() == first.log.lr.tolist() == [0.05, 0.05, pytest.approx(0.015)]
    teacher = first.run.method.teacher
    kept = store.find_record(teacher).summary["weights"]
    assert first.summary["teachers"] == {f"{teacher.id}@1": kept["1"]}
    assert second.summary["teachers"] == {
        f"{teacher.id}@3": kept["3"],
        f"{first.run.id}@3": final_weights(first),
    }


def test_a_later_stage_equals_a_plain_pytorch_loop(chain):
    first, second = train(chain)
    run = second.run
    teacher, model = store.find_record(run.method.teacher).model(), first_student(run)
    load_weights(model, first.model().state_dict())

    def losses(x, labels):
        logits = model(x)
        yield F.cross_entropy(logits, labels) + kl(teacher(x), logits, 5)

    train_by_hand(run, losses, (run.recipe, [model]))
    assert_same_weights(second.model().state_dict(), model)


def test_a_resumed_stage_equals_an_uninterrupted_one(chain, assert_resumes, epochs_trained):
    assert_resumes(chain[1])
    train(chain)
    ids = [run for run, _ in epochs_trained]
    assert chain[0].method.teacher.id not in ids  # one training serves all stages


def test_the_first_stage_keeps_the_start_of_the_student(tiny):
    student = tiny(method=KD(tiny()), start=tiny(seed=3), keep=(1,))
    first = multi_stage(student, [1, 2])[0]
    assert (first.start, first.keep) == (tiny(seed=3), ())


# --- the next anchor ------------------------------------------------------------------------------

# H by the teacher's epoch; the last epoch, 7, is never tested.
H = {1: 0.5, 2: 0.6, 3: 0.8, 4: 1.0, 5: 2.0, 6: 0.5, 7: 9.0}


def test_hardness_is_the_relative_rise_of_the_divergence():
    assert hardness(H, 4) == {5: 1.0, 6: -0.5, 7: 8.0}
    assert hardness(H, 1) == pytest.approx({2: 0.2, 3: 0.6, 4: 1.0, 5: 3.0, 6: 0.0, 7: 17.0})
    assert hardness(H, 7) == {}


@pytest.mark.parametrize(
    ("anchor", "delta", "expected"),
    [
        (1, 0.8, 3),  # r = 0.2, 0.6, 1.0: epoch 4 is the first that is too hard
        (1, 3.5, 7),  # no epoch is too hard; 7 with r = 17 is not tested
        (4, 0.8, 5),  # r = 1: no progress, so the next epoch
        (4, 1.0, 7),  # r = 1 is not above 1
        (5, 0.8, 7),  # all later epochs are easier than the anchor itself
        (1, 0.1, 2),  # epoch 2 is too hard; 6 is easier again and does not count
    ],
)
def test_the_next_anchor_is_the_last_epoch_before_one_too_hard(anchor, delta, expected):
    assert next_anchor(H, anchor, delta) == expected
    assert next_anchor(dict(reversed(H.items())), anchor, delta) == expected


def test_the_default_of_delta_is_that_of_the_paper():
    assert next_anchor(H, 1) == next_anchor(H, 1, 0.8) != next_anchor(H, 1, 1.5)


@pytest.mark.parametrize(
    ("anchor", "delta", "every", "expected"),
    [
        (1, 0.8, 2, 2),  # 4 is too hard, 3 is no candidate
        (1, 0.1, 3, 3),  # 2 is too hard: the next candidate
        (2, 0.5, 2, 4),  # 4 is too hard, 3 is no candidate: no progress
        (4, 0.8, 3, 6),  # 5 is too hard though it is no candidate
        (6, -2.0, 6, 7),  # only the last epoch is left
    ],
)
def test_only_candidates_and_the_last_epoch_become_anchors(anchor, delta, every, expected):
    assert next_anchor(H, anchor, delta, range(every, 100, every)) == expected


def algorithm_2(h, i, delta):
    """As printed in the paper, with its 1-based table in a list."""
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
    without_progress = 0
    for _ in range(300):
        h = [math.nan, *random.uniform(0.5, 1.5, size=random.integers(2, 12))]
        i = int(random.integers(1, len(h) - 1))
        printed = algorithm_2(h, i, delta=0.8)
        without_progress += printed == i
        divergence = dict(enumerate(h[1:], 1))
        assert next_anchor(divergence, i, 0.8) == max(printed, i + 1)
    assert 0 < without_progress < 200


def test_no_anchor_follows_the_last_epoch():
    with pytest.raises(ValueError, match="No anchor follows epoch 7"):
        next_anchor(H, 7)
