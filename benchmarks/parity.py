"""Test accuracy of kdlib and of the usual PyTorch loop, after the same number of epochs.

P0, the usual PyTorch loop, and kdlib train the same student with the same initial weights, recipe,
teacher and images. Each draws its own crops and flips. There is one student per seed. kdlib trains
the one teacher of all students. "kdlib − P0" is the difference of the test accuracies of one seed,
in percentage points. Its 95 % t-interval should contain zero.

``--data`` takes kdlib's data sets, or ``folder:PATH`` ({train,test}/<class>/*.png or .jpg).
"""

import argparse
import os
import tempfile

import numpy as np
import torch

from benchmarks import arguments, report, row
from benchmarks.field import FieldLoop, Style
from kdbook.claims import interval
from kdlib import KD, Recipe, Run, load_data, train
from kdlib.data import Images
from kdlib.engine.device import prepare

# By the side of the images: student, teacher.
PAIRS = {8: ("resnet8-x0.5", "resnet14"), 32: ("resnet20", "resnet56")}


@torch.no_grad()
def accuracy(network: torch.nn.Module, test: Images) -> float:
    """Accuracy in % on images without augmentation."""
    index = torch.arange(len(test), device=test.device)
    hits = [
        (network.eval()(test.batch(part)).argmax(1) == test.labels[part]).sum()
        for part in index.split(500)
    ]
    return 100 * sum(hits).item() / len(test)


def run_seeds(data: str, options: argparse.Namespace) -> list[dict]:
    images, test = (load_data(data, split, options.device) for split in ("train", "test"))
    images = images.first(options.images)
    student, teacher = PAIRS[images.size]
    milestones = (options.epochs // 2, 3 * options.epochs // 4)
    recipe = Recipe(options.epochs, batch=64, lr=0.05, milestones=milestones)
    teacher_run = Run(data, teacher, recipe, images=options.images)
    case = f"{student} ← {teacher}, {images.name}, {len(images):,} images, {options.epochs} epochs"
    best = train([teacher_run], options.device, weights=True)[0].final["test_top1"]
    rows, differences = [row(case, "teacher, accuracy in %", best)], []
    for seed in range(options.seeds):
        run = Run(data, student, recipe, KD(teacher_run), seed=seed, images=options.images)
        field = FieldLoop(run, images, 0, 0, Style())
        field.train(options.epochs)
        accuracies = {
            "P0": accuracy(field.student, test),
            "kdlib": train([run], options.device)[0].final["test_top1"],
        }
        rows += [row(case, f"{n}, accuracy in %", a, seed) for n, a in accuracies.items()]
        differences.append(accuracies["kdlib"] - accuracies["P0"])
        rows.append(row(case, "kdlib − P0, points", differences[-1], seed))
    for end, value in zip(("lower", "upper"), interval(np.array(differences)), strict=True):
        rows.append(row(case, f"kdlib − P0, points, {end} end of the mean's 95 % interval", value))
    return rows


def main() -> None:
    options = arguments(
        __doc__,
        data={"nargs": "+", "default": ["digits"], "help": "digits by default"},
        images={"type": int, "help": "number of training images; all by default"},
        epochs={"type": int, "default": 12},
        seeds={"type": int, "default": 5},
    )
    prepare(options.device)
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {"KDLIB_HOME": f"{root}/runs", "KDLIB_PROGRESS": "quiet"}
        report("parity", [r for data in options.data for r in run_seeds(data, options)], options)


if __name__ == "__main__":
    main()
