"""How the whole book's cost grows with its seeds: counted, before anything is trained.

For one, two, … seeds of a profile, in 10¹⁸ multiply-accumulates:

- training: forward and backward passes of all that is trained, worth three forward passes;
- labels, live: forward passes of the teachers, if one ran beside every student in every epoch;
- labels, banked: those that a bank asks for, each image and view once.

Every seed has teachers of its own, so that all three grow with the seeds in a straight line; what a
bank saves, it saves among the students of one teacher.

Teachers that a loss takes features from run in every step either way, and are in both. Of what a
method trains along nothing is counted but the student.
"""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import arguments, report, row, save_picture
from kdbook.figures import style
from kdbook.profiles import PROFILES
from kdlib.engine.passes import ancestry, teacher_passes
from kdlib.models import build_model, count_cost
from kdlib.runs import Run

sys.path.append(str(Path(__file__).parent.parent / "workflow"))
import book
import forecast

SEEDS = (1, 2, 3, 5, 8)
# Training images, and their side and channels, where they are not CIFAR's.
SHAPES = {"mnist": (60_000, 28, 1), "digits": (1_438, 8, 1)}
CIFAR = (50_000, 32, 3)


def forward_macs(run: Run) -> int:
    """One pass of a run's network over its training images."""
    count, side, channels = SHAPES.get(run.data.partition("+")[0], CIFAR)
    return (run.images or count) * macs_an_image(run.model, side, channels)


@cache
def macs_an_image(model: str, side: int, channels: int) -> int:
    return count_cost(build_model(model, 100, channels, seed=0), side).macs


def costs(runs: list[Run]) -> dict[str, float]:
    """Multiply-accumulates by what they are for."""
    everything = ancestry(runs)
    labels = {
        teacher: (forward_macs(teacher[0]), sweeps)
        for teacher, sweeps in teacher_passes(everything).items()
    }
    return {
        "training": sum(3.0 * forward_macs(run) * run.recipe.epochs for run in everything),
        "labels, live": sum(float(macs * sweeps.live) for macs, sweeps in labels.values()),
        "labels, banked": sum(macs * sweeps.banked for macs, sweeps in labels.values()),
    }


def declared(profile: str, seeds: int) -> list[Run]:
    """What the notebooks train, with so many seeds."""
    before = PROFILES[profile]
    PROFILES[profile] = replace(before, seeds=tuple(range(seeds)))
    runs = [r for n in book.notebooks() for r in forecast.declared(n, profile=profile, data=None)]
    PROFILES[profile] = before
    return runs


def draw(table: pd.DataFrame) -> Figure:
    """What is trained at the bottom, the teachers' passes on top of it."""
    cost = table.pivot(index="seeds", columns="quantity", values="value")
    with style():
        figure = Figure(figsize=(4.6, 3.2))
        axes = figure.subplots()
        for which, name in (("labels, live", "live"), ("labels, banked", "banked")):
            axes.plot(cost.index, cost.training + cost[which], label=f"training + labels, {name}")
        axes.plot(cost.index, cost.training, label="training alone")
        axes.set(xlabel="seeds", ylabel="multiply-accumulates, 10¹⁸", xticks=SEEDS, ylim=0)
        axes.legend()
    return figure


def main() -> None:
    options = arguments(__doc__, profile={"choices": [*PROFILES], "default": "paper"})
    rows = []
    for seeds in SEEDS:
        found = costs(declared(options.profile, seeds))
        case = f"{options.profile}, seeds: {seeds}"
        rows += [row(case, q, value / 1e18) | {"seeds": seeds} for q, value in found.items()]
        spared = found["training"] + found["labels, live"]
        spared /= found["training"] + found["labels, banked"]
        rows.append(row(case, "all with live teachers / with the bank", spared) | {"seeds": seeds})
    save_picture("seeds", draw(pd.DataFrame(rows).query("~quantity.str.contains('/')")), options)
    report("seeds", rows, options)


if __name__ == "__main__":
    main()
