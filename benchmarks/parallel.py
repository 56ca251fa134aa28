"""Speed of 1 to 64 students trained in parallel, in images/s of all students.

Each student has a seed of its own. All students share one cache of logits, filled with random
numbers: a step takes the same time, and no teacher has to run. A turn is one epoch of every
student. A rising line shows that the device had unused time. A flat line, as on a CPU, shows that
one student keeps the device busy: another student costs its own arithmetic and no more. The time
excludes evaluation and saving.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks import arguments, compare, selected
from benchmarks.tables import report
from benchmarks.training import RECIPE, Students, begin_again, untrained
from kdbook import figures
from kdlib import KD, Run

# Student, teacher, and images: as few as fill a turn.
PAIRS = {
    "cpu": [("resnet8-x0.5", "resnet8", 256)],
    "cuda": [
        ("mobilenetv2-t6-w0.5", "resnet50", 8192),
        ("resnet20", "resnet110", 8192),
        ("densenet-bc-100-12", "densenet-bc-100-12", 2048),
    ],
}
NUMBERS = (1, 2, 4, 8, 16, 32, 64)


def run_pair(name: str, pair: tuple, options: argparse.Namespace) -> Iterator[dict]:
    """Speeds for all numbers of students that fit in memory."""
    student, teacher, count = pair
    with untrained(teacher, count, options.device) as (teacher_run, images, test):
        run = Run(teacher_run.data, student, RECIPE, KD(teacher_run))
        students = Students(run, images, test)
        students.fill_cache()
        try:
            for n in range(1, NUMBERS[-1] + 1):
                begin_again(students.first(n)[-1])  # on a GPU it captures the step
        except torch.OutOfMemoryError:
            del students.trainers[n - 1 :]  # release the incomplete one
            print(f"{len(students.trainers)} students {student} fit in memory.")
        fitting = [n for n in NUMBERS if n <= len(students.trainers)]
        contenders = {f"students: {n}": partial(students.turn, n) for n in fitting}
        ratios = {([*contenders][-1], "students: 1"): None}
        yield from compare(name, contenders, ratios, options)


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
    pairs = {
        f"{student} ← {teacher}": (student, teacher, count)
        for student, teacher, count in PAIRS[options.device.type]
    }
    rows = (r for case in selected(pairs, options) for r in run_pair(*case, options))
    report("parallel", rows, options, draw)


if __name__ == "__main__":
    main()
