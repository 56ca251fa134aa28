"""Tables of the benchmarks: rows as they are measured, what is left out, what has not run."""

import argparse
import time

import pandas as pd
import pytest
import torch

from benchmarks import Turn, compare, layouts, row, selected, tables


def settings(out, **changes) -> argparse.Namespace:
    usual = {"out": out, "device": torch.device("cpu"), "rounds": 1, "case": (), "minutes": 1}
    usual |= {"until": torch.inf, "compile": False, "write": False}
    return argparse.Namespace(**usual | changes)


def values_in(out) -> dict[str, float]:
    return pd.read_csv(out / "program-cpu.csv").set_index("case").value.to_dict()


def test_a_stopped_program_leaves_the_rows_so_far(tmp_path):
    def stopped():
        yield row("a", "speed", 1.0)
        yield row("b", "speed", 2.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tables.report("program", stopped(), settings(tmp_path))
    assert values_in(tmp_path) == {"a": 1, "b": 2}
    tables.report("program", [row("b", "speed", 3.0)], settings(tmp_path, case=("b",)))
    assert values_in(tmp_path) == {"a": 1, "b": 3}
    tables.report("program", [row("b", "speed", 4.0)], settings(tmp_path))
    assert values_in(tmp_path) == {"b": 4}


def test_no_turn_and_no_case_begins_when_the_time_is_over(tmp_path, capsys):
    options = settings(tmp_path, rounds=9, until=time.perf_counter() + 0.1)

    def slow() -> Turn:
        time.sleep(0.06)
        return Turn(1, 1.0, 1.0)

    cases = {"first": slow, "second": slow}
    rows = [
        r for name, run in selected(cases, options) for r in compare(name, {"x": run}, {}, options)
    ]
    assert [r["round"] for r in rows] == [0, 1]
    assert {r["case"] for r in rows} == {"first"}
    left_out = capsys.readouterr().out.splitlines()
    assert [line.partition("Left out: ")[2] for line in left_out] == [
        "first: round 3 from x on",
        "second",
    ]


def test_an_unknown_case_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(SystemExit, match=r"contains vgg\. The cases are: resnet8; resnet20"):
        list(selected({"resnet8": 1, "resnet20": 2}, settings(tmp_path, case=("vgg",))))


def test_the_readme_says_what_has_not_run_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "README.md").write_text(f"before\n\n{tables.MARKER}\n\nold\n\n{tables.MARKER}\n")
    (tmp_path / "training.py").write_text('"""Speed."""')
    out = tmp_path / "results"
    tables.report("training", [row("pair", "speed", 1.0)], settings(out, write=True))
    text = (tmp_path / "README.md").read_text()
    assert "| speed | 1.00 |" in text
    assert "### training on a GPU\n\n*Not run on a GPU yet.* Command:" in text
    assert "old" not in text
    (out / "training-cpu.csv").rename(out / "training-cuda.csv")
    tables.fill_readme(out)
    head = "### training on a GPU\n\nSpeed. Command: `python -m benchmarks.training --device cuda`."
    assert head in (tmp_path / "README.md").read_text()


def test_the_table_of_bfloat16_has_the_median_ratio_of_a_family():
    measured = [
        *(row("resnet20, 16x16, step", layouts.RATIO, value) for value in (1.2, 1.4, 9.0)),
        row("resnet8-x0.5, 16x16, step", layouts.RATIO, 1.2),
        row("resnet20, 8x8, step", layouts.RATIO, 1.2),  # below the least side
        row("resnet20, 8x8, labels", layouts.RATIO, 1.2),
        row("resnet20, 16x16, labels", layouts.RATIO, 2.0),
        row("resnet20, 16x16, labels", "contiguous / channels_last", 0.1),
        row("lenet, 28x28, labels", layouts.RATIO, 0.9),  # a step was not measured
    ]
    table = layouts.bfloat16_table(pd.DataFrame(measured))
    assert table.to_csv() == "family,side,training,labels\nresnet,16,1.3,2.0\n"
