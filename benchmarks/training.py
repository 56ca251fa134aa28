"""Training: steps of knowledge distillation, in images/s of the student.

- P0: the field's loop. torchvision transforms on PIL images through a DataLoader (2 workers beside
  a CPU, 8 beside a GPU), float32, the live teacher in every step, ``.item()`` in every step;
- K1: a kdlib lane whose label bank knows nothing: the teacher labels the epoch within the time;
- K2: the same lane with every label of the epoch in the bank: the state that a sweep over
  students, seeds or settings reaches.

Same networks, batch, images, threads and process. Networks are untrained, the pixels random: the
arithmetic does not depend on either. Every contender warms up before its time is taken; K1 and K2
include what a lane does at the start of an epoch; none includes evaluation or saving. A run moves
from K1, in its first epoch with a new teacher, towards K2.

"first loss" is the relative difference of P0's and K2's loss in the first step, from the same
weights, on the same crops and flips, P0's made by torchvision: near 1e-6 in float32, near 1e-2
where a GPU lets kdlib compute in half precision. "By CPU time" leaves out what the machine did
besides, and P0's workers. Peak memory is the whole process's, all contenders and cases so far.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import Turn, arguments, compare, report, row, synchronize, timed
from benchmarks.field import FieldLoop, by_torchvision
from kdlib import KD, Recipe, Run, build_model, load_data, store
from kdlib.data import Images
from kdlib.engine.bank import Shelf
from kdlib.engine.device import environment
from kdlib.engine.lane import Lane

CLASSES = 100
RECIPE = Recipe(epochs=240, batch=64, lr=0.05)


class Case(NamedTuple):
    """A pair of networks, the least K2 / P0 aimed at, and the length of a turn."""

    student: str
    teacher: str
    target: float | None
    images: int
    warm_up: int  # steps of P0 before its time is taken
    epochs: int  # of K2


CASES = {
    "cpu": [
        Case("mobilenetv2-t6-w0.5", "resnet50", target=20, images=256, warm_up=1, epochs=16),
        Case("resnet20", "resnet56", target=2, images=1024, warm_up=1, epochs=3),
    ],
    "cuda": [
        Case("mobilenetv2-t6-w0.5", "resnet50", target=6, images=12_800, warm_up=40, epochs=5),
        Case("resnet20", "resnet56", target=None, images=12_800, warm_up=40, epochs=5),
    ],
}


def noise_folder(root: Path, count: int) -> str:
    """Random images in files, the way a reader's own images enter kdlib; returns their name."""
    generator = np.random.default_rng(0)
    for split, size in (("train", count), ("test", CLASSES)):
        for k, pixels in enumerate(generator.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)):
            path = root / split / f"{k % CLASSES:02d}" / f"{k:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return f"folder:{root}"


def save_untrained(teacher: Run, images: Images) -> None:
    """Put a teacher into the store as if trained: random weights, statistics of one batch."""
    model = build_model(teacher.model, images.classes, seed=1).to(images.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics become the batch's
    with torch.no_grad():
        model.train()(images.batch(torch.arange(32, device=images.device)))
    store.save_weights(teacher, teacher.recipe.epochs, model.state_dict())


def lane_turn(lane: Lane, epochs: int, cold: bool) -> Turn:
    """Epochs of a lane, timed after a step; a cold bank forgets its labels first."""

    def work():
        for _ in range(epochs):
            lane.begin_epoch()
            for _ in range(lane.steps):
                lane.advance()
            synchronize(lane.device)  # as the end of an epoch does

    lane.begin_epoch()
    lane.advance()
    for bank in lane.teachers.banks.banks.values() if cold else ():
        bank.known.zero_()
    return timed(work, epochs * lane.steps * lane.run.recipe.batch, lane.device)


def first_losses_differ(lane: Lane, field: FieldLoop) -> float:
    """Relative difference of the two first losses; afterwards the bank is warm."""
    lane.begin_epoch()
    lane.advance()
    synchronize(lane.device)
    index, view = lane.index[0], lane.view[0]
    reference = field.step(by_torchvision(lane.images, index, view), lane.images.labels[index])
    return abs(lane.meter["loss"].item() - reference) / reference


def run_case(case: Case, options: argparse.Namespace) -> list[dict]:
    name = f"{case.student} ← {case.teacher}"
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", case.images)
        images, test = (load_data(data, split, options.device) for split in ("train", "test"))
        teacher = Run(data, case.teacher, RECIPE)
        save_untrained(teacher, images)
        run = Run(data, case.student, RECIPE, KD(teacher))
        field, lane = FieldLoop(run, images, case.warm_up), Lane(run, images, test, Shelf())
        rows = [row(name, "first loss, relative difference", first_losses_differ(lane, field))]
        contenders = {
            "P0": field.turn,
            "K1": lambda: lane_turn(lane, 1, cold=True),
            "K2": lambda: lane_turn(lane, case.epochs, cold=False),
        }
        rows += compare(name, contenders, {("K1", "P0"): None, ("K2", "P0"): case.target}, options)
        peak = environment(options.device, lane.trainee.dtype)["peak_memory_mb"]
        return [*rows, row(name, "peak memory, MB", peak)]


def main() -> None:
    options = arguments(__doc__)
    rows = [line for case in CASES[options.device.type] for line in run_case(case, options)]
    report("training", rows, options)


if __name__ == "__main__":
    main()
