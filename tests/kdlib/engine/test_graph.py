"""The graph of runs: teachers before students, and the part that is left to train."""

from dataclasses import replace

import pytest
from helpers import final_weights, replace_weights

from kdlib import KD, store, train
from kdlib.engine.graph import ancestry, is_complete, next_level, refuse_repetition
from kdlib.errors import StoreError
from kdlib.methods.route import multi_stage


@pytest.fixture
def family(tiny):
    """A teacher, its student, and a student that starts from that student."""
    teacher = tiny()
    student = tiny(seed=1, method=KD(teacher))
    return teacher, student, tiny(seed=2, start=student)


def level(runs, weights=False, failures=None):
    return next_level(runs, weights, {} if failures is None else failures)


# --- ancestry -------------------------------------------------------------------------------------


def test_ancestry_lists_each_run_once_and_parents_first(tiny):
    teacher = tiny(seed=7)
    chain = multi_stage(tiny(method=KD(teacher)), (1, 2))
    others = [tiny(seed=3), tiny(seed=5, method=KD(teacher))]
    found = ancestry([chain[1], *others, chain[0], chain[1]])
    assert len(found) == 5
    assert {*found} == {teacher, *chain, *others}
    for run in found:
        assert all(found.index(parent) < found.index(run) for parent, _ in run.parents)


def test_mentions_of_one_run_are_merged(tiny):
    """They may differ in the checkpoints and logits to keep, of their teachers too."""
    teacher = tiny(epochs=4)
    mentions = [
        replace(teacher, keep=(2,)),
        tiny(method=KD(teacher, at=1)),
        tiny(seed=1, method=KD(replace(teacher, save_logits=True))),
        tiny(seed=1, keep=(1,), method=KD(replace(teacher, keep=(3,)))),
    ]
    for order in (mentions, mentions[::-1]):
        found = {run.id: run for run in ancestry(order)}
        assert len(found) == 3
        assert found[teacher.id].keep == (1, 2, 3, 4)
        assert found[teacher.id].save_logits
        assert found[mentions[3].id].keep == (1,)
        assert not found[mentions[3].id].save_logits
        first, *rest = level(order)
        assert (first, first.keep, first.save_logits, rest) == (teacher, (1, 2, 3, 4), True, [])


# --- levels ---------------------------------------------------------------------------------------


def test_levels_come_teachers_first(tiny, family):
    teacher, student, grandchild = family
    alone = tiny(seed=9)
    expected = [{teacher, alone}, {student}, {grandchild}]
    for runs in expected:
        found = level([grandchild, alone])
        assert {*found} == runs
        train(found)
    assert level([grandchild, alone]) == []


def test_a_complete_run_needs_no_parents_unless_weights_are_asked_for(family, only_records):
    teacher, _, grandchild = family
    trained = train([*family])
    only_records(*trained)
    assert level([grandchild]) == []
    assert level([grandchild], weights=True) == [teacher]
    assert level([teacher], weights=True) == [teacher]
    # an incomplete run needs the weights of its own teacher
    assert level([replace(grandchild, seed=5)]) == [teacher]


def test_a_student_is_trained_again_where_its_teacher_has_other_weights(
    tiny, family, epochs_trained
):
    teacher, student, grandchild = family
    before = train([grandchild])[0]
    moved = replace_weights(teacher, tiny(seed=5))
    epochs_trained.clear()
    message = f"{student.id} learned from other weights of its teacher.*{teacher.id}"
    with pytest.warns(UserWarning, match=message):
        assert level([grandchild]) == [student]
    with pytest.warns(UserWarning, match="trained again"):
        after = train([grandchild])[0]
    assert store.find_record(student).summary["teachers"] == {f"{teacher.id}@2": moved}
    assert [run for run, _ in epochs_trained] == [student.id] * 2 + [grandchild.id] * 2
    assert final_weights(after) != final_weights(before)


def test_a_failure_reaches_all_descendants_that_need_training(tiny, family):
    teacher, _, grandchild = family
    alone, error = tiny(seed=9), ValueError("not finite")
    failures = {teacher.id: error}
    assert level([grandchild, alone], failures=failures) == [alone]
    assert failures == {run.id: error for run in family}


def test_a_failed_teacher_does_not_matter_to_a_complete_student(family):
    teacher, _, grandchild = family
    train([grandchild])
    failures = {teacher.id: ValueError()}
    assert level([grandchild], failures=failures) == []
    assert failures.keys() == {teacher.id}


# --- complete runs --------------------------------------------------------------------------------


def test_a_teacher_asked_for_another_checkpoint_is_trained_again_and_its_students_are_not(
    tiny, epochs_trained
):
    teacher = tiny(epochs=3)
    old = train([tiny(method=KD(teacher), seed=1)])[0]
    before = store.find_record(teacher)
    assert is_complete(teacher, weights=True)
    assert not is_complete(replace(teacher, keep=(1,)), weights=False)
    assert not is_complete(replace(teacher, save_logits=True), weights=False)
    epochs_trained.clear()
    new = train([tiny(method=KD(teacher, at=1), seed=1)])[0]
    assert [epoch for run, epoch in epochs_trained if run == teacher.id] == [1, 2, 3]
    after = store.find_record(teacher)
    assert final_weights(after) == final_weights(before)
    assert after.summary["weights"]["1"] == new.summary["teachers"][f"{teacher.id}@1"]
    epochs_trained.clear()
    assert final_weights(train([old.run])[0]) == final_weights(old)
    assert epochs_trained == []


@pytest.mark.parametrize("inherits", [lambda t: {"method": KD(t)}, lambda t: {"start": t}])
def test_a_half_trained_student_whose_parent_changed_starts_from_the_beginning(
    tiny, train_until, epochs_trained, inherits
):
    parent = tiny()
    student = tiny(seed=1, **inherits(parent))
    train_until(student, 1)
    assert (store.folder(student) / "state.safetensors").exists()
    moved = replace_weights(parent, tiny(seed=5))
    epochs_trained.clear()
    trained = train([student])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2]
    assert trained.summary["teachers"] == {f"{parent.id}@2": moved}


# --- repetition -----------------------------------------------------------------------------------


def test_a_run_whose_weights_disappear_is_not_trained_for_ever(tiny, monkeypatch, epochs_trained):
    monkeypatch.setattr(store, "save_modules", lambda *arguments: "nowhere")
    run = tiny()
    with pytest.raises(StoreError, match=rf"{run} was trained, but .* not all in"):
        train([run])
    assert len(epochs_trained) == 2


def test_repetition_is_refused_for_a_run_and_its_parents(family):
    teacher, student, _ = family
    train([student])
    refuse_repetition(student)
    store.weights_path(teacher, 2).unlink()
    with pytest.raises(StoreError, match=f"{teacher.id} was trained"):
        refuse_repetition(student)
    train([teacher], weights=True)
    store.weights_path(student, 2).unlink()
    with pytest.raises(StoreError, match=f"{student.id} was trained"):
        refuse_repetition(student)
