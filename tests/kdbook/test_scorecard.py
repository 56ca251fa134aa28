"""The scorecard gathers, counts, draws and lists the verdicts on all claims."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest

from kdbook import scorecard
from kdbook.claims import judge
from kdbook.exhibits import Exhibit
from kdbook.forest import VERDICTS, forest
from kdbook.profiles import open_profile
from kdbook.published import all_claims, paper_cells
from kdlib.files import ROOT

SMOKE, PAPER = open_profile("smoke"), open_profile("paper")


@pytest.fixture
def table3():
    """RCO's Table 3, with one wrong cell."""
    exhibit = Exhibit("rco/table3", SMOKE)
    for row in exhibit.long_table().itertuples():
        wrong = 1 if row.row == "mobilenetv2-t4-w0.35" else 0
        exhibit.count(row.row, row.column, row.paper + wrong)
    exhibit.record()


def test_the_scorecard_gathers_the_recorded_verdicts_and_all_other_claims(table3):
    table = scorecard.gather(SMOKE)
    assert table.id.is_unique
    ids = ["/".join(name.split("/")[:3]) for name in table.id]
    assert list(dict.fromkeys(ids)) == [claim["id"] for claim in all_claims()]
    assert set(table.verdict[table.exhibit != "rco/table3"]) == {"not run"}
    counts = scorecard.counts(table)
    rco = counts.loc[scorecard.PAPERS["rco"]]
    assert (rco["reproduced"], rco["differs"]) == (16, 1)
    assert counts.to_numpy().sum() == len(table)


def test_the_summary_gives_the_papers_number_and_ours(table3):
    rows = scorecard.summary(scorecard.gather(SMOKE)).loc["rco/table3"].set_index("claim")
    wrong = rows[rows.verdict == "differs"].iloc[0]
    assert wrong.name.endswith("width multiplier: mobilenetv2-t4-w0.35")
    assert (float(wrong.ours), wrong.seeds) == (float(wrong.paper) + 1, 1)
    assert wrong.unit == "MFLOPs"


def test_the_page_needs_no_network(table3, tmp_path):
    path = scorecard.write_page(SMOKE)
    assert path == tmp_path / "results" / "smoke" / "scorecard.html"
    page = path.read_text()
    resources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)
    others = [text for text in resources if "docs/decisions.md#" not in text]
    assert [text[:22] for text in others] == ["data:image/png;base64,"]
    assert not re.search("https?://|<script", page)
    about = json.loads(path.with_name("scorecard.html.json").read_text())
    assert about["claims"] == len(scorecard.gather(SMOKE))


def test_the_page_lists_every_claim_with_its_place_and_verdict(table3):
    page = scorecard.write_page(SMOKE).read_text()
    table = scorecard.gather(SMOKE)
    assert page.count("■</b>") == len(table) + table.headline.sum()
    for claim in all_claims():
        assert html.escape(claim["statement"].rstrip(".")) in page
        assert html.escape(claim["where"]) in page
    green, red = (VERDICTS[verdict] for verdict in ("reproduced", "differs"))
    assert page.count(f"<b style='color:{green}'>■</b> reproduced") == 16
    assert page.count(f"<b style='color:{red}'>■</b> differs") == 1
    assert "class=warn" in page


def test_the_label_of_a_decision_is_a_link_to_it(table3):
    path = scorecard.write_page(SMOKE)
    place, anchor = re.search(r"<a href='([^#']+)#([^']+)'>KR-s</a>", path.read_text()).groups()
    assert (path.parent / place).resolve() == ROOT / "docs" / "decisions.md"
    assert anchor == "kr-s-a-second-reading-of-eq-3-4-9-and-10"


def test_the_page_says_what_a_count_is_worth_below_full_scale(table3):
    assert "verdicts on counted numbers here" in scorecard.write_page(SMOKE).read_text()
    assert "verdicts on counted numbers here" not in scorecard.write_page(PAPER).read_text()
    counts = scorecard.counts(scorecard.gather(SMOKE))
    assert [*counts] == ["reproduced", "differs", "not run"]


def test_names_with_html_in_them_are_shown_as_text():
    verdict = judge("stc/table1", paper_cells("stc/table1"), "reduced")[-1]
    assert "<-" in verdict.id
    section = scorecard._claims_html(pd.DataFrame([vars(verdict)]))
    assert html.escape(verdict.id.split("/")[-1]) in section
    assert "20<-" not in section


def test_a_page_without_any_run_can_be_written():
    page = scorecard.write_page(PAPER).read_text()
    table = scorecard.gather(PAPER)
    assert page.count("</b> not run") == len(table) + table.headline.sum()
    assert "class=warn" not in page


def test_the_forest_plot_draws_the_claims_with_a_number_of_the_paper():
    """A value in tolerances, a gap in the paper's gaps; no equality, no value of other data."""
    about = {"exhibit": "x/y", "unit": "%", "tolerance": 0.5, "reconstruction": False}
    rows = [
        ("gap", "supported", 2.0, 1.0),
        ("gap", "reverses here", 2.0, -9.0),
        ("equal", "supported", 2.0, 0.1),
        ("best", "not run", 2.0, np.nan),
        ("gap", "supported", np.nan, 1.0),
        ("value", "differs", 70.0, 1.0),
        ("value", "not comparable", 70.0, 1.0),
    ]
    table = pd.DataFrame(rows, columns=["kind", "verdict", "paper", "estimate"]).assign(**about)
    table["id"] = [f"x/y/{k}" for k in range(len(rows))]
    table["low"], table["high"] = table.estimate - 0.5, table.estimate + 0.5
    values, gaps = forest(table).axes
    names = [[t.get_text() for t in axes.get_yticklabels()] for axes in (values, gaps)]
    assert names == [["x/y  5"], ["x/y  0", "x/y  1"]]
    drawn = [
        [(line.get_marker(), *line.get_xdata()) for line in axes.lines if line.get_marker()]
        for axes in (values, gaps)
    ]
    points = [[point for point in part if point[0] in "oXD<>"] for part in drawn]
    assert points == [[("X", 2.0)], [("o", 0.5), ("<", -3.0)]]
    empty = forest(table[:0])
    assert all("nothing to draw" in axes.texts[0].get_text() for axes in empty.axes)
