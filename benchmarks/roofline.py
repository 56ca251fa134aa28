"""Speed of each network against the bound that the machine sets: images/s, and a picture.

The bound is the slowest of three parts: arithmetic at the speed of a large product, the bytes of
all operations at the speed of a copy, and all kernels one after the other. ``ceilings`` measures
these speeds before every turn, and the share of the bound uses them. The limiting part and the roof
of the picture use the best speeds of all rounds. ``bounds`` counts the work.

Few networks come close to the bound. Thin and depthwise convolutions leave most of an arithmetic
unit unused. While one operation waits for memory, the arithmetic of others waits too. "without
overlap" takes this into account: its bound is the sum of the three parts. A share above 1 means
that a processor cache kept data that the count moves through memory, or that a library skipped the
counted multiplications by padding. For 3x3 convolutions on 4x4 images these are three in ten.

- students: a step of a kdlib Trainer with cross-entropy, with batch and update. On a GPU it is the
  replayed CUDA graph, with compiled kernels if kdlib compiles. The time per kernel is that of a
  node of a CUDA graph on a GPU, and that of an operation called by the host on a CPU.
- teachers: forward passes for the cache of logits, with folded batch norms.

Networks take turns. The limiting part is beside each share. The CSV also has the counted work of a
step and the seconds of each part.
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

from benchmarks import Turn, arguments, report, row, save_picture
from benchmarks.batches import noise
from benchmarks.bounds import Work, forward, training
from benchmarks.ceilings import Ceilings, measure, rows_of
from benchmarks.training import teacher_turn, train_turn
from kdbook import figures
from kdlib import Recipe, Run, build_model
from kdlib.data import Images
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.device import environment, prepare, training_dtype
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.trainer import Trainer

CLASSES = 100
# Long enough for a Trainer to compile its network; only a few steps run.
EPOCHS = 1000
# Of a turn: steps of a student, chunks of a teacher.
STEPS = {"cpu": 2, "cuda": 200}
CHUNKS = {"cpu": 1, "cuda": 12}
TARGET = 0.5  # least share of the bound that the project wants
MARKS = {"o": "a student's step", "^": "bound by launches", "s": "a teacher's forward pass"}
TEACHER = ", teacher"
# Units of the picture's axes.
UNIT = {"cpu": (1e9, "G"), "cuda": (1e12, "T")}


class Case(NamedTuple):
    """A network and the images of a step; None for a teacher, whose cache has chunks."""

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
    """A network to time: its name, images and work of a step, a function that runs one turn."""

    name: str
    batch: int
    work: Work
    turn: Callable[[], Turn]


class Reached(NamedTuple):
    """Images/s of a turn, and the limits of the machine just before it."""

    speed: float
    ceilings: Ceilings


def random_images(count: int, device: torch.device) -> Images:
    names = tuple(f"{k:02d}" for k in range(CLASSES))
    return replace(noise(count, device), class_names=names)


def student(case: Case, device: torch.device) -> Contender:
    images = random_images(STEPS[device.type] * case.batch, device)
    run = Run("cifar100", case.network, Recipe(EPOCHS, case.batch, lr=0.05))
    trainer = Trainer(run, images, images, CachePool())
    state = trainer.state
    work = training(state.modules["student"], case.batch, state.dtype, state.compiled)
    name = f"{case.network}, batch {case.batch}"
    return Contender(name, case.batch, work, partial(train_turn, [trainer]))


def teacher(case: Case, device: torch.device) -> Contender:
    images = random_images(2048 * CHUNKS[device.type], device)
    cache = LogitCache(build_model(case.network, CLASSES, seed=0).eval(), images)
    work = forward(cache.teacher, cache.chunk, cache.dtype)
    turn = partial(teacher_turn, cache, CHUNKS[device.type])
    return Contender(case.network + TEACHER, cache.chunk, work, turn)


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
        rows.append(row(name, "share of the bound", share, k, target=TARGET) | about)
        rows.append(row(name, "share of the bound without overlap", in_turn, k) | about)
    return rows


def draw(
    contenders: list[Contender],
    turns: dict[str, list[Reached]],
    ceilings: Ceilings,
    device: torch.device,
) -> Figure:
    """FLOP/s against FLOPs per byte: the roof, each network's speed, and a line to its bound."""
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
        teachers = [name.endswith(TEACHER) for name in table.index]
        colors = [figures.BLACK if t else figures.OKABE_ITO[k % 6] for k, t in enumerate(teachers)]
        for point, color in zip(table.itertuples(), colors, strict=True):
            look = {"color": color, "lw": 0.7, "ls": "-"}
            axes.plot([point.x] * 2, [point.reached, point.bound], marker="", **look)
            axes.plot(point.x, point.bound, marker="_", ms=8, **look)
            axes.plot(point.x, point.reached, marker=_mark(point), ms=6, **look)
        figures.log_axis(axes, "x")
        figures.log_axis(axes, "y")
        axes.set_xlim(x[0], x[-1])
        axes.set_xlabel("FLOPs per byte through memory")
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
    if point.Index.endswith(TEACHER):
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
