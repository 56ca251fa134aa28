"""What is left to train: runs, their ancestors, chains, epochs; and what is rendered."""

from dataclasses import dataclass, replace

import pytest
from found_students import chain as found_student
from helpers import garble, replace_weights

from kdbook import remaining
from kdbook.exhibits import Exhibit
from kdbook.profiles import open_profile
from kdbook.remaining import epochs_left, follow, is_rendered, unfinished
from kdlib import KD, Run, store, train
from kdlib.errors import NothingFound, StoreError

SMOKE = open_profile("smoke")


@pytest.fixture
def family(tiny):
    """A teacher, its student, and a student that starts from that student."""
    teacher = tiny()
    student = tiny(seed=1, method=KD(teacher))
    return [teacher, student, tiny(seed=2, start=student)]


@dataclass
class Chain:
    """A chain of these runs, which ends with ``error``, if there is one."""

    runs: list[Run]
    error: Exception | None = None

    def next_run(self, trained):
        if trained is None:
            return self.runs[0]
        if trained.run == self.runs[-1] and self.error:
            raise self.error
        return dict(zip(self.runs, self.runs[1:], strict=False)).get(trained.run)

    def needs(self, run):
        return [self.runs[0]]

    def estimate(self):
        return self.runs


# --- runs -----------------------------------------------------------------------------------------


def test_unfinished_runs_come_with_their_ancestors_parents_first(tiny, family):
    assert unfinished([family[2]]) == family
    train(family[:2])
    assert unfinished([family[2], family[0]]) == family[2:]
    train(family)
    assert unfinished(family) == []


def test_the_unfinished_runs_are_those_that_train_trains(tiny, family, epochs_trained):
    teacher, student, _ = family
    train(family)
    other = tiny(seed=3, method=KD(replace(teacher, keep=(1,))))
    again, new = unfinished([student, other])
    assert (again, again.keep, new) == (teacher, (1, 2), other)
    train([student, other])
    assert [run for run, _ in epochs_trained[6:]] == [teacher.id] * 2 + [other.id] * 2


def test_students_of_a_changed_teacher_are_unfinished(tiny, family):
    train(family)
    replace_weights(family[0], tiny(seed=5))
    with pytest.warns(UserWarning, match="learned from other weights"):
        assert unfinished(family) == family[1:]


def test_a_record_alone_is_left_where_weights_are_needed(family, only_records):
    only_records(*train(family))
    assert follow(family).unfinished == []
    assert follow(family, weights=True).unfinished == family


def test_a_record_alone_is_complete_but_cannot_teach(tiny, family, only_records):
    only_records(*train(family))
    assert unfinished(family) == []
    new = tiny(seed=7, method=KD(family[1]))
    assert unfinished([new]) == [*family[:2], new]


def test_shared_answers_make_later_questions_cheap(tiny, family, monkeypatch):
    train(family)
    students = [tiny(seed=seed, method=KD(family[0])) for seed in range(3, 40)]
    reads, find = [], store.find_record
    monkeypatch.setattr(store, "find_record", lambda run: reads.append(run.id) or find(run))
    known = {}
    assert unfinished([*family, *students], known) == students
    assert len(reads) < 3 * len(students)
    reads.clear()
    unfinished([*family, *students], known)
    assert reads == []


# --- chains ---------------------------------------------------------------------------------------


def test_a_chain_is_followed_to_its_first_unfinished_run(tiny):
    runs = [tiny(seed=seed) for seed in range(3)]
    for done in range(3):
        followed = follow([Chain(runs)])
        assert followed.unfinished == [runs[done]]
        assert {*followed.awaited} == {runs[0], runs[done]}
        assert followed.runs == runs[: done + 1]
        train([runs[done]])
    followed = follow([Chain(runs)])
    assert (followed.runs, followed.unfinished, followed.awaited) == (runs, [], [])


def test_a_chain_that_found_nothing_is_over(tiny):
    runs = [tiny()]
    train(runs)
    assert follow([Chain(runs, NothingFound())]).awaited == []
    assert unfinished([Chain(runs, NothingFound())]) == []


def test_a_chain_without_weights_needs_the_runs_that_decide(tiny, only_records):
    runs = [tiny(seed=seed) for seed in range(2)]
    only_records(*train(runs))
    assert unfinished([Chain(runs)]) == []
    assert {*unfinished([Chain(runs, StoreError())])} == {*runs}


def test_a_found_student_is_known_when_its_search_is_trained(tmp_path):
    item = found_student()
    assert unfinished([item]) == [item.search.start, item.search]
    train([item.search])
    (student,) = unfinished([item])
    assert "@" in student.model
    train([item])
    assert unfinished([item]) == []


# --- epochs ---------------------------------------------------------------------------------------


def test_finished_epochs_of_a_resume_state_are_not_left(tiny, train_until):
    run = tiny(epochs=3)
    assert epochs_left(run) == 3
    train_until(run, 2)
    assert epochs_left(run) == 1
    garble(store.state_path(run))
    assert epochs_left(run) == 3


# --- rendered exhibits ----------------------------------------------------------------------------


def test_an_exhibit_is_rendered_when_its_files_name_exactly_the_trained_runs(tiny, family):
    def rendered(items):
        return is_rendered("kr/table1", SMOKE, follow(items))

    exhibit = Exhibit("kr/table1", SMOKE)
    trained = train(family)
    assert not rendered(family)
    exhibit.add("Student", "cifar10", trained, lambda t: t.run.seed)
    exhibit.record()
    assert rendered(family)
    assert rendered([Chain(family)])
    assert not rendered([*family, tiny(seed=9)])
    assert not rendered(family[:1])
    (exhibit.folder / "table.md").unlink()
    assert not rendered(family)
    assert remaining.is_rendered("kr/table2", SMOKE, follow(family)) is False
