"""Speed of each network against the bound that the machine sets: images/s, and a picture.

The bound is the slowest of three parts: arithmetic at the speed of a large product, the bytes of
all operations at the speed of a copy, and all kernels one after the other. ``ceilings`` measures
these speeds before every turn, and the share of the bound uses them. The limiting part and the roof
of the picture use the best speeds of a few measurements at the beginning. ``bounds`` counts the
work.

Few networks come close to the bound. Thin and depthwise convolutions leave most of an arithmetic
unit unused. While one operation waits for memory, the arithmetic of others waits too. "without
overlap" takes this into account: its bound is the sum of the three parts. A share above 1 means
that a processor cache kept data that the count moves through memory, or that a library skipped the
counted multiplications by padding. For 3x3 convolutions on 4x4 images these are three in ten.

- students: a step of a kdlib Trainer with cross-entropy, with batch and update. On a GPU it is the
  replayed CUDA graph, with compiled kernels if ``--compile`` asks for them. The time per kernel is
  that of a node of a CUDA graph on a GPU, and that of an operation called by the host on a CPU.
- teachers: forward passes for the cache of logits, with folded batch norms.

Networks take turns. The limiting part is beside each share. The CSV also has the counted work of a
step and the seconds of each part.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import Turn, arguments, row, selected, time_is_over
from benchmarks.batches import CLASSES, noise
from benchmarks.bounds import Work, forward, training
from benchmarks.ceilings import Ceilings, measure, rows_of
from benchmarks.tables import report
from benchmarks.training import teacher_turn, train_turn
from kdbook import figures
from kdlib import Recipe, Run, build_model
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.device import environment
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.precision import label_dtype, training_dtype
from kdlib.engine.trainer import Trainer

# Of a turn: steps of a student, chunks of a teacher.
STEPS = {"cpu": 2, "cuda": 200}
CHUNKS = {"cpu": 1, "cuda": 12}
TARGET = 0.5  # least share of the bound that the project wants
MARKS = {"o": "a student's step", "^": "bound by launches", "s": "a teacher's forward pass"}
TEACHER = ", teacher"
BOUND = "bound, images/s"
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
    """A network to time: images and work of a step, a function that runs one turn."""

    batch: int
    work: Work
    turn: Callable[[], Turn]


def student(case: Case, device: torch.device) -> Contender:
    images = noise(STEPS[device.type] * case.batch, device)
    run = Run("cifar100", case.network, Recipe(1, case.batch, lr=0.05))
    trainer = Trainer(run, images, images, CachePool())
    state = trainer.state
    work = training(state.modules["student"], case.batch, state.dtype, state.compiled)
    return Contender(case.batch, work, partial(train_turn, [trainer]))


def teacher(case: Case, device: torch.device) -> Contender:
    images = noise(2048 * CHUNKS[device.type], device)
    dtype = label_dtype(device, case.network, images.size)
    cache = LogitCache(build_model(case.network, CLASSES, seed=0).eval(), images, dtype)
    work = forward(cache.teacher, cache.chunk, cache.dtype)
    turn = partial(teacher_turn, cache, CHUNKS[device.type])
    return Contender(cache.chunk, work, turn)


def measured_rows(options: argparse.Namespace, limits: list[Ceilings]) -> Iterator[dict]:
    """The limits of the machine, the bounds of all networks, then the rows of each turn."""
    device, contenders, best = options.device, [], Ceilings.best(limits)
    for k, ceilings in enumerate(limits):
        yield from rows_of(ceilings, device, k)
    cases = [*STUDENTS, DENSENET[device.type], *TEACHERS]
    for name, case in selected({name_of(case): case for case in cases}, options):
        contender = (student if case.batch else teacher)(case, device)
        seconds, cause = contender.work.bound(best)
        about = {"cause": cause, "batch": contender.batch, **contender.work._asdict()}
        about |= {f"{part}_s": taken for part, taken in contender.work.seconds(best).items()}
        label = f"{name}: bound by {cause}"
        contenders.append((label, contender, about))
        yield row(label, BOUND, contender.batch / seconds) | about
    for k in range(options.rounds):
        for label, contender, about in contenders:
            if time_is_over(options, f"round {k + 1} from {label} on"):
                return
            yield from (line | about for line in rows_for(label, contender, device, k))


def name_of(case: Case) -> str:
    return f"{case.network}, batch {case.batch}" if case.batch else case.network + TEACHER


def rows_for(label: str, contender: Contender, device: torch.device, k: int) -> Iterator[dict]:
    """Run one turn; its speed beside the limits of the machine just before it."""
    batch, work, _ = contender
    ceilings = measure(device)
    turn = contender.turn()
    speed = turn.images / turn.wall
    yield row(label, "images/s", speed, k)
    yield row(label, "share of the bound", speed * work.bound(ceilings)[0] / batch, k, TARGET)
    together = sum(work.seconds(ceilings).values())
    yield row(label, "share of the bound without overlap", speed * together / batch, k)


def draw(table: pd.DataFrame, ceilings: Ceilings, device: torch.device) -> Figure:
    """FLOP/s against FLOPs per byte: the roof, each network's speed, and a line to its bound."""
    unit, prefix = UNIT[device.type]
    speeds = table[table.quantity == "images/s"].groupby("case", sort=False)
    points = speeds.agg({"value": "median", "batch": "first", "flops": "first", "bytes": "first"})
    points["cause"] = speeds.cause.first()
    per_image = points.flops / points.batch / unit
    points["reached"], points["x"] = points.value * per_image, points.flops / points.bytes
    points["bound"] = per_image * table[table.quantity == BOUND].set_index("case").value
    points.index = points.index.str.partition(":").get_level_values(0)
    about = environment(device, training_dtype(device))
    with figures.style():
        figure = Figure(figsize=(figures.PAGE, 4.2))
        axes = figure.subplots()
        top = ceilings.flops_per_s / unit
        ridge = ceilings.flops_per_s / ceilings.bytes_per_s
        x = np.geomspace(min(ridge, points.x.min()) / 2, 2 * max(ridge, points.x.max()), 200)
        roof = np.minimum(top, x * ceilings.bytes_per_s / unit)
        axes.plot(x, roof, color=figures.BLACK, ls="-", marker="")
        teachers = [name.endswith(TEACHER) for name in points.index]
        colors = [figures.BLACK if t else figures.OKABE_ITO[k % 6] for k, t in enumerate(teachers)]
        for point, color in zip(points.itertuples(), colors, strict=True):
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
        figures.name_points(axes, points.x, points.reached, colors)
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
    limits = [measure(device) for _ in range(3)]
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = root
        drawn = partial(draw, ceilings=Ceilings.best(limits), device=device)
        report("roofline", measured_rows(options, limits), options, drawn)


if __name__ == "__main__":
    main()
