"""Progress: a log file, lines, a bar, or nothing."""

import re

import pytest

from kdlib import train
from kdlib.engine.plan import epoch_batches


def test_a_log_file_gets_a_line_for_each_epoch(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_LOG", str(tmp_path / "log"))
    run = tiny()
    (trained,) = train([run])
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2
    for k, line in enumerate(lines, 1):
        assert f"{run} · epoch {k}/2 · loss " in line
    assert lines[1].endswith("00:00 left")
    speeds = r"· ([\d.]+) epochs/s · ([\d,]+) images/s · 00:00 left · all runs: "
    epochs, images = re.search(speeds, lines[1]).groups()
    index, _ = epoch_batches(0, 1, 128, 9, 24)
    seconds = trained.final["seconds"]
    assert float(epochs) == pytest.approx(1 / seconds, rel=0.01)
    assert int(images.replace(",", "")) == pytest.approx(index.numel() / seconds, abs=1)


def test_plain_progress_prints_a_line_for_each_run(tiny, monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_PROGRESS", "lines")
    runs = [tiny(seed=0), tiny(seed=1)]
    train(runs)
    lines = capsys.readouterr().out.splitlines()
    for run, line in zip(runs, lines, strict=True):
        assert line.startswith(f"{run} · epoch 2/2 · loss ")


def test_quiet_progress_prints_nothing(tiny, capfd):
    train([tiny()])
    assert capfd.readouterr() == ("", "")


def test_a_bar_counts_the_epochs(tiny, monkeypatch, capfd):
    monkeypatch.setenv("KDLIB_PROGRESS", "bar")
    train([tiny()])
    assert "2/2" in capfd.readouterr().err
