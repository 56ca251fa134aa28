"""Checks: what each one says of trained networks, and of which rows."""

from types import SimpleNamespace

import pytest

from kdbook.checks import above_chance, teacher_above_student, within_budget


class Noted:
    """An exhibit that only notes its checks."""

    def __init__(self):
        self.checks = []

    def check(self, text, passed, rows=None):
        self.checks.append((passed, None if rows is None else list(rows)))


@pytest.fixture
def exhibit():
    return Noted()


def trained(top1):
    return SimpleNamespace(final={"test_top1": top1}, run=SimpleNamespace(dataset="digits"))


@pytest.mark.parametrize(("teacher", "passed"), [((60, 80), True), ((50, 60), False)])
def test_the_teacher_is_compared_with_the_student_by_the_mean(exhibit, teacher, passed):
    student = [trained(58), None, trained(62)]
    teacher_above_student(exhibit, map(trained, teacher), student, rows=["KD"])
    assert exhibit.checks == [(passed, ["KD"])]


def test_each_row_is_compared_with_chance_alone(exhibit):
    rows = {"KD": [trained(12), trained(10)], "AT": [trained(10)], "failed": [None]}
    above_chance(exhibit, rows)  # ten classes
    assert exhibit.checks == [(True, ["KD"]), (False, ["AT"])]


def test_a_network_that_is_no_row_concerns_all_rows(exhibit):
    above_chance(exhibit, {"kd": [trained(10)]}, all_rows=True)
    assert exhibit.checks == [(False, None)]


def test_one_seed_above_the_budget_fails_its_row(exhibit):
    within_budget(exhibit, {"GS": [720, 961], "EEI": [960, 960]}, budget=960, unit="epochs")
    assert exhibit.checks == [(False, ["GS"]), (True, ["EEI"])]
