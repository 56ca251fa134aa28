"""How close training comes to what the machine allows: images/s against a bound, and a picture.

The bound is the slowest of three: arithmetic at the speed of a large matrix product, the bytes of
all operations at the speed of a copy, all kernels one after the other. ``ceilings`` measures these
speeds, ``bounds`` counts the work; of each ceiling the best round counts. Nobody reaches all of a
bound: thin convolutions leave most of a matrix unit idle, and every operation waits for the one
before. A share above 1 says that a cache kept what was counted as moved.

- students: a step of a lane with plain cross-entropy, gather and update included; on a GPU the
  replayed graph, of compiled kernels where kdlib compiles. Against launches: on a GPU nodes of the
  graph, on a CPU the host's time for an operation.
- teachers: a sweep of labels as a bank makes it, batch norms folded.

Networks take turns. What binds stands beside each share; the CSV has the counted work as well.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import Turn, arguments, report, row, timed
from benchmarks.batches import noise
from benchmarks.bounds import Work, forward, training
from benchmarks.ceilings import Ceilings, measure, rows_of
from benchmarks.training import lane_turn
from kdlib import Recipe, Run, build_model, plots
from kdlib.data import Images
from kdlib.engine.bank import LabelBank, Shelf
from kdlib.engine.device import environment, keep_large_blocks, training_dtype
from kdlib.engine.lane import Lane

CLASSES = 100
# So many that a lane compiles its network where it ever does; hardly any of them is run.
EPOCHS = 1000
# Of a turn: steps of a student, chunks of a sweep.
STEPS = {"cpu": 2, "cuda": 200}
CHUNKS = {"cpu": 1, "cuda": 12}


class Case(NamedTuple):
    """A network, and the images of a step; for a teacher none, its bank's chunk is taken."""

    network: str
    batch: int | None


CASES = [
    Case("mobilenetv2-t6-w0.5", 64),
    Case("mobilenetv2-t10-w1", 64),
    Case("resnet20", 128),
    Case("wrn-16-1", 128),
    Case("vgg13", 128),
    Case("resnet50", None),
    Case("resnet110", None),
]
DENSENET = {"cpu": Case("densenet-bc-40-12", 64), "cuda": Case("densenet-bc-100-12", 128)}


class Contender(NamedTuple):
    """What is timed: its name, images and work of a step, one turn."""

    name: str
    batch: int
    work: Work
    turn: Callable[[], Turn]


def random_images(count: int, device: torch.device) -> Images:
    names = tuple(f"{k:02d}" for k in range(CLASSES))
    return replace(noise(count, device), class_names=names)


def student(case: Case, device: torch.device) -> Contender:
    images = random_images(STEPS[device.type] * case.batch, device)
    run = Run("cifar100", case.network, Recipe(EPOCHS, case.batch, lr=0.05))
    lane = Lane(run, images, images, Shelf())
    trainee = lane.trainee
    work = training(trainee.networks["student"], case.batch, trainee.dtype, trainee.compiled)
    name = f"{case.network}, batch {case.batch}"
    return Contender(name, case.batch, work, partial(lane_turn, lane, 1, cold=False))


def teacher(case: Case, device: torch.device) -> Contender:
    images = random_images(2048 * CHUNKS[device.type], device)
    bank = LabelBank(build_model(case.network, CLASSES, seed=0).eval(), images)
    index = torch.arange(bank.chunk * CHUNKS[device.type], device=device).split(bank.chunk)

    def sweep() -> None:
        for chunk in index:
            bank.live(chunk, chunk % images.views)

    sweep()  # warms up
    work = forward(bank.teacher, bank.chunk, bank.dtype)
    turn = partial(timed, sweep, len(index) * bank.chunk, device)
    return Contender(f"{case.network}, labels", bank.chunk, work, turn)


def rows_for(contender: Contender, turns: list[Turn], ceilings: Ceilings) -> list[dict]:
    seconds, cause = contender.work.bound(ceilings)
    bound = contender.batch / seconds
    about = {"batch": contender.batch, "cause": cause, **contender.work._asdict()}
    rows = [row(contender.name, f"bound by {cause}, images/s", bound) | about]
    for k, turn in enumerate(turns):
        speed = turn.images / turn.wall
        rows.append(row(contender.name, "images/s", speed, k) | about)
        rows.append(row(contender.name, f"share of the bound by {cause}", speed / bound, k) | about)
    return rows


def draw(
    contenders: list[Contender], turns: dict[str, list[Turn]], ceilings: Ceilings, machine: str
) -> Figure:
    """FLOP/s against FLOPs a byte: the roof, what each network reached, and a line to its bound."""
    points = {}
    for contender in contenders:
        work, (seconds, cause) = contender.work, contender.work.bound(ceilings)
        speed = pd.Series([turn.images / turn.wall for turn in turns[contender.name]]).median()
        reached = speed * work.flops / contender.batch
        points[contender.name] = (work.flops / work.bytes, reached, work.flops / seconds, cause)
    table = pd.DataFrame(points, index=["intensity", "reached", "bound", "cause"]).T
    with plots.style():
        figure = Figure(figsize=(plots.PAGE, 4.2))
        axes = figure.subplots()
        x = [table.intensity.min() / 2, 4 * table.intensity.max()]
        ridge = ceilings.flops_per_s / ceilings.bytes_per_s
        corners = sorted([*x, min(max(ridge, x[0]), x[1])])
        roof = [min(ceilings.flops_per_s, at * ceilings.bytes_per_s) for at in corners]
        axes.plot(corners, roof, color=plots.BLACK, ls="-", marker="")
        colors = [plots.OKABE_ITO[k % 6] for k in range(len(table))]
        for point, color in zip(table.itertuples(), colors, strict=True):
            ends = [point.reached, point.bound]
            axes.plot([point.intensity] * 2, ends, color=color, lw=0.7, ls="-", marker="")
            axes.plot(point.intensity, point.bound, color=color, marker="_", ms=8)
            mark = "^" if point.cause == "launches" else "s" if "labels" in point.Index else "o"
            axes.plot(point.intensity, point.reached, color=color, marker=mark, ms=6, ls="")
        axes.set(xscale="log", yscale="log", xlim=x)
        axes.set_xlabel("FLOPs a byte through memory")
        axes.set_ylabel("FLOP/s")
        axes.set_title(machine, loc="left")
        plots.name_points(axes, table.intensity, table.reached, colors)
        marks = {"o": "student's step", "^": "the same, bound by launches", "s": "teacher's labels"}
        handles = [Line2D([], [], color="k", marker=m, ls="", label=t) for m, t in marks.items()]
        label = f"{ceilings.bytes_per_s / 1e9:,.0f} GB/s, {ceilings.flops_per_s / 1e9:,.0f} GFLOP/s"
        handles.append(Line2D([], [], color="k", ls="-", marker="", label=label))
        handles.append(Line2D([], [], color="k", ls="", marker="_", ms=8, label="bound"))
        figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=7)
    return figure


def main() -> None:
    options = arguments(__doc__)
    device = options.device
    keep_large_blocks()
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = root
        contenders = [
            (student if case.batch else teacher)(case, device)
            for case in [*CASES, DENSENET[device.type]]
        ]
        measured, turns = [], {contender.name: [] for contender in contenders}
        for _ in range(options.rounds):
            measured.append(measure(device))
            for contender in contenders:
                turns[contender.name].append(contender.turn())
    ceilings = Ceilings.best(measured)
    rows = rows_of(measured, device)
    for contender in contenders:
        rows += rows_for(contender, turns[contender.name], ceilings)
    report("roofline", rows, options)
    about = environment(device, training_dtype(device))
    machine = "{device}, {threads} threads, {precision}".format(**about)
    draw(contenders, turns, ceilings, machine).savefig(options.out / f"roofline-{device.type}.png")


if __name__ == "__main__":
    main()
