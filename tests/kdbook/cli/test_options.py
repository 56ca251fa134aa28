"""Which notebooks a user asks for."""

import pytest

from kdbook.cli.notebooks import ROOT, all_notebooks
from kdbook.cli.options import chosen
from kdlib.errors import UnknownName


def exhibits(only):
    return [n.exhibit for n in chosen(only)]


def test_without_names_all_notebooks_but_the_scorecard_are_taken():
    assert exhibits(None) == [n.exhibit for n in all_notebooks()][:-1]


@pytest.mark.parametrize("name", ["rco", "rco/", "notebooks/rco", "./notebooks/rco/"])
def test_a_chapter_stands_for_its_exhibits(name):
    found = exhibits(name)
    assert found == [n.exhibit for n in all_notebooks() if n.exhibit.startswith("rco/")]
    assert len(found) > 5


def test_the_chapter_of_the_book_is_not_its_scorecard():
    assert exhibits("book")[0] == "book/start_here"
    assert "book/scorecard" not in exhibits("book")
    assert exhibits("book/scorecard") == ["book/scorecard"]


def test_names_are_separated_by_commas_and_may_have_spaces():
    assert exhibits("kr/table1, rco/table1 ,") == ["kr/table1", "rco/table1"]
    assert exhibits("rco/table1, rco") == [
        "rco/table1",
        *[e for e in exhibits("rco") if e != "rco/table1"],
    ]


@pytest.mark.parametrize(
    ("name", "exhibit"),
    [
        ("notebooks/rco/02_table1.ipynb", "rco/table1"),
        ("rco/02_table1", "rco/table1"),
        (str(ROOT / "notebooks" / "rco" / "02_table1.ipynb"), "rco/table1"),
        ("notebooks/00_start_here.ipynb", "book/start_here"),
    ],
)
def test_a_notebook_stands_for_its_exhibit(name, exhibit):
    assert exhibits(name) == [exhibit]


def test_an_unknown_name_gets_the_closest_ones():
    with pytest.raises(UnknownName, match=r"no exhibit or chapter 'serach'\. Did you mean search"):
        chosen("serach")
    with pytest.raises(UnknownName, match="Did you mean rco/table1"):
        chosen("rco/tabel1")
