"""Helpers of the notebooks, and the rule where notebooks import from."""

import numpy as np
import pytest
import torch

from kdbook.notebook import check, logits_on_test, show
from kdlib import load_data, losses, measure, train


def test_source_code_is_shown():
    shown = show(losses.kd, losses.hint).data
    assert shown.count("```python\ndef ") == 2
    assert "F.kl_div" in shown


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(0.1 + 0.2, 0.3), (7, 7), ("kd", "kd"), ([1, 2], [1, 2]), (None, 3)],
)
def test_a_right_answer_is_confirmed_and_none_stops_nothing(capsys, answer, expected):
    check(answer, expected, hint="Think.")
    printed = "Not answered yet.\n" if answer is None else "Right.\n"
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("answer", "expected"), [(0.31, 0.3), (8, 7), ("at", "kd")])
def test_a_wrong_answer_gets_the_hint(answer, expected):
    with pytest.raises(AssertionError, match="Think of the temperature"):
        check(answer, expected, hint="Think of the temperature.")


def test_logits_on_test_are_those_of_the_model(tiny):
    trained = train([tiny(keep=(1,))])[0]
    test = load_data("digits", "test").first(30)
    for epoch in (1, None):
        table = measure(trained, logits_on_test, count=30, epoch=epoch)
        logits = trained.model(epoch)(test.batch(torch.arange(30)))
        assert table.label.tolist() == test.labels.tolist()
        np.testing.assert_allclose(table.drop(columns="label"), logits, rtol=1e-5, atol=1e-6)
