"""Cost against work: students side by side, from one to 64, in images/s of all together.

Each lane is a kdlib lane of a seed of its own, with all labels of its epoch in a bank that all
share; a turn is an epoch of every lane. A line that rises shows that a device had time to spare; a
flat one, as on a CPU, that it is busy with one student, and that another costs what it computes
and no more. Evaluation and saving are not in the time.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks import arguments, compare, report, save_picture
from benchmarks.training import RECIPE, lanes_turn, noise_folder, save_untrained
from kdbook.figures import style
from kdlib import KD, Run, load_data
from kdlib.engine.device import prepare
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.trainer import Trainer

# Student, teacher, images.
PAIRS = {
    "cpu": [("resnet8-x0.5", "resnet8", 256)],
    "cuda": [
        ("mobilenetv2-t6-w0.5", "resnet50", 50_000),
        ("resnet20", "resnet110", 50_000),
        ("densenet-bc-100-12", "densenet-bc-100-12", 12_800),
    ],
}
WIDTHS = (1, 2, 4, 8, 16, 32, 64)


def run_pair(student: str, teacher: str, count: int, options: argparse.Namespace) -> list[dict]:
    """Speeds at all widths that memory lasts for."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", count)
        images, test = (load_data(data, split, options.device) for split in ("train", "test"))
        taught = Run(data, teacher, RECIPE)
        save_untrained(taught, images)
        run, banks, lanes = Run(data, student, RECIPE, KD(taught)), CachePool(), []
        try:
            for seed in range(WIDTHS[-1]):
                lane = Trainer(replace(run, seed=seed), images, test, banks)
                lane.begin_epoch()  # its labels are in the bank from now on
                lanes.append(lane)
        except torch.OutOfMemoryError:
            lane = None  # the one that is half built
            print(f"Memory lasts for {len(lanes)} lanes of {student}.")
        contenders = {
            f"lanes: {n}": partial(lanes_turn, lanes[:n], 1, False)
            for n in WIDTHS
            if n <= len(lanes)
        }
        widest = [*contenders][-1]
        return [
            *compare(f"{student} ← {teacher}", contenders, {(widest, "lanes: 1"): None}, options)
        ]


def draw(table: pd.DataFrame) -> Figure:
    """Images/s of all lanes, relative to one, against their number."""
    table = table[table.quantity.str.fullmatch(r"lanes: \d+, images/s")].copy()
    table["lanes"] = table.quantity.str.extract(r"(\d+)", expand=False).astype(int)
    with style():
        figure = Figure(figsize=(5, 3.2))
        axes = figure.subplots()
        for case, speeds in table.groupby("case", sort=False):
            runs = speeds.groupby("lanes").value.agg(["median", "min", "max"])
            runs /= runs["median"].loc[1]
            axes.plot(runs.index, runs["median"], label=case)
            axes.fill_between(runs.index, runs["min"], runs["max"], alpha=0.2)
        axes.axhline(1, color="#888888", lw=0.8, ls=":", marker="", label="as fast as one")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.5, max(2, axes.get_ylim()[1]))
        axes.set_xticks(WIDTHS)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="lanes side by side", ylabel="images/s of all, relative to one lane")
        axes.legend()
    return figure


def main() -> None:
    options = arguments(__doc__)
    prepare(options.device)
    rows = [r for pair in PAIRS[options.device.type] for r in run_pair(*pair, options)]
    save_picture("lanes", draw(pd.DataFrame(rows)), options)
    report("lanes", rows, options)


if __name__ == "__main__":
    main()
