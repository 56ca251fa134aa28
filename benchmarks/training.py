"""Training: steps of knowledge distillation, in images/s of the students in sum.

- P0: the field's loop. torchvision transforms on PIL images through a DataLoader (2 workers beside
  a CPU, 8 beside a GPU), float32, the live teacher in every step, ``.item()`` in every step;
- P0m, on a CPU: P0 with the one setting of kdlib's that helps any loop, that glibc keeps large
  blocks instead of handing them back to the system and having every layer fault them in anew;
- P1: the same in half precision where the device has it, channels_last, without waiting for it;
- P4: P1 with the images on the device and, on a GPU, student and teacher by ``torch.compile``; on a
  CPU compiling takes minutes a network and gains a tenth at most, so there P4 goes without;
- K1: a kdlib lane whose label bank knows nothing: the teacher labels an epoch within the time;
- K2: the same lane with every label of the epoch in the bank: the state that a sweep over
  students, seeds or settings reaches;
- K3(n): n lanes of as many seeds side by side, labels in the bank;
- sweep: the teacher alone, labelling for the bank.

Same networks, batch, images, threads and process. Networks are untrained, the pixels random: the
arithmetic does not depend on either. Every contender warms up before its time is taken; K1 to K3
include what a lane does at the start of an epoch; none includes evaluation or saving. A run moves
from K1, in its first epoch with a new teacher, towards K2. A turn is a fixed number of steps.

"first loss" is the relative difference of P0's and K2's loss in the first step, from the same
weights, on the same crops and flips, P0's made by torchvision: near 1e-6 in float32, near 1e-2
where a GPU lets kdlib compute in half precision. "By CPU time" leaves out what the machine did
besides, and P0's workers. Peak memory is the whole process's, all contenders and cases so far.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import Turn, arguments, compare, report, row, synchronize, timed
from benchmarks.field import FieldLoop, Style, by_torchvision
from kdlib import KD, Recipe, Run, build_model, load_data, store
from kdlib.data import Images
from kdlib.engine.device import environment, prepare
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.trainer import Trainer

CLASSES = 100
RECIPE = Recipe(epochs=240, batch=64, lr=0.05)


class Case(NamedTuple):
    """A pair of networks, the ratios aimed at, and the length of turns."""

    student: str
    teacher: str
    batch: int
    targets: dict[tuple[str, str], float]
    images: int
    steps: int  # of P0, P1, P4 and the sweep
    lanes: tuple[int, ...]
    warm_up: int = 1  # steps of P0, P1 and P4 before their time is taken
    epochs: int = 1  # of K2 and K3
    sweep: float | None = None  # images/s aimed at


GPU = {"images": 50_000, "steps": 200, "warm_up": 40, "lanes": (4, 8, 16)}
CASES = {
    "cpu": [
        Case(
            *("mobilenetv2-t6-w0.5", "resnet50", 64, {("K2", "P0"): 20}),
            **{"images": 256, "steps": 3, "epochs": 12, "lanes": (4,)},
        ),
        Case(
            *("resnet20", "resnet56", 64, {("K2", "P0"): 2}),
            **{"images": 1024, "steps": 15, "epochs": 2, "lanes": (4,)},
        ),
    ],
    "cuda": [
        Case(
            *("mobilenetv2-t6-w0.5", "resnet50", 64),
            {("K2", "P0"): 6, ("K3(16)", "K2"): 3, ("K3(16)", "P0"): 25, ("K2", "P4"): 2},
            **GPU,
            sweep=50_000 / 0.75,
        ),
        Case(
            *("resnet20", "resnet110", 128, {("K2", "P0"): 8, ("K3(16)", "K2"): 1.6}),
            **GPU,
        ),
        Case(
            *("densenet-bc-100-12", "densenet-bc-100-12", 128, {("K2", "P1"): 1.8}),
            **GPU | {"steps": 100, "lanes": (4,)},
        ),
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


def lanes_turn(lanes: list[Trainer], epochs: int, cold: bool) -> Turn:
    """Epochs of lanes side by side, timed after a step; cold banks forget their labels first.

    It is the first epoch again and again, so that all its labels are known. On a GPU it is trained
    with the second one's, which are computed meanwhile: as much to do.
    """

    def work():
        for _ in range(epochs):
            for lane in lanes:
                lane.begin_epoch()
            for lane in lanes:
                lane.look_ahead()
            for _ in range(lanes[0].steps):
                for lane in lanes:
                    lane.advance()
            synchronize(lanes[0].device)  # as the end of an epoch does

    for lane in lanes:
        lane.begin_epoch()
        lane.look_ahead()
        lane.advance()
    for bank in lanes[0].banks.banks.values() if cold else ():
        bank.known.zero_()
    images = sum(epochs * lane.steps * lane.run.recipe.batch for lane in lanes)
    return timed(work, images, lanes[0].device)


def sweep_turn(lane: Trainer, steps: int) -> Turn:
    """The teacher of a lane labels as many images as so many steps take, on one view each."""
    bank = lane.teachers.bank(0, lane.images)
    index = torch.arange(steps * lane.run.recipe.batch, device=lane.device) % len(lane.images)
    view = torch.zeros_like(index)
    bank.live(index[: bank.chunk], view[: bank.chunk])
    return timed(lambda: bank._sweep(index, view), len(index), lane.device)


def first_losses_differ(lane: Trainer, field: FieldLoop) -> float:
    """Relative difference of the two first losses; afterwards the bank is warm."""
    lane.begin_epoch()
    lane.advance()
    synchronize(lane.device)
    index, view = lane.index[0], lane.view[0]
    x, labels = by_torchvision(lane.images, index, view), lane.images.labels[index]
    reference = field.step(x, labels)[0].item()
    return abs(lane.meter["loss"].item() - reference) / reference


def run_case(case: Case, options: argparse.Namespace) -> list[dict]:
    name = f"{case.student} ← {case.teacher}"
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", case.images)
        images, test = (load_data(data, split, options.device) for split in ("train", "test"))
        recipe = replace(RECIPE, batch=case.batch)
        teacher = Run(data, case.teacher, recipe)
        save_untrained(teacher, images)
        run = Run(data, case.student, recipe, KD(teacher))
        banks, gpu = CachePool(), options.device.type == "cuda"
        seeds = range(max(case.lanes))
        lanes = [Trainer(replace(run, seed=s), images, test, banks) for s in seeds]
        cold = Trainer(run, images, test, CachePool())  # what it forgets, the others keep
        styles = {"P0": Style(), "P1": Style(modern=True), "P4": Style(True, True, compiled=gpu)}
        loops = {p: FieldLoop(run, images, case.warm_up, case.steps, s) for p, s in styles.items()}
        difference = first_losses_differ(lanes[0], loops["P0"])
        rows = [row(name, "first loss, relative difference", difference)]
        lanes_turn(lanes, 1, cold=False)  # their labels are then in the bank
        contenders = {
            **{p: loop.turn for p, loop in loops.items()},
            **({} if gpu else {"P0m": partial(loops["P0"].turn, kept=1 << 30)}),
            "K1": lambda: lanes_turn([cold], 1, cold=True),
            "K2": lambda: lanes_turn(lanes[:1], case.epochs, cold=False),
            **{f"K3({n})": partial(lanes_turn, lanes[:n], case.epochs, False) for n in case.lanes},
            "sweep": lambda: sweep_turn(cold, case.steps),
        }
        widest = f"K3({case.lanes[-1]})"
        pairs = [("P1", "P0"), ("P4", "P0"), ("K1", "P0"), ("K2", "P0"), ("K2", "P1"), ("K2", "P4")]
        pairs += [(widest, "K2"), (widest, "P0")] + ([] if gpu else [("K2", "P0m")])
        ratios = {pair: case.targets.get(pair) for pair in pairs}
        rows += compare(name, contenders, ratios, options, {"sweep": case.sweep})
        peak = environment(options.device, cold.state.dtype)["peak_memory_mb"]
        return [*rows, row(name, "peak memory, MB", peak)]


def main() -> None:
    options = arguments(__doc__)
    prepare(options.device)
    rows = [line for case in CASES[options.device.type] for line in run_case(case, options)]
    report("training", rows, options)


if __name__ == "__main__":
    main()
