"""Speed of 1 to 64 students trained in parallel, in images/s of all students.

Each student has a seed of its own. All students share one cache of the teacher's logits, which has
all logits of the epoch. A turn is one epoch of every student. A rising line shows that the device
had unused time. A flat line, as on a CPU, shows that one student keeps the device busy: another
student costs its own arithmetic and no more. The time excludes evaluation and saving.
"""

import argparse
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks import arguments, compare, report, save_picture
from benchmarks.training import RECIPE, train_turn, untrained
from kdbook import figures
from kdlib import KD, Run
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.device import prepare
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
NUMBERS = (1, 2, 4, 8, 16, 32, 64)


def run_pair(student: str, teacher: str, count: int, options: argparse.Namespace) -> list[dict]:
    """Speeds for all numbers of students that fit in memory."""
    with untrained(teacher, count, options.device) as (teacher_run, images, test):
        run = Run(teacher_run.data, student, RECIPE, KD(teacher_run))
        caches, trainers = CachePool(), []
        try:
            for seed in range(NUMBERS[-1]):
                trainer = Trainer(replace(run, seed=seed), images, test, caches)
                trainer.begin_epoch()  # puts its logits into the cache
                trainers.append(trainer)
        except torch.OutOfMemoryError:
            trainer = None  # release the incomplete one
            print(f"{len(trainers)} students {student} fit in memory.")
        contenders = {
            f"students: {n}": partial(train_turn, trainers[:n])
            for n in NUMBERS
            if n <= len(trainers)
        }
        ratios = {([*contenders][-1], "students: 1"): None}
        return [*compare(f"{student} ← {teacher}", contenders, ratios, options)]


def draw(table: pd.DataFrame) -> Figure:
    """Images/s of all students relative to one student, against the number of students."""
    table = table[table.quantity.str.fullmatch(r"students: \d+, images/s")].copy()
    table["students"] = table.quantity.str.extract(r"(\d+)", expand=False).astype(int)
    with figures.style():
        figure = Figure(figsize=(5, 3.2))
        axes = figure.subplots()
        for case, speeds in table.groupby("case", sort=False):
            runs = speeds.groupby("students").value.agg(["median", "min", "max"])
            runs /= runs["median"].loc[1]
            axes.plot(runs.index, runs["median"], label=case)
            axes.fill_between(runs.index, runs["min"], runs["max"], alpha=0.2)
        axes.axhline(1, color="#888888", lw=0.8, ls=":", marker="", label="speed of one student")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.5, max(2, axes.get_ylim()[1]))
        axes.set_xticks(NUMBERS)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="students trained in parallel", ylabel="images/s of all, relative to one")
        axes.legend()
    return figure


def main() -> None:
    options = arguments(__doc__)
    prepare(options.device)
    rows = [r for pair in PAIRS[options.device.type] for r in run_pair(*pair, options)]
    save_picture("parallel", draw(pd.DataFrame(rows)), options)
    report("parallel", rows, options)


if __name__ == "__main__":
    main()
