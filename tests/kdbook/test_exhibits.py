import hashlib
import html
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from matplotlib.figure import Figure

from kdbook.claims import Verdict, all_claims
from kdbook.exhibits import NO_EVIDENCE, Exhibit, exhibit_names, worded
from kdbook.profiles import PROFILES, open_profile
from kdbook import figures as plots, scorecard
from kdlib import KD, train
from kdlib.errors import StoreError, UnknownName

SMOKE, PAPER = open_profile("smoke"), open_profile("paper")


@pytest.fixture
def trained(tiny):
    """Teacher and students of two seeds."""
    teachers = train([tiny(seed=seed) for seed in (0, 1)])
    students = train([tiny(seed=t.run.seed, method=KD(t.run)) for t in teachers])
    return teachers, students


@pytest.fixture
def table2(trained):
    """Part of RCO's Table 2, from runs of two seeds."""
    teachers, students = trained
    exhibit = Exhibit("rco/table2", SMOKE)
    exhibit.add("S-Softmax", "top1", teachers, "test_top1")
    exhibit.add("S-KD", "top1", students, "test_top1")
    exhibit.add("S-RCO", "top1", students[:1], "test_top1")
    exhibit.count("S-KD", "mflops", 13.5)
    return exhibit


def draw():
    with plots.style():
        figure, axes = plt.subplots()
        axes.plot([1, 2], [3, 4], label="line")
    plt.close(figure)
    return figure, pd.DataFrame({"x": [1, 2], "y": [3, 4]})


def texts(figure):
    return [text.get_text() for text in figure.texts]


# --- collecting -----------------------------------------------------------------------------------


def test_an_unknown_exhibit_names_the_closest():
    with pytest.raises(UnknownName, match=r"no exhibit 'rco/tabel3'.*rco/table3"):
        Exhibit("rco/tabel3", SMOKE)


def test_every_paper_and_the_book_itself_have_exhibits():
    papers = {name.partition("/")[0] for name in exhibit_names()}
    assert papers == {*scorecard.PAPERS, "book"}


def test_a_cell_holds_the_last_epochs_value_of_each_seed(table2, trained):
    expected = {t.run.seed: t.log.test_top1.iloc[-1] for t in trained[1]}
    assert table2.cells["S-KD", "top1"] == expected
    table2.add("S-KD", "loss", trained[1], lambda t: t.log.train_kd.min())
    assert table2.cells["S-KD", "loss"] == {t.run.seed: t.log.train_kd.min() for t in trained[1]}


def test_the_table_gives_mean_spread_and_number_of_seeds(table2, trained):
    values = np.array([t.final["test_top1"] for t in trained[1]])
    row = table2.long_table().set_index(["row", "column"]).loc["S-KD", "top1"]
    assert (row.paper, row.unit, row.n) == (68.71, "%", 2)
    assert (row.ours, row.spread) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert row.low < row.ours < row.high


def test_the_shown_table_has_the_papers_rows_and_numbers_beside_ours(table2, trained):
    table = table2.table()
    assert list(table.index) == ["T-Softmax", "S-Softmax", "S-KD", "S-RCO"]
    assert table["top1 (%)", "paper"].tolist() == ["79.34", "61.88", "68.71", "70.85"]
    values = np.array([t.final["test_top1"] for t in trained[1]])
    ours = table["top1 (%)", "ours, smoke"]
    assert ours["S-KD"] == f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (2)"
    assert ours["T-Softmax"] == "–"
    counts = table["mflops"]
    assert counts["paper"].tolist() == ["2600", "13.5", "13.5", "13.5"]
    assert counts["ours, smoke"].tolist() == ["–", "–", "13.5", "–"]


def test_verdicts_of_a_smoke_run_tell_directions_only(table2):
    table = table2.verdicts()
    kinds = set(table.verdict[table.kind == "gap"])
    assert all(kind == "not run" or kind.startswith("direction only: ") for kind in kinds)
    assert any("direction only" in verdict for verdict in kinds)
    assert "reproduced" in set(table.verdict[table.kind == "value"])


# --- recording ------------------------------------------------------------------------------------


def test_every_file_has_its_provenance_and_hash_beside_it(table2, trained, tmp_path):
    table2.figure(*draw(), alt="Two points.")
    table2.record()
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    files = {path.name for path in folder.iterdir()}
    made = {"table.csv", "table.md", "verdicts.csv", "figure.png", "figure.svg", "figure.csv"}
    assert files == made | {f"{name}.json" for name in made}
    runs = {t.run.id for part in trained for t in part}
    for name in made:
        about = json.loads((folder / f"{name}.json").read_text())
        assert about["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert (about["file"], about["exhibit"], about["profile"]) == (name, "rco/table2", "smoke")
        assert set(about["runs"]) == runs
        assert about["seeds"] == [0, 1]
        assert about["data"] == "digits"
        assert about["evidence"] is False
        assert "torch" in about["versions"]


def test_the_written_table_is_the_shown_one(table2, tmp_path):
    table2.record()
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    written = pd.read_csv(folder / "table.csv")
    pd.testing.assert_frame_equal(written, table2.long_table(), check_dtype=False)
    text = (folder / "table.md").read_text()
    assert "rco/table2" in text
    for value in ("79.34", "68.71", table2.table()["top1 (%)", "ours, smoke"]["S-KD"]):
        assert value in text
    verdicts = pd.read_csv(folder / "verdicts.csv")
    claimed = {claim["id"] for claim in all_claims() if claim["exhibit"] == "rco/table2"}
    assert {"/".join(i.split("/")[:3]) for i in verdicts.id} == claimed


def test_records_of_all_runs_and_their_teachers_are_copied(trained, tmp_path):
    teachers, students = trained
    exhibit = Exhibit("rco/table2", SMOKE)
    exhibit.add("S-KD", "top1", students, "test_top1")
    exhibit.record()
    copied = {path.stem for path in (tmp_path / "results" / "smoke" / "records").iterdir()}
    assert copied == {t.run.id for t in (*teachers, *students)}


def test_the_footer_says_where_the_numbers_come_from(table2):
    footer = table2.record()
    for word in ("rco/table2", "commit", "profile smoke", "data digits", "seeds [0, 1]"):
        assert word in footer


def test_verdicts_follow_cells_that_are_added_after_they_were_shown(tmp_path):
    exhibit = Exhibit("rco/table2", PAPER)
    exhibit.verdicts()
    exhibit.count("S-KD", "mflops", 13.5)
    exhibit.record()
    verdicts = pd.read_csv(tmp_path / "results/paper/rco/table2/verdicts.csv", index_col="id")
    assert verdicts.verdict["rco/table2/value-mflops-student/S-KD"] == "reproduced"


def test_a_figure_carries_its_provenance(table2, trained, tmp_path):
    table2.figure(*draw(), alt="Two points.", name="curve")
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    with PIL.Image.open(folder / "curve.png") as image:
        text = image.text
    assert (text["exhibit"], text["alt"], text["profile"]) == ("rco/table2", "Two points.", "smoke")
    assert set(json.loads(text["runs"])) == set(table2.used)
    assert "Two points." in (folder / "curve.svg").read_text()
    assert pd.read_csv(folder / "curve.csv").to_dict("list") == {"x": [1, 2], "y": [3, 4]}


def test_a_smoke_run_is_stamped_as_no_evidence(table2, tmp_path):
    figure, data = draw()
    table2.figure(figure, data, alt="Two points.")
    table2.record()
    assert texts(figure) == [NO_EVIDENCE]
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    assert NO_EVIDENCE in (folder / "table.md").read_text()


def test_every_frame_of_a_smoke_animation_is_stamped(table2, tmp_path):
    figure = Figure(figsize=(2, 1))

    def draw_frame(frame):
        figure.subplots().plot([0, frame])

    table2.animation(figure, draw_frame, range(3), alt="A line rises.", name="rise")
    assert [text.get_text() for text in figure.texts] == ["smoke run: no evidence"]
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    with PIL.Image.open(folder / "rise.gif") as image:
        assert image.n_frames == 3
    about = json.loads((folder / "rise.gif.json").read_text())
    assert (about["alt"], set(about["runs"])) == ("A line rises.", set(table2.used))


def test_other_profiles_are_not_stamped(trained, tmp_path):
    exhibit = Exhibit("rco/table2", PAPER)
    exhibit.add("S-KD", "top1", trained[1], "test_top1")
    figure, data = draw()
    exhibit.figure(figure, data, alt="Two points.")
    exhibit.record()
    assert texts(figure) == []
    assert NO_EVIDENCE not in (tmp_path / "results/paper/rco/table2/table.md").read_text()


def test_results_that_cannot_be_written_say_what_to_do(table2, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDLIB_RESULTS", str(tmp_path / "file" / "results"))
    with pytest.raises(StoreError, match=r"Cannot write .*KDLIB_RESULTS"):
        table2.record()
    with pytest.raises(StoreError, match=r"Cannot write .*KDLIB_RESULTS"):
        table2.figure(*draw(), alt="Two points.")


def test_an_exhibit_of_the_book_itself_has_no_claims(trained, tmp_path):
    exhibit = Exhibit("book/start_here", SMOKE)
    exhibit.add("student", "top1", trained[1], "test_top1")
    assert len(exhibit.verdicts()) == 0
    exhibit.record()
    assert (tmp_path / "results/smoke/book/start_here/table.csv").exists()
    assert len(scorecard.gather(PROFILES["smoke"])) > len(all_claims()) - 1


# --- the scorecard --------------------------------------------------------------------------------


@pytest.fixture
def table3():
    """RCO's Table 3, with one cell wrong."""
    exhibit = Exhibit("rco/table3", SMOKE)
    for row in exhibit.long_table().itertuples():
        wrong = 1 if row.row == "mobilenetv2-t4-w0.35" else 0
        exhibit.count(row.row, row.column, row.paper + wrong)
    exhibit.record()


def test_the_scorecard_gathers_what_was_recorded_and_names_the_rest(table3):
    table = scorecard.gather(PROFILES["smoke"])
    stems = {"/".join(name.split("/")[:3]) for name in table.id}
    assert stems == {claim["id"] for claim in all_claims()}
    assert set(table.verdict[table.exhibit != "rco/table3"]) == {"not run"}
    counts = scorecard.counts(table)
    rco = counts.loc[scorecard.PAPERS["rco"]]
    assert (rco["reproduced"], rco["differs"]) == (15, 1)
    assert counts.to_numpy().sum() == len(table)


def test_the_scorecard_is_one_page_that_needs_no_network(table3, tmp_path):
    path = scorecard.write_page(PROFILES["smoke"])
    assert path == tmp_path / "results" / "smoke" / "scorecard.html"
    page = path.read_text()
    resources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert [text[:22] for text in resources] == ["data:image/png;base64,"]
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "smoke run" in page
    assert json.loads((tmp_path / "results/smoke/scorecard.html.json").read_text())


def test_the_scorecard_lists_every_claim(table3):
    page = scorecard.write_page(PROFILES["smoke"]).read_text()
    table = scorecard.gather(PROFILES["smoke"])
    assert page.count("<tr><td>") == len(table)
    assert all(html.escape(claim["says"].rstrip(".")) in page for claim in all_claims())
    assert len(re.findall("■</b> reproduced", page)) == 15
    assert len(re.findall("■</b> differs", page)) == 1


def test_a_scorecard_without_any_run_can_be_written():
    page = scorecard.write_page(PROFILES["paper"]).read_text()
    assert page.count("</b> not run") == len(scorecard.gather(PROFILES["paper"]))
    assert "class=warn" not in page


def test_the_forest_plot_draws_every_judged_claim(table2):
    table2.record()
    table = scorecard.gather(PROFILES["smoke"])
    figure = scorecard.forest(table)
    values, gaps = figure.axes
    judged = table[(table.verdict != "not run") & table.estimate.notna()]
    assert len(gaps.get_yticks()) == (judged.kind != "value").sum()
    drawn = (judged.kind == "value") & (judged.verdict != "direction only")
    assert len(values.get_yticks()) == drawn.sum() > 0


@pytest.mark.parametrize(
    ("kind", "estimate", "as_claimed", "side"),
    [
        ("gap", 0.7, True, ": as claimed"),
        ("gap", 0.3, False, ": weaker than claimed"),
        ("best", 0.0, False, ": a tie"),
        ("best", -0.1, False, ": opposite"),
        ("equal", 0.4, False, ": not equal"),
        ("value", 0.4, None, ""),
    ],
)
def test_a_direction_is_told_in_words(kind, estimate, as_claimed, side):
    verdict = Verdict("x", "x", kind, "x", "x", "%", "direction only", estimate)
    assert worded(replace(verdict, as_claimed=as_claimed)) == f"direction only{side}"
