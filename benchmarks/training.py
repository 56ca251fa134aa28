"""Speed of distillation steps in kdlib and in the usual PyTorch loop, in images/s.

- P0: the usual PyTorch loop. torchvision's transforms on PIL images, a DataLoader (2 workers on a
  CPU, 8 with a GPU), float32, the teacher and ``.item()`` in every step.
- P0m, on a CPU: P0 with one setting of kdlib that helps any loop. glibc keeps large freed blocks
  instead of returning them to the system, so a layer need not map its memory again.
- P1: P0 in half precision if the device has it, with channels_last, and without ``.item()``.
- P4: P1 with the images on the device and, on a GPU, ``torch.compile`` for student and teacher. On
  a CPU there is no compilation: it takes minutes per network and saves at most a tenth.
- K1: a kdlib Trainer with an empty cache of teacher logits. The time includes the teacher's logits
  of one epoch.
- K2: the same Trainer with all logits of the epoch in the cache. Later students, seeds or settings
  with the same teacher come close to this case.
- K3(n): n students of different seeds trained in parallel, logits in the cache.
- teacher alone: forward passes of the teacher for the cache.

All contenders have the same networks, batch, images, threads and process. The networks are
untrained and the pixels random: the arithmetic does not depend on them. The time of a turn starts
after a warm-up. K1 to K3 include the work at the start of an epoch; no time includes evaluation or
saving. A run is near K1 in its first epoch with a new teacher and later moves towards K2. A turn is
a fixed number of steps.

"first loss" is the relative difference between the losses of P0 and K2 in the first step, with the
same weights, crops and flips; torchvision makes P0's images. It is near 1e-6 in float32, and near
1e-2 if kdlib computes in half precision on a GPU. Ratios "by CPU time" exclude the time of other
programs and of P0's workers. Peak memory is that of the whole process with all contenders and cases
so far.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.device import environment, prepare
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.trainer import Trainer

CLASSES = 100
RECIPE = Recipe(epochs=240, batch=64, lr=0.05)


class Case(NamedTuple):
    """A pair of networks, the target ratios, and the length of turns."""

    student: str
    teacher: str
    batch: int
    targets: dict[tuple[str, str], float]
    images: int
    steps: int  # of P0, P1, P4 and of the teacher alone
    parallel: tuple[int, ...]
    warm_up: int = 1  # steps of P0, P1 and P4 before the time starts
    epochs: int = 1  # of K2 and K3
    teacher_target: float | None = None  # images/s of the teacher alone


GPU = {"images": 50_000, "steps": 200, "warm_up": 40, "parallel": (4, 8, 16)}
CASES = {
    "cpu": [
        Case(
            *("mobilenetv2-t6-w0.5", "resnet50", 64, {("K2", "P0"): 20}),
            **{"images": 256, "steps": 3, "epochs": 12, "parallel": (4,)},
        ),
        Case(
            *("resnet20", "resnet56", 64, {("K2", "P0"): 2}),
            **{"images": 1024, "steps": 15, "epochs": 2, "parallel": (4,)},
        ),
    ],
    "cuda": [
        Case(
            *("mobilenetv2-t6-w0.5", "resnet50", 64),
            {("K2", "P0"): 6, ("K3(16)", "K2"): 3, ("K3(16)", "P0"): 25, ("K2", "P4"): 2},
            **GPU,
            teacher_target=50_000 / 0.75,
        ),
        Case(
            *("resnet20", "resnet110", 128, {("K2", "P0"): 8, ("K3(16)", "K2"): 1.6}),
            **GPU,
        ),
        Case(
            *("densenet-bc-100-12", "densenet-bc-100-12", 128, {("K2", "P1"): 1.8}),
            **GPU | {"steps": 100, "parallel": (4,)},
        ),
    ],
}


@contextmanager
def untrained(
    teacher: str, count: int, device: torch.device, recipe: Recipe = RECIPE
) -> Iterator[tuple[Run, Images, Images]]:
    """A store that has an untrained teacher: its run, training images and test images."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", count)
        images, test = (load_data(data, split, device) for split in ("train", "test"))
        run = Run(data, teacher, recipe)
        save_untrained(run, images)
        yield run, images, test


def noise_folder(root: Path, count: int) -> str:
    """Write random images in kdlib's folder layout and return the name of the data set."""
    generator = np.random.default_rng(0)
    for split, size in (("train", count), ("test", CLASSES)):
        for k, pixels in enumerate(generator.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)):
            path = root / split / f"{k % CLASSES:02d}" / f"{k:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return f"folder:{root}"


def save_untrained(teacher: Run, images: Images) -> None:
    """Save random weights, with the batch norm statistics of one batch, as a trained teacher."""
    model = build_model(teacher.model, images.classes, seed=1).to(images.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics become those of the batch
    with torch.no_grad():
        model.train()(images.batch(torch.arange(32, device=images.device)))
    state = nn.ModuleDict({"student": model}).state_dict()
    store.save_modules(teacher, teacher.recipe.epochs, state)


def train_turn(trainers: list[Trainer], epochs: int = 1, empty: CachePool | None = None) -> Turn:
    """Time epochs of students trained in parallel, after one step as warm-up.

    It repeats the first epoch, so that the cache has all its logits. On a GPU the logits of the
    second epoch are computed at the same time and used: the work is the same.

    Args:
        empty: a pool whose caches lose all training logits before the time starts.
    """

    def work():
        for _ in range(epochs):
            for trainer in trainers:
                trainer.begin_epoch()
            for trainer in trainers:
                trainer.look_ahead()
            for _ in range(trainers[0].steps):
                for trainer in trainers:
                    trainer.advance()
            synchronize(trainers[0].device)  # as at the end of an epoch

    for trainer in trainers:
        trainer.begin_epoch()
        trainer.look_ahead()
        trainer.advance()
    for cache in empty.caches.values() if empty else ():
        cache.known.zero_()
    images = sum(epochs * trainer.steps * trainer.run.recipe.batch for trainer in trainers)
    return timed(work, images, trainers[0].device)


def teacher_turn(cache: LogitCache, chunks: int) -> Turn:
    """Time forward passes of a cache's teacher, after one as warm-up."""
    index = torch.arange(chunks * cache.chunk, device=cache.device) % len(cache.images)

    def work():
        for part in index.split(cache.chunk):
            cache.compute(part, part % cache.images.views)

    cache.compute(index[: cache.chunk], index[: cache.chunk] % cache.images.views)
    return timed(work, len(index), cache.device)


def first_losses_differ(trainer: Trainer, field: FieldLoop) -> float:
    """Relative difference of the first two losses; afterwards the cache has the epoch's logits."""
    trainer.begin_epoch()
    trainer.advance()
    synchronize(trainer.device)
    index, view = trainer.data.index[0], trainer.data.view[0]
    x, labels = by_torchvision(trainer.images, index, view), trainer.images.labels[index]
    reference = field.step(x, labels)[0].item()
    return abs(trainer.meter.sums["loss"].item() - reference) / reference


def run_case(case: Case, options: argparse.Namespace) -> list[dict]:
    name, gpu = f"{case.student} ← {case.teacher}", options.device.type == "cuda"
    recipe = replace(RECIPE, batch=case.batch)
    with untrained(case.teacher, case.images, options.device, recipe) as (teacher, images, test):
        run = Run(teacher.data, case.student, recipe, KD(teacher))
        caches, empty = CachePool(), CachePool()
        seeds = range(max(case.parallel))
        trainers = [Trainer(replace(run, seed=s), images, test, caches) for s in seeds]
        alone = Trainer(run, images, test, empty)
        cache = LogitCache(store.load_checkpoint(teacher, recipe.epochs)[0], images)
        styles = {"P0": Style(), "P1": Style(modern=True), "P4": Style(True, True, compiled=gpu)}
        loops = {p: FieldLoop(run, images, case.warm_up, case.steps, s) for p, s in styles.items()}
        difference = first_losses_differ(trainers[0], loops["P0"])
        rows = [row(name, "first loss, relative difference", difference)]
        train_turn(trainers)  # the cache then has the logits of all seeds
        together = {f"K3({n})": trainers[:n] for n in case.parallel}
        contenders = {
            **{p: loop.turn for p, loop in loops.items()},
            **({} if gpu else {"P0m": partial(loops["P0"].turn, kept=1 << 30)}),
            "K1": partial(train_turn, [alone], empty=empty),
            "K2": partial(train_turn, trainers[:1], case.epochs),
            **{k: partial(train_turn, several, case.epochs) for k, several in together.items()},
            "teacher alone": partial(
                teacher_turn, cache, -(-case.steps * case.batch // cache.chunk)
            ),
        }
        widest = [*together][-1]
        pairs = [("P1", "P0"), ("P4", "P0"), ("K1", "P0"), ("K2", "P0"), ("K2", "P1"), ("K2", "P4")]
        pairs += [(widest, "K2"), (widest, "P0")] + ([] if gpu else [("K2", "P0m")])
        ratios = {pair: case.targets.get(pair) for pair in pairs}
        speeds = {"teacher alone": case.teacher_target}
        rows += compare(name, contenders, ratios, options, speeds)
        peak = environment(options.device, alone.state.dtype)["peak_memory_mb"]
        return [*rows, row(name, "peak memory, MB", peak)]


def main() -> None:
    options = arguments(__doc__)
    prepare(options.device)
    rows = [line for case in CASES[options.device.type] for line in run_case(case, options)]
    report("training", rows, options)


if __name__ == "__main__":
    main()
