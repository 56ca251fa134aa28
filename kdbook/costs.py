"""The cost of whole trainings in multiply-accumulates, counted before anything is trained."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdbook.contrasts import interval
from kdbook.exhibits import Exhibit
from kdlib import build_model, count_cost
from kdlib.data import load_data
from kdlib.engine.graph import ancestry
from kdlib.engine.passes import teacher_passes
from kdlib.methods import CrossEntropy, Method, Paraphrase, Step
from kdlib.runs import Run

BATCH = 4  # images of the step that is counted; the cost of one image does not depend on it


class Spent(NamedTuple):
    """Multiply-accumulates of a training, with all stages that it starts from.

    Convolutions, linear layers and matrix products count. Batch norms, activations and sums do not.

    Attributes:
        student: what the same steps cost from labels alone, forward and backward.
        beside: what the method adds to its steps: a teacher's features, peers, a second update.
        labels: a teacher's passes that only compute logits; each image and view is labelled once.
        teachers: the training of the teachers themselves.
    """

    student: float
    beside: float
    labels: float
    teachers: float

    @property
    def given_teacher(self) -> float:
        """All but the training of the teachers."""
        return self.student + self.beside + self.labels


def spent(run: Run) -> Spent:
    """The cost of a training. Reads the data set for the size and the number of its images."""
    every = ancestry([run])
    taught = {c.run.id for r in every for c in r.method.checkpoints(r.recipe.epochs)}
    own = [r for r in every if r.id not in taught]
    student, beside = (sum(parts) for parts in zip(*map(_steps, own), strict=True))
    teachers = sum(sum(_steps(r)) for r in every if r.id in taught)
    labels = sum(
        (passes.cached - passes.features) * _images(run) * _forward(teacher.run)
        for teacher, passes in teacher_passes(own).items()
    )
    return Spent(student, beside, labels, teachers)


def _steps(run: Run) -> tuple[float, float]:
    """The steps of one run: from labels alone, and what its method adds."""
    seen, whole = run.recipe.epochs * _images(run), step_macs(run)
    # The paraphraser of FT trains modules beside the network, and not the network.
    plain = 0.0 if isinstance(run.method, Paraphrase) else step_macs(run, CrossEntropy())
    return seen * plain, seen * (whole - plain)


def step_macs(run: Run, method: Method | None = None) -> float:
    """Multiply-accumulates of one training step for each image, forward and backward.

    One step is carried out with random weights and random images.

    Args:
        method: in place of the run's own.
    """
    return _step_macs(run.model, _sizes(run), method or run.method)


@cache
def _step_macs(model: str, sizes: tuple[int, int, int], method: Method) -> float:
    classes, channels, size = sizes
    student, teacher, aux = _networks(model, sizes, method)
    nn.ModuleDict({"student": student, **aux}).train()
    pretrained = {}
    for name, lender in method.pretrained().items():
        network, _, modules = _networks(lender.model, sizes, lender.method)
        pretrained[name] = modules.get(name, network).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    step = Step(
        x=torch.rand(BATCH, channels, size, size, generator=generator),
        labels=torch.arange(BATCH) % classes,
        teacher_logits=torch.rand(BATCH, classes, generator=generator),
        student=student,
        teacher=teacher,
        aux=aux,
        pretrained=pretrained,
        inputs={n: t[0] for n, t in method.epoch_inputs(0, generator, 1, BATCH, classes).items()},
    )
    with FlopCounterMode(display=False) as counter:
        for name, terms in method.extra_updates(step):
            terms[name].backward()
        method.loss(step)[1]["loss"].backward()
    return counter.get_total_flops() / 2 / BATCH


def _networks(
    model: str, sizes: tuple[int, int, int], method: Method
) -> tuple[nn.Module, nn.Module | None, dict[str, nn.Module]]:
    """A student, its teacher and the auxiliary modules, with random weights."""
    classes, channels, size = sizes
    student, teacher = build_model(model, classes, channels, seed=0), None
    if method.needs_teacher:
        taught = method.teacher_at(0).run.model
        teacher = build_model(taught, classes, channels, seed=0).eval().requires_grad_(False)
    with torch.no_grad():
        x = torch.zeros(2, channels, size, size)
        return student, teacher, method.aux_modules(student.eval(), teacher, x)


def _forward(run: Run) -> int:
    """The multiply-accumulates of one forward pass of one image."""
    classes, channels, size = _sizes(run)
    return count_cost(build_model(run.model, classes, channels, seed=0), size, channels).macs


def _sizes(run: Run) -> tuple[int, int, int]:
    images = load_data(run.dataset, "test")
    return images.classes, images.channels, images.size


def _images(run: Run) -> int:
    return len(load_data(run.dataset).first(run.images))


def at_equal_cost(
    exhibit: Exhibit, column: str, rows: Iterable[str], reference: Sequence[str], costs: Mapping
) -> pd.DataFrame:
    """The accuracy of each row minus that of a reference at the same cost.

    The reference is one method with more and more training. Between two of its rows its accuracy is
    interpolated, linear in the logarithm of the cost, seed by seed. Beyond them it is that of the
    nearest row.

    Columns: ours (the mean over seeds), low and high (95 %), place: ``between`` the reference's
    costs, ``below`` or ``above`` them.

    Args:
        column: of the accuracies.
        reference: its rows.
        costs: by row.
    """
    known = sorted(reference, key=lambda row: costs[row])
    scale, found = np.log([costs[row] for row in known]), {}
    for row in rows:
        own, cost = exhibit.cells.get((row, column), {}), np.log(costs[row])
        others = [exhibit.cells.get((name, column), {}) for name in known]
        seeds = sorted(set(own).intersection(*others))
        gaps = np.array([own[s] - np.interp(cost, scale, [o[s] for o in others]) for s in seeds])
        place = "below" if cost < scale[0] else "above" if cost > scale[-1] else "between"
        found[row] = (gaps.mean() if len(gaps) else np.nan, *interval(gaps), place)
    columns = ["ours", "low", "high", "place"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns)
