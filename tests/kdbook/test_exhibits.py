"""An exhibit: its cells, its tables, its verdicts and its files."""

import hashlib
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from matplotlib.figure import Figure

from kdbook import exhibits, figures, scorecard
from kdbook.exhibits import NO_EVIDENCE, RECONSTRUCTED, Exhibit, exhibit_names
from kdbook.profiles import open_profile
from kdbook.published import all_claims
from kdlib import KD, train
from kdlib.errors import StoreError, UnknownName

SMOKE, PAPER = open_profile("smoke"), open_profile("paper")


@pytest.fixture
def trained(tiny):
    """Teachers and students of two seeds."""
    teachers = train([tiny(seed=seed) for seed in (0, 1)])
    students = train([tiny(seed=t.run.seed, method=KD(t.run)) for t in teachers])
    return teachers, students


@pytest.fixture
def table2(trained):
    """Part of RCO's Table 2, with runs of two seeds."""
    teachers, students = trained
    exhibit = Exhibit("rco/table2", SMOKE)
    exhibit.add("S-Softmax", "top1", teachers, "test_top1")
    exhibit.add("S-KD", "top1", students, "test_top1")
    exhibit.add("S-RCO", "top1", [None, students[0]], "test_top1")
    exhibit.count("S-KD", "mflops", 13.5)
    return exhibit


@pytest.fixture
def drawn():
    """A figure and the numbers in it."""
    with figures.style():
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
    last = {t.run.seed: t.final["test_top1"] for t in trained[1]}
    assert table2.cells["S-KD", "top1"] == last
    table2.add("S-KD", "loss", trained[1], lambda t: t.run.seed + 0.5)
    assert table2.cells["S-KD", "loss"] == {0: 0.5, 1: 1.5}
    table2.add("S-RCO", "loss", trained[1], {0: 3.0, 1: 4.0})
    assert table2.cells["S-RCO", "loss"] == {0: 3.0, 1: 4.0}


def test_a_seed_has_one_value(table2, trained):
    table2.add("S-KD", "loss", trained[1], lambda t: 1.0)
    table2.add("S-KD", "loss", trained[1], lambda t: 1.0)
    with pytest.raises(ValueError, match=r"rco/table2: .*\(S-KD, loss\).*seed 0, 1.0 and 2.0"):
        table2.add("S-KD", "loss", trained[1], lambda t: 2.0)


# --- showing --------------------------------------------------------------------------------------


def test_the_table_gives_mean_spread_and_number_of_seeds(table2, trained):
    values = np.array([t.final["test_top1"] for t in trained[1]])
    row = table2.long_table().set_index(["row", "column"]).loc["S-KD", "top1"]
    assert (row.paper, row.unit, row.n) == (68.71, "%", 2)
    assert (row.ours, row.spread) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert np.isnan([row.low, row.high]).all()  # two seeds: the interval begins below 0 %


def test_the_shown_table_has_the_papers_rows_and_numbers_beside_ours(table2, trained):
    table = table2.table()
    assert list(table.index) == ["T-Softmax", "S-Softmax", "S-KD", "S-RCO"]
    assert table["top1 (%)", "paper"].tolist() == ["79.34", "61.88", "68.71", "70.85"]
    values, ours = [t.final["test_top1"] for t in trained[1]], table["top1 (%)", "ours, smoke"]
    assert ours["S-KD"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (2)"
    assert ours["T-Softmax"] == "–"
    assert table["mflops", "paper"].tolist() == ["2600", "13.5", "13.5", "13.5"]
    assert table["mflops", "ours, smoke"].tolist() == ["–", "–", "13.5", "–"]


def test_a_smoke_run_has_verdicts_on_counts_alone(table2):
    table = table2.verdicts()
    trained = set(table.verdict[table.kind == "gap"]) - {"not run", ""}
    assert trained == {"no verdict: a smoke run is no evidence"}
    assert "reproduced" in set(table.verdict[table.kind == "value"])


def test_a_failed_check_of_two_rows_concerns_both_and_stands_in_the_footer(table2):
    text = "The teacher is above."
    table2.check(text, False, ["S-KD"])
    table2.check(text, False, [("S-RCO", "top1")])
    assert table2.failed == {text: ["S-KD", ("S-RCO", "top1")]}
    assert table2.record().endswith(f"\nA check failed (S-KD, S-RCO @ top1): {text}")
    table2.check(text, False)
    table2.check(text, False, ["S-KD"])
    assert table2.failed == {text: None}
    table2.check(text, True)
    assert table2.failed == {}


def test_an_exhibit_is_judged_once_and_again_after_a_new_cell(table2, tmp_path, monkeypatch):
    calls, judge = [], exhibits.judge
    monkeypatch.setattr(exhibits, "judge", lambda *a: calls.append(a) or judge(*a))
    table2.verdicts()
    table2.record()
    assert len(calls) == 1
    table2.count("S-RCO", "mflops", 13.5)
    table2.record()
    path = tmp_path / "results/smoke/rco/table2/verdicts.csv"
    verdicts = pd.read_csv(path, index_col="id").verdict
    assert verdicts["rco/table2/value-mflops-student/S-RCO"] == "reproduced"
    table2.add("S-RCO", "loss", table2.used.values(), lambda trained: 1.0)
    table2.verdicts()
    assert len(calls) == 3


# --- figures --------------------------------------------------------------------------------------


def test_a_figure_carries_its_provenance(table2, drawn, tmp_path):
    table2.figure(*drawn, alt="Two points.", name="curve")
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    with PIL.Image.open(folder / "curve.png") as image:
        text = image.text
    assert (text["exhibit"], text["alt"], text["profile"]) == ("rco/table2", "Two points.", "smoke")
    assert set(json.loads(text["runs"])) == set(table2.used)
    assert "Two points." in (folder / "curve.svg").read_text()
    assert pd.read_csv(folder / "curve.csv").to_dict("list") == {"x": [1, 2], "y": [3, 4]}


def test_trained_numbers_of_a_smoke_run_are_stamped_as_no_evidence(table2, drawn, tmp_path):
    table2.figure(*drawn, alt="Two points.")
    table2.record()
    assert texts(drawn[0]) == [NO_EVIDENCE]
    assert NO_EVIDENCE in (tmp_path / "results/smoke/rco/table2/table.md").read_text()


@pytest.mark.parametrize("profile", [SMOKE, PAPER], ids=lambda profile: profile.name)
def test_other_numbers_are_not_stamped(trained, drawn, tmp_path, profile):
    exhibit = Exhibit("rco/table2", profile)
    exhibit.count("S-KD", "mflops", 13.5)
    if profile is PAPER:
        exhibit.add("S-KD", "top1", trained[1], "test_top1")
    exhibit.figure(*drawn, alt="Two points.")
    exhibit.record()
    assert texts(drawn[0]) == []
    text = (tmp_path / f"results/{profile.name}/rco/table2/table.md").read_text()
    assert NO_EVIDENCE not in text
    assert RECONSTRUCTED not in text


def test_every_frame_of_a_smoke_animation_is_stamped(table2, tmp_path):
    figure = Figure(figsize=(2, 1))

    def draw_frame(frame):
        figure.subplots().plot([0, frame])

    table2.animation(figure, draw_frame, range(3), alt="A line rises.", name="rise")
    assert texts(figure) == [NO_EVIDENCE]
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    with PIL.Image.open(folder / "rise.gif") as image:
        assert image.n_frames == 3
    about = json.loads((folder / "rise.gif.json").read_text())
    assert (about["alt"], set(about["runs"])) == ("A line rises.", set(table2.used))


# --- recording ------------------------------------------------------------------------------------


def test_every_file_has_its_provenance_and_hash_beside_it(table2, trained, drawn, tmp_path):
    table2.figure(*drawn, alt="Two points.")
    table2.record()
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    made = {"table.csv", "table.md", "verdicts.csv", "figure.png", "figure.svg", "figure.csv"}
    assert {path.name for path in folder.iterdir()} == made | {f"{name}.json" for name in made}
    for name in made:
        about = json.loads((folder / f"{name}.json").read_text())
        assert about["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert (about["file"], about["exhibit"], about["profile"]) == (name, "rco/table2", "smoke")
        assert about["notebook"] == "notebooks/rco/03_table2.ipynb"
        assert set(about["runs"]) == {t.run.id for part in trained for t in part}
        assert (about["seeds"], about["data"], about["evidence"]) == ([0, 1], "digits", False)
        assert "torch" in about["versions"]


def test_the_written_table_is_the_shown_one(table2, tmp_path):
    table2.record()
    folder = tmp_path / "results" / "smoke" / "rco" / "table2"
    written = pd.read_csv(folder / "table.csv")
    pd.testing.assert_frame_equal(written, table2.long_table(), check_dtype=False)
    text = (folder / "table.md").read_text()
    for value in ("rco/table2", "79.34", table2.table()["top1 (%)", "ours, smoke"]["S-KD"]):
        assert value in text
    verdicts = pd.read_csv(folder / "verdicts.csv")
    expected = {claim["id"] for claim in all_claims() if claim["exhibit"] == "rco/table2"}
    assert {"/".join(i.split("/")[:3]) for i in verdicts.id} == expected


def test_records_of_all_runs_and_their_teachers_are_copied(trained, tmp_path):
    teachers, students = trained
    exhibit = Exhibit("rco/table2", SMOKE)
    exhibit.add("S-KD", "top1", students, "test_top1")
    footer = exhibit.record()
    for part in ("rco/table2", "commit", "profile smoke", "data digits", "seeds [0, 1]"):
        assert part in footer
    copied = {path.stem for path in (tmp_path / "results" / "smoke" / "records").iterdir()}
    assert copied == {t.run.id for t in (*teachers, *students)}


def test_results_that_cannot_be_written_say_what_to_do(table2, drawn, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDLIB_RESULTS", str(tmp_path / "file" / "results"))
    with pytest.raises(StoreError, match=r"Cannot write .*KDLIB_RESULTS"):
        table2.record()
    with pytest.raises(StoreError, match=r"Cannot write .*KDLIB_RESULTS"):
        table2.figure(*drawn, alt="Two points.")


def test_an_exhibit_of_the_book_itself_has_no_claims(trained, tmp_path):
    exhibit = Exhibit("book/start_here", SMOKE)
    exhibit.add("student", "top1", trained[1], "test_top1")
    assert len(exhibit.verdicts()) == 0
    exhibit.record()
    assert (tmp_path / "results/smoke/book/start_here/table.csv").exists()
    assert len(scorecard.gather(SMOKE)) >= len(all_claims())


def test_an_exhibit_with_a_reconstruction_says_so(tmp_path):
    exhibit = Exhibit("kr/table1", PAPER)
    exhibit.count("KR", "params", 0.06)
    exhibit.record()
    assert RECONSTRUCTED in (tmp_path / "results/paper/kr/table1/table.md").read_text()
