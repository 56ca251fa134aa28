"""Checks: what each one says of trained networks, and of which rows."""

from types import SimpleNamespace

import pytest

from kdbook.checks import above_chance, teacher_above_student, within_budget


class Noted:
    """An exhibit that only notes its checks."""

    def __init__(self):
        self.checks, self.texts = [], []

    def check(self, text, passed, rows=None):
        self.texts.append(text)
        self.checks.append((passed, None if rows is None else list(rows)))


@pytest.fixture
def exhibit():
    return Noted()


def trained(top1, seed=0):
    run = SimpleNamespace(dataset="digits", seed=seed)
    return SimpleNamespace(final={"test_top1": top1}, run=run)


def by_seed(*accuracies):
    return [top1 and trained(top1, seed) for seed, top1 in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("teacher", "passed", "seeds"),
    [((60, 80), True, "2 of 2"), ((50, 60), False, "0 of 2"), ((57, 70), True, "1 of 2")],
)
def test_the_teacher_is_compared_with_the_student_by_the_mean(exhibit, teacher, passed, seeds):
    teacher_above_student(exhibit, by_seed(*teacher), by_seed(58, 62), rows=["KD"])
    assert exhibit.checks == [(passed, ["KD"])]
    assert f"seeds: {seeds}" in exhibit.texts[0]


def test_a_seed_without_a_student_does_not_count(exhibit):
    """By the bare means the teacher is below the student: 60 and 65."""
    teacher_above_student(exhibit, by_seed(70, 50), by_seed(65, None))
    assert exhibit.checks == [(True, None)]
    teacher_above_student(exhibit, by_seed(70), by_seed(None, 65))
    assert exhibit.checks[1] == (False, None)


def test_each_row_is_compared_with_chance_alone(exhibit):
    rows = {"KD": by_seed(12, 10), "AT": by_seed(10), "failed": [None]}
    above_chance(exhibit, rows)  # ten classes
    assert exhibit.checks == [(True, ["KD"]), (False, ["AT"])]
    above_chance(exhibit, {"AT": by_seed(10)}, columns=["c10_kd"])
    assert exhibit.checks[2] == (False, [("AT", "c10_kd")])


def test_a_network_that_is_no_row_concerns_all_rows(exhibit):
    above_chance(exhibit, {"kd": [trained(10)]}, all_rows=True)
    assert exhibit.checks == [(False, None)]


def test_one_seed_above_the_budget_fails_its_row(exhibit):
    within_budget(exhibit, {"GS": [720, 961], "EEI": [960, 960]}, budget=960, unit="epochs")
    assert exhibit.checks == [(False, ["GS"]), (True, ["EEI"])]


def test_a_network_below_the_budget_is_not_compared_at_it(exhibit):
    costs = {"near": [0.29, 0.305], "cheap": [0.31, 0.25]}
    within_budget(exhibit, costs, budget=0.3125, unit="MACs", columns=["kd"], at_least=0.92)
    assert exhibit.checks == [(True, [("near", "kd")]), (False, [("cheap", "kd")])]
    assert exhibit.texts[1].endswith("92 to 100 % of the budget of 0.3125.")
