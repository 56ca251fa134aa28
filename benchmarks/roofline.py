"""How close training comes to what the machine allows: images/s against a bound, and a picture.

The bound is the slowest of three: arithmetic at the speed of a large product, the bytes of all
operations at the speed of a copy, all kernels one after the other. ``ceilings`` measures these
speeds anew before every turn, which is judged by them, and ``bounds`` counts the work. What binds,
and the picture's roof, follow from the best of each.

Hardly anything reaches all of a bound. Thin and depthwise convolutions leave most of an arithmetic
unit idle; and while one operation waits for memory, the arithmetic of others waits as well, which
"were nothing to overlap" allows for, with the sum of the three as the bound. A share above 1 says
that a cache kept what was counted as moved, or that multiplications by an image's padding, which
count, were left out: of 3x3 convolutions on 4x4 images these are three in ten.

- students: a step of a lane with plain cross-entropy, gather and update included; on a GPU the
  replayed graph, of compiled kernels where kdlib compiles. Against launches: on a GPU nodes of the
  graph, on a CPU the host's time for an operation.
- teachers: a sweep of labels as a bank makes it, batch norms folded.

Networks take turns. What binds stands beside each share; the CSV has also the counted work of a
step and the seconds that each part of it takes by itself.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import Turn, arguments, report, row, save_picture, timed
from benchmarks.batches import noise
from benchmarks.bounds import Work, forward, training
from benchmarks.ceilings import Ceilings, measure, rows_of
from benchmarks.training import lanes_turn
from kdbook import figures
from kdlib import Recipe, Run, build_model
from kdlib.data import Images
from kdlib.engine.device import environment, prepare, training_dtype
from kdlib.engine.logit_cache import CachePool, LogitCache
from kdlib.engine.trainer import Trainer

CLASSES = 100
# So many that a lane compiles its network where it ever does; hardly any of them is run.
EPOCHS = 1000
# Of a turn: steps of a student, chunks of a sweep.
STEPS = {"cpu": 2, "cuda": 200}
CHUNKS = {"cpu": 1, "cuda": 12}
# A lower share of the bound is marked.
LEAST = 0.5
MARKS = {"o": "a student's step", "^": "bound by launches", "s": "a teacher's labels"}
LABELS = ", labels"
# Of the picture's axes.
UNIT = {"cpu": (1e9, "G"), "cuda": (1e12, "T")}


class Case(NamedTuple):
    """A network, and the images of a step; for a teacher none, its bank's chunk is taken."""

    network: str
    batch: int | None


STUDENTS = [
    Case("mobilenetv2-t6-w0.5", 64),
    Case("mobilenetv2-t10-w1", 64),
    Case("resnet20", 128),
    Case("wrn-16-1", 128),
    Case("vgg13", 128),
]
TEACHERS = [Case("resnet50", None), Case("resnet110", None)]
DENSENET = {"cpu": Case("densenet-bc-40-12", 64), "cuda": Case("densenet-bc-100-12", 128)}


class Contender(NamedTuple):
    """What is timed: its name, images and work of a step, one turn."""

    name: str
    batch: int
    work: Work
    turn: Callable[[], Turn]


class Reached(NamedTuple):
    """Images/s of a turn, and the machine's limits just before it."""

    speed: float
    ceilings: Ceilings


def random_images(count: int, device: torch.device) -> Images:
    names = tuple(f"{k:02d}" for k in range(CLASSES))
    return replace(noise(count, device), class_names=names)


def student(case: Case, device: torch.device) -> Contender:
    images = random_images(STEPS[device.type] * case.batch, device)
    run = Run("cifar100", case.network, Recipe(EPOCHS, case.batch, lr=0.05))
    lane = Trainer(run, images, images, CachePool())
    trainee = lane.state
    work = training(trainee.networks["student"], case.batch, trainee.dtype, trainee.compiled)
    name = f"{case.network}, batch {case.batch}"
    return Contender(name, case.batch, work, partial(lanes_turn, [lane], 1, cold=False))


def teacher(case: Case, device: torch.device) -> Contender:
    images = random_images(2048 * CHUNKS[device.type], device)
    bank = LogitCache(build_model(case.network, CLASSES, seed=0).eval(), images)
    index = torch.arange(bank.chunk * CHUNKS[device.type], device=device).split(bank.chunk)

    def sweep() -> None:
        for chunk in index:
            bank.live(chunk, chunk % images.views)

    sweep()  # warms up
    work = forward(bank.teacher, bank.chunk, bank.dtype)
    turn = partial(timed, sweep, len(index) * bank.chunk, device)
    return Contender(case.network + LABELS, bank.chunk, work, turn)


def rows_for(contender: Contender, turns: list[Reached], best: Ceilings) -> list[dict]:
    name, batch, work, _ = contender
    seconds, cause = work.bound(best)
    about = {"cause": cause, "batch": batch, **work._asdict()}
    about |= {f"{part}_s": taken for part, taken in work.seconds(best).items()}
    name += f": bound by {cause}"
    rows = [row(name, "bound, images/s", batch / seconds) | about]
    for k, (speed, ceilings) in enumerate(turns):
        share = speed * work.bound(ceilings)[0] / batch
        rows.append(row(name, "images/s", speed, k) | about)
        in_turn = speed * sum(work.seconds(ceilings).values()) / batch
        rows.append(row(name, "share of the bound", share, k, target=LEAST) | about)
        rows.append(row(name, "the same, were nothing to overlap", in_turn, k) | about)
    return rows


def draw(
    contenders: list[Contender],
    turns: dict[str, list[Reached]],
    ceilings: Ceilings,
    device: torch.device,
) -> Figure:
    """FLOP/s against FLOPs a byte: the roof, what each network reached, and a line to its bound."""
    unit, prefix = UNIT[device.type]
    points = {}
    for name, batch, work, _ in contenders:
        seconds, cause = work.bound(ceilings)
        speed = statistics.median(turn.speed for turn in turns[name])
        reached, bound = speed / batch * work.flops / unit, work.flops / seconds / unit
        points[name] = (work.flops / work.bytes, reached, bound, cause)
    table = pd.DataFrame.from_dict(points, "index", columns=["x", "reached", "bound", "cause"])
    about = environment(device, training_dtype(device))
    with figures.style():
        figure = Figure(figsize=(figures.PAGE, 4.2))
        axes = figure.subplots()
        top = ceilings.flops_per_s / unit
        ridge = ceilings.flops_per_s / ceilings.bytes_per_s
        x = np.geomspace(min(ridge, table.x.min()) / 2, 2 * max(ridge, table.x.max()), 200)
        roof = np.minimum(top, x * ceilings.bytes_per_s / unit)
        axes.plot(x, roof, color=figures.BLACK, ls="-", marker="")
        taught = [name.endswith(LABELS) for name in table.index]
        colors = [figures.BLACK if t else figures.OKABE_ITO[k % 6] for k, t in enumerate(taught)]
        for point, color in zip(table.itertuples(), colors, strict=True):
            look = {"color": color, "lw": 0.7, "ls": "-"}
            axes.plot([point.x] * 2, [point.reached, point.bound], marker="", **look)
            axes.plot(point.x, point.bound, marker="_", ms=8, **look)
            axes.plot(point.x, point.reached, marker=_mark(point), ms=6, **look)
        figures.log_axis(axes, "x")
        figures.log_axis(axes, "y")
        axes.set_xlim(x[0], x[-1])
        axes.set_xlabel("FLOPs a byte through memory")
        axes.set_ylabel(f"{prefix}FLOP/s")
        axes.set_title("{device}, threads: {threads}, {precision}".format(**about), loc="left")
        figures.name_points(axes, table.x, table.reached, colors)
        label = f"{ceilings.bytes_per_s / unit:.3g} {prefix}B/s, {top:.3g} {prefix}FLOP/s"
        looks = {label: "", "bound": "_", **{text: mark for mark, text in MARKS.items()}}
        handles = [
            Line2D([], [], color=figures.BLACK, marker=mark, ls="" if mark else "-", label=text)
            for text, mark in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=7)
    return figure


def _mark(point) -> str:
    if point.Index.endswith(LABELS):
        return "s"
    return "^" if point.cause == "launches" else "o"


def main() -> None:
    options = arguments(__doc__)
    device = options.device
    prepare(device)
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = root
        contenders = [
            (student if case.batch else teacher)(case, device)
            for case in [*STUDENTS, DENSENET[device.type], *TEACHERS]
        ]
        turns: dict[str, list[Reached]] = {contender.name: [] for contender in contenders}
        for _ in range(options.rounds):
            for contender in contenders:
                ceilings, turn = measure(device), contender.turn()
                turns[contender.name].append(Reached(turn.images / turn.wall, ceilings))
    measured = [turn.ceilings for rounds in zip(*turns.values(), strict=True) for turn in rounds]
    best = Ceilings.best(measured)
    rows = rows_of(measured, device)
    for contender in contenders:
        rows += rows_for(contender, turns[contender.name], best)
    save_picture("roofline", draw(contenders, turns, best, device), options)
    report("roofline", rows, options)


if __name__ == "__main__":
    main()
