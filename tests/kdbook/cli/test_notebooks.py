"""The list of notebooks and the facts that the jobs read from it."""

import pytest

from kdbook.cli import notebooks


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [
        ("under a minute", 30),
        ("about two minutes", 120),
        ("about 10 min on a T4 (estimate)", 600),
        ("about 3 days on an H200 (estimate)", 3 * 86_400),
        ("about 2 h on one CPU core", 7200),
        ("the same", 0),
    ],
)
def test_the_expected_time_is_read_from_the_cost(cost, seconds):
    notebook = notebooks.Notebook(notebooks.ROOT, "rco/table1", "", {"paper": cost}, trains=True)
    assert notebook.seconds("paper") == seconds


def test_the_scorecard_is_last_and_trains_nothing():
    *exhibits, scorecard = notebooks.all_notebooks()
    assert scorecard.exhibit == notebooks.SCORECARD
    assert not scorecard.trains
    assert exhibits[0].exhibit == "book/start_here"
    assert exhibits[0].trains


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("kdlib/data/images.py", True),
        ("kdbook/figures.py", True),
        ("results/published/rco.csv", True),
        ("kdbook/cli/run_all.py", False),
        ("tests/test_project.py", False),
    ],
)
def test_the_code_hash_covers_what_an_exhibit_is_computed_from(
    monkeypatch, tmp_path, file, matters
):
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("one")
    before = notebooks.code_hash()
    path.write_text("two")
    assert (notebooks.code_hash() != before) == matters
