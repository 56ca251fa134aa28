"""Cost of the whole book against the number of seeds, counted before training.

For several numbers of seeds of a profile, in 10¹⁸ multiply-accumulates:

- training: forward and backward passes of all trained networks, counted as three forward passes.
- teacher passes, uncached: forward passes of teachers that run beside every student in every epoch.
- teacher passes, cached: the passes that remain with the cache of teacher logits, which computes
  each image and view once.

Every seed has its own teachers, so all three grow linearly with the seeds. The cache saves work
among the students of one teacher.

If a loss needs features of the teacher, the teacher runs in every step, with and without the cache;
both counts include this. Networks that a method trains beside the student do not count.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import arguments, row, selected
from benchmarks.tables import report
from kdbook import figures
from kdbook.cli.forecast import estimated_runs
from kdbook.cli.notebooks import all_notebooks
from kdbook.profiles import PROFILES
from kdlib import Run, build_model, count_cost
from kdlib.engine.graph import ancestry
from kdlib.engine.passes import teacher_passes

SEEDS = (1, 2, 3, 5, 8)
# Number of training images, their side and channels.
SHAPES = {"mnist": (60_000, 28, 1), "digits": (1_438, 8, 1)}
CIFAR = (50_000, 32, 3)  # all other data sets


def forward_macs(run: Run) -> int:
    """Multiply-accumulates of one pass of a run's network over its training images."""
    count, side, channels = SHAPES.get(run.data.partition("+")[0], CIFAR)
    return (run.images or count) * macs_per_image(run.model, side, channels)


@cache
def macs_per_image(model: str, side: int, channels: int) -> int:
    base = model.partition("@")[0]  # no search has found the architecture yet: count its base
    return count_cost(build_model(base, 100, channels, seed=0), side).macs


def costs(runs: list[Run]) -> dict[str, float]:
    """Multiply-accumulates by their purpose."""
    everything = ancestry(runs)
    teachers = [(forward_macs(c.run), p) for c, p in teacher_passes(everything).items()]
    return {
        "training": sum(3.0 * forward_macs(run) * run.recipe.epochs for run in everything),
        "teacher passes, uncached": sum(float(macs * p.uncached) for macs, p in teachers),
        "teacher passes, cached": sum(macs * p.cached for macs, p in teachers),
    }


def runs_of_book(profile_name: str, seeds: int) -> list[Run]:
    """All runs of the notebooks with ``seeds`` seeds."""
    before = PROFILES[profile_name]
    PROFILES[profile_name] = replace(before, seeds=tuple(range(seeds)))
    parameters = {"profile_name": profile_name, "data": None}
    runs = [r for notebook in all_notebooks() for r in estimated_runs(notebook, **parameters)]
    PROFILES[profile_name] = before
    return runs


def draw(table: pd.DataFrame) -> Figure:
    """Training, and the teacher passes added to it, against the number of seeds."""
    table = table[~table.quantity.str.contains("/")]
    cost = table.pivot(index="seeds", columns="quantity", values="value")
    with figures.style():
        figure = Figure(figsize=(4.6, 3.2))
        axes = figure.subplots()
        for which in ("uncached", "cached"):
            total = cost.training + cost[f"teacher passes, {which}"]
            axes.plot(cost.index, total, label=f"training + teacher passes, {which}")
        axes.plot(cost.index, cost.training, label="training alone")
        axes.set(xlabel="seeds", ylabel="multiply-accumulates, 10¹⁸", xticks=SEEDS, ylim=0)
        axes.legend()
    return figure


def rows_for(case: str, profile_name: str, seeds: int) -> Iterator[dict]:
    found = costs(runs_of_book(profile_name, seeds))
    training, uncached, cached = found.values()
    found = {quantity: value / 1e18 for quantity, value in found.items()}
    found["total, uncached / cached"] = (training + uncached) / (training + cached)
    for quantity, value in found.items():
        yield row(case, quantity, value) | {"seeds": seeds}


def main() -> None:
    options = arguments(__doc__, profile={"choices": [*PROFILES], "default": "paper"})
    cases = selected({f"{options.profile}, seeds: {seeds}": seeds for seeds in SEEDS}, options)
    rows = (r for case, seeds in cases for r in rows_for(case, options.profile, seeds))
    report("seeds", rows, options, draw)


if __name__ == "__main__":
    main()
