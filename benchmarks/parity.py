"""Test accuracy of kdlib and of the usual PyTorch loop, after the same number of epochs.

P0, the usual PyTorch loop, and kdlib train the same student with the same initial weights, recipe,
teacher and images. Each draws its own crops and flips. There is one student per seed. kdlib trains
the one teacher of all students. "kdlib − P0" is the difference of the test accuracies of one seed,
in percentage points. Its 95 % t-interval should contain zero.

``--methods`` takes CE (labels alone), KD, STC and KR, with the weights that the book gives them on
CIFAR-10. P0 knows KD only. ``--precision`` trains every student of kdlib in float32 and in
bfloat16, by ``$KDLIB_PRECISION``, and compares both; they have one teacher, trained in float32.

``--data`` takes kdlib's data sets, or ``folder:PATH`` ({train,test}/<class>/*.png or .jpg).
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import arguments, row, selected, time_is_over
from benchmarks.field import FieldLoop, Style
from benchmarks.tables import report
from kdbook.contrasts import interval
from kdlib import KD, KR, STC, CrossEntropy, Recipe, Run, load_data, train
from kdlib.data import Images
from kdlib.engine.train import CACHES

# By the least side of the images: student, teacher.
PAIRS = {8: ("resnet8-x0.5", "resnet14"), 32: ("resnet20", "resnet56")}
METHODS = ("CE", "KD", "STC", "KR")
# kdlib's contenders: the precision that each asks for, None for kdlib's choice.
PLAIN = {"kdlib": None}
BOTH = {"kdlib in float32": "float32", "kdlib in bfloat16": "bfloat16"}


class Case(NamedTuple):
    """The teacher's run, the student's network, its method, and the images of both."""

    teacher: Run
    student: str
    method: str
    images: Images


@torch.no_grad()
def accuracy(network: torch.nn.Module, test: Images) -> float:
    """Accuracy in % on images without augmentation."""
    index = torch.arange(len(test), device=test.device)
    hits = [
        (network.eval()(test.batch(part)).argmax(1) == test.labels[part]).sum()
        for part in index.split(500)
    ]
    return 100 * sum(hits).item() / len(test)


@contextmanager
def store_of(root: Path, precision: str | None) -> Iterator[Path]:
    """Train in the store of a precision, with that precision and with labels of its own."""
    home = root / (precision or "kdlib")
    os.environ["KDLIB_HOME"] = str(home)
    if precision:
        os.environ["KDLIB_PRECISION"] = precision
    CACHES.clear()
    yield home
    if precision:
        del os.environ["KDLIB_PRECISION"]


def student_of(teacher: Run, model: str, method: str) -> Run:
    """A student with the weights of a method in STC's Table 1 and KR's Table 1.

    The batch is half of theirs, and so are the rates.
    """
    recipe = teacher.recipe
    methods = {
        "CE": (recipe, CrossEntropy()),
        "KD": (recipe, KD(teacher)),
        "STC": (replace(recipe, weight_decay=1e-4), STC(teacher, alpha=0.3, cut=2)),
        "KR": (
            replace(recipe, lr=0.005, weight_decay=1e-5),
            KR(teacher, prior=replace(recipe, weight_decay=1e-5)),
        ),
    }
    recipe, how = methods[method]
    return replace(teacher, model=model, recipe=recipe, method=how)


def trained_accuracy(run: Run, precision: str | None, device: torch.device) -> float:
    """kdlib's accuracy. Raises ValueError where kdlib trains in another precision than asked."""
    trained = train([run], device)[0]
    found = trained.summary["environment"]["precision"]
    if precision and found != precision:
        raise ValueError(f"{run} was trained in {found}, not in {precision}: no comparison.")
    return trained.final["test_top1"]


def cases(options: argparse.Namespace) -> dict[str, Case]:
    found = {}
    milestones = (options.epochs // 2, 3 * options.epochs // 4)
    recipe = Recipe(options.epochs, batch=64, lr=0.05, milestones=milestones)
    for data in options.data:
        images = load_data(data, "train", options.device).first(options.images)
        student, teacher = PAIRS[max(side for side in PAIRS if side <= images.size)]
        name = f"{images.name}, {len(images):,} images, {options.epochs} epochs"
        run = Run(data, teacher, recipe, images=options.images)
        for method in options.methods:
            found[f"{method}, {student} ← {teacher}, {name}"] = Case(run, student, method, images)
    return found


def run_seeds(name: str, case: Case, root: Path, options: argparse.Namespace) -> Iterator[dict]:
    teacher, model, method, images = case
    test = load_data(teacher.data, "test", options.device)
    contenders = BOTH if options.precision else PLAIN
    first, *_, last = [*contenders, *contenders]
    pairs = [(first, "P0")] if method == "KD" else []
    pairs += [(last, first)] if options.precision else []
    differences: dict[tuple, list[float]] = {pair: [] for pair in pairs}
    with store_of(root, contenders[first]) as store:
        best = train([teacher], options.device, weights=True)[0].final["test_top1"]
    yield row(name, "teacher, accuracy in %", best)
    if options.precision and not store.with_name("bfloat16").exists():
        shutil.copytree(store, store.with_name("bfloat16"))
    for seed in range(options.seeds):
        if time_is_over(options, f"{name}: from seed {seed} on"):
            break
        run = replace(student_of(teacher, model, method), seed=seed)
        accuracies = {}
        for which, precision in contenders.items():
            with store_of(root, precision):
                accuracies[which] = trained_accuracy(run, precision, options.device)
                yield row(name, f"{which}, accuracy in %", accuracies[which], seed)
                if method == "KD" and which == first:
                    field = FieldLoop(run, images, 0, 0, Style())
                    field.train(options.epochs)
                    accuracies["P0"] = accuracy(field.student, test)
                    yield row(name, "P0, accuracy in %", accuracies["P0"], seed)
        for (a, b), found in differences.items():
            found.append(accuracies[a] - accuracies[b])
            yield row(name, f"{a} − {b}, points", found[-1], seed)
    for (a, b), found in differences.items():
        if len(found) > 1:
            for end, value in zip(("lower", "upper"), interval(np.array(found)), strict=True):
                yield row(name, f"{a} − {b}, points, {end} end of the mean's 95 % interval", value)


def names(text: str) -> list[str]:
    """The methods in a list with commas."""
    methods = text.split(",")
    if unknown := {*methods} - {*METHODS}:
        raise argparse.ArgumentTypeError(f"{unknown.pop()} is none of {', '.join(METHODS)}")
    return methods


def main() -> None:
    options = arguments(
        __doc__,
        data={"nargs": "+", "default": ["digits"], "help": "digits by default"},
        images={"type": int, "help": "number of training images; all by default"},
        epochs={"type": int, "default": 12},
        seeds={"type": int, "default": 5},
        methods={"type": names, "default": ["KD"], "help": "such as KD,STC,KR; KD by default"},
        precision={"action": "store_true", "help": "compare float32 with bfloat16"},
    )
    os.environ["KDLIB_PROGRESS"] = "quiet"
    chosen = selected(cases(options), options)
    with tempfile.TemporaryDirectory() as root:
        rows = (r for case in chosen for r in run_seeds(*case, Path(root), options))
        report("parity", rows, options)


if __name__ == "__main__":
    main()
