"""Speed of distillation steps in kdlib and in the usual PyTorch loop, in images/s.

- P0: the usual PyTorch loop. torchvision's transforms on PIL images, a DataLoader (2 workers on a
  CPU, 8 with a GPU), float32, the teacher and ``.item()`` in every step.
- P0m, on a CPU: P0 with one setting of kdlib that helps any loop. glibc keeps large freed blocks
  instead of returning them to the system, so a layer need not map its memory again.
- P1: P0 in half precision if the device has it, with channels_last, and without ``.item()``.
- P4: P1 with the images on the device.
- P4c, on a GPU with ``--compile``: P4 with ``torch.compile`` for student and teacher. K1 to K3 then
  compile, too. On a CPU nothing is compiled: it takes minutes per network and saves at most a
  tenth.
- K1: a kdlib Trainer with an empty cache of teacher logits. The time includes the teacher's logits
  of one epoch.
- K2: the same Trainer with all logits of the epoch in the cache. Later students, seeds or settings
  with the same teacher come close to this case.
- K3(n): n students of different seeds trained in parallel, logits in the cache. The cache of K2
  and K3 is filled with random logits: a step takes the same time, and no teacher has to run.
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
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import Turn, arguments, compare, row, selected, synchronize, timed
from benchmarks.batches import CLASSES, noise
from benchmarks.field import FieldLoop, Style, by_torchvision
from benchmarks.tables import report
from kdlib import KD, Recipe, Run, build_model, store
from kdlib.data import Images
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.device import environment
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.precision import label_dtype
from kdlib.engine.trainer import Trainer

RECIPE = Recipe(epochs=240, batch=64, lr=0.05)
STYLES = {
    "P0": Style(),
    "P1": Style(modern=True),
    "P4": Style(modern=True, resident=True),
    "P4c": Style(modern=True, resident=True, compiled=True),
}


class Case(NamedTuple):
    """A pair of networks, the target ratios, the length of turns, and the usual loops to time."""

    student: str
    teacher: str
    batch: int
    targets: dict[tuple[str, str], float]
    images: int
    steps: int  # of the usual loops and of the teacher alone
    parallel: tuple[int, ...]
    warm_up: int = 1  # steps of the usual loops before the time starts
    epochs: int = 1  # of K2 and K3
    loops: tuple[str, ...] = ("P0", "P1", "P4")
    teacher_target: float | None = None  # images/s of the teacher alone


GPU = {"images": 50_000, "steps": 200, "warm_up": 40, "parallel": (4, 8, 16)}
CASES = {
    "cpu": [
        Case(
            *("mobilenetv2-t6-w0.5", "resnet50", 64, {("K1", "P0"): 3.5, ("K2", "P0"): 20}),
            **{"images": 256, "steps": 3, "epochs": 12, "parallel": (4,)},
        ),
        Case(
            *("resnet20", "resnet56", 64, {("K1", "P0"): 2.5, ("K2", "P0"): 3.8}),
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
        images, test = noise(count, device), noise(CLASSES, device, "test")
        run = Run("noise@0", teacher, recipe)  # never loaded by this name
        save_untrained(run, images)
        yield run, images, test


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


def begin_again(trainer: Trainer) -> None:
    """Begin the present epoch at its first step, wherever it is."""
    trainer.taken = 0
    trainer.begin_epoch()


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
                begin_again(trainer)
            for trainer in trainers:
                trainer.look_ahead()
            for _ in range(trainers[0].steps):
                for trainer in trainers:
                    trainer.advance()
            synchronize(trainers[0].device)  # as at the end of an epoch

    for trainer in trainers:
        begin_again(trainer)
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


class Students:
    """Trainers of one run with the seeds 0, 1, …; all have one cache of the teacher's logits."""

    def __init__(self, run: Run, images: Images, test: Images):
        self.run, self.images, self.test = run, images, test
        self.caches, self.trainers = CachePool(), []

    def first(self, count: int) -> list[Trainer]:
        """The first trainers, made when they are first needed: a capture takes a second or so."""
        for seed in range(len(self.trainers), count):
            run = replace(self.run, seed=seed)
            self.trainers.append(Trainer(run, self.images, self.test, self.caches))
        return self.trainers[:count]

    def turn(self, count: int, epochs: int = 1) -> Turn:
        return train_turn(self.first(count), epochs)

    def fill_cache(self) -> None:
        """Random logits for all views, so that no seed needs passes of the teacher."""
        self.first(1)[0].begin_epoch()  # makes the cache
        for cache in self.caches.caches.values():
            cache.table.normal_()
            cache.known.fill_(True)


def run_case(name: str, case: Case, options: argparse.Namespace) -> Iterator[dict]:
    """Speeds and ratios of one pair of networks, as they are measured."""
    gpu, recipe = options.device.type == "cuda", replace(RECIPE, batch=case.batch)
    names = [*case.loops, *(["P4c"] if options.compile else [])]
    with untrained(case.teacher, case.images, options.device, recipe) as (teacher, images, test):
        run = Run(teacher.data, case.student, recipe, KD(teacher))
        students, empty = Students(run, images, test), CachePool()
        loops = {p: FieldLoop(run, images, case.warm_up, case.steps, STYLES[p]) for p in names}
        difference = first_losses_differ(students.first(1)[0], loops["P0"])
        yield row(name, "first loss, relative difference", difference)
        students.fill_cache()
        alone = Trainer(run, images, test, empty)
        labels = label_dtype(options.device, case.teacher, images.size)
        cache = LogitCache(store.load_checkpoint(teacher, recipe.epochs)[0], images, labels)
        together = {f"K3({n})": partial(students.turn, n, case.epochs) for n in case.parallel}
        contenders = {
            **{p: loop.turn for p, loop in loops.items()},
            **({} if gpu else {"P0m": partial(loops["P0"].turn, kept=1 << 30)}),
            "K1": partial(train_turn, [alone], empty=empty),
            "K2": partial(students.turn, 1, case.epochs),
            "teacher alone": partial(
                teacher_turn, cache, -(-case.steps * case.batch // cache.chunk)
            ),
            **together,
        }
        pairs = [("P1", "P0"), ("P4", "P0"), ("P4c", "P0"), ("K1", "P0"), ("K2", "P0")]
        pairs += [("K2", which) for which in ("P1", "P4", "P4c", "P0m")]
        pairs += [(several, one) for several in together for one in ("K2", "P0")]
        ratios = {p: case.targets.get(p) for p in pairs if {*p} <= contenders.keys()}
        speeds = {"teacher alone": case.teacher_target}
        yield from compare(name, contenders, ratios, options, speeds)
        peak = environment(options.device, alone.state.dtype)["peak_memory_mb"]
        yield row(name, "peak memory, MB", peak)


def by_name(cases: list[Case]) -> dict[str, Case]:
    return {f"{case.student} ← {case.teacher}": case for case in cases}


def main() -> None:
    options = arguments(__doc__)
    cases = selected(by_name(CASES[options.device.type]), options)
    report("training", (r for case in cases for r in run_case(*case, options)), options)


if __name__ == "__main__":
    main()
