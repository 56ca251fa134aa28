import pytest

from kdbook.notebook import check, show
from kdlib import losses


def test_the_librarys_own_source_is_shown():
    shown = show(losses.kd, losses.hint).data
    assert shown.count("```python\ndef ") == 2
    assert "F.kl_div" in shown


@pytest.mark.parametrize(
    ("answer", "expected"), [(0.1 + 0.2, 0.3), (7, 7), ("kd", "kd"), ([1, 2], [1, 2])]
)
def test_a_right_answer_is_confirmed(capsys, answer, expected):
    check(answer, expected, hint="Think.")
    assert capsys.readouterr().out == "Right.\n"


@pytest.mark.parametrize(("answer", "expected"), [(0.31, 0.3), (8, 7), ("at", "kd")])
def test_a_wrong_answer_gets_the_hint(answer, expected):
    with pytest.raises(AssertionError, match="Think of the temperature"):
        check(answer, expected, hint="Think of the temperature.")


def test_an_open_exercise_stops_nothing(capsys):
    check(None, 3, hint="Think.")
    assert capsys.readouterr().out == "Not answered yet.\n"
