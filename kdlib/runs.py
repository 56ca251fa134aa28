"""Run, Method, Recipe and Step: the description of a training.

They are one recursive type, and so one file: a run has a method, and the method's teacher is a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from operator import index
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from kdlib.data import canonical_name, check_name
from kdlib.models import Staged
from kdlib.models.names import check_model
from kdlib.models.precision import AutocastNetwork

# Part of every id. Raise it when a change of the code changes the result of a training.
ENGINE_VERSION = 1

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum and a learning rate that falls in steps.

    Attributes:
        epochs: passes over the training images.
        batch: images in one step.
        lr: initial learning rate.
        milestones: epochs after which the rate is multiplied by ``decay``.
        weight_decay: factor of the L2 penalty on every parameter.

    Raises ValueError for fewer than one epoch or one image in a batch.
    """

    epochs: int
    batch: int
    lr: float
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self):
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"A recipe needs at least one epoch and one image in a batch: {self}")

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * self.decay ** sum(epoch >= milestone for milestone in self.milestones)


class Checkpoint(NamedTuple):
    """The weights of a run after a number of its epochs."""

    run: Run
    epoch: int


class Step(NamedTuple):
    """The input of a loss: one batch, and the networks of one training.

    On a GPU the networks compute in half precision, but they return float32. Losses compute in
    float32 on every device.

    Attributes:
        x: images ``[b, channels, height, width]``.
        labels: int64 ``[b]``.
        teacher_logits: ``[b, classes]``, for exactly these views; None without a teacher or where
            the method does not set ``needs_logits``.
        student: the network to train.
        teacher: the teacher, frozen, where the method sets ``needs_teacher``; else None.
        aux: the auxiliary modules that the method trains, by name.
        pretrained: modules that other runs have trained, by name, in eval mode.
        inputs: this step's part of the method's ``epoch_inputs``, by name.
    """

    x: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    student: AutocastNetwork
    teacher: AutocastNetwork | None
    aux: Mapping[str, AutocastNetwork | nn.Module]
    pretrained: Mapping[str, AutocastNetwork]
    inputs: Mapping[str, Tensor] = {}


class SGD(NamedTuple):
    """An optimizer with a learning rate and a schedule of its own.

    Attributes:
        recipe: rate and schedule; epochs and batch are those of the student.
        modules: names of the modules that it updates.
    """

    recipe: Recipe
    modules: tuple[str, ...]


class Curve(NamedTuple):
    """A term of the loss that the record keeps at a finer resolution than epochs.

    Attributes:
        term: name of the term.
        every: steps over which one mean is taken.
        bins: number of means; later steps are not kept.
    """

    term: str
    every: int
    bins: int


@dataclass(frozen=True)
class Method:
    """How a student learns. The fields of a subclass are part of the run's description.

    Attributes:
        needs_logits: the loss reads the teacher's logits.
        needs_teacher: the method uses the teacher itself, not only its logits.
        runs_teacher: every step runs the teacher; by default where ``needs_teacher`` is set.
        standalone: the student works without the auxiliary modules.
        reads_gradients: the method reads gradients, so nothing may compute in half precision,
            where gradients are scaled.
        curve: a term to record at a finer resolution than epochs.
    """

    needs_logits = True
    needs_teacher = False
    standalone = True
    reads_gradients = False
    curve: ClassVar[Curve | None] = None

    @property
    def runs_teacher(self) -> bool:
        return self.needs_teacher

    def teacher_at(self, epoch: int) -> Checkpoint | None:
        """The teacher's checkpoint for the student's ``epoch``, counted from 0; None without one.

        This answer is the only difference between plain distillation and the strategies of RCO.
        """
        return None

    def checkpoints(self, epochs: int) -> set[Checkpoint]:
        """All checkpoints that teach a run of this many epochs."""
        return {c for e in range(epochs) if (c := self.teacher_at(e)) is not None}

    def check(self, run: Run) -> None:
        """Raise ValueError where ``run`` cannot learn in this way; called when a run is made."""

    def aux_modules(
        self, student: Staged, teacher: Staged | None, x: Tensor
    ) -> dict[str, nn.Module]:
        """New modules that are trained together with the student, by name.

        Called once, under a seeded random state, with a few images ``x``. A module that is a whole
        network is tested after each epoch, as the student is.
        """
        return {}

    def optimizers(self, modules: nn.ModuleDict) -> dict[str, SGD | Optimizer]:
        """Optimizers besides the student's, by name.

        Modules without an optimizer of their own are updated by the student's. An ``Optimizer``
        has the name of the module that it updates; it keeps its momentum as ``momentum_buffer``,
        as ``torch.optim.SGD`` does.
        """
        return {}

    def pretrained(self) -> dict[str, Run]:
        """Auxiliary modules of other runs that this method uses: their names and those runs."""
        return {}

    def composites(
        self,
        student: AutocastNetwork,
        teacher: AutocastNetwork | None,
        aux: Mapping[str, AutocastNetwork | nn.Module],
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """Classifiers made of several networks, from images to logits, by name.

        They are tested after each epoch, as the student is. A composite named ``student`` is
        tested in the place of the student.
        """
        return {}

    def metrics(self, modules: nn.ModuleDict) -> dict[str, float]:
        """Numbers for the log, after an epoch."""
        return {}

    def should_stop(self, modules: nn.ModuleDict, within: int = 0) -> bool:
        """Whether the run ends now, before the last epoch of its recipe.

        Asked after every epoch. With ``within``: whether the run may end within so many steps;
        asked before an epoch. Where the answer is yes, the first question is asked after every
        step of that epoch.
        """
        return False

    def epoch_inputs(
        self, epoch: int, generator: torch.Generator, steps: int, batch: int, classes: int
    ) -> dict[str, Tensor]:
        """Random numbers or schedules that the loss reads in one epoch, ``[steps, …]``, by name.

        A step draws no random numbers and knows no epoch, so that it can be captured as a graph:
        both come from here. Shapes must be the same in every epoch.

        Args:
            epoch: of the student, counted from 0.
            generator: seeded by the run's seed and the epoch.
        """
        return {}

    def extra_updates(self, step: Step) -> Iterator[tuple[str, Terms]]:
        """Updates at the beginning of a step, each before the next one is computed.

        Yields the name of an optimizer, and named terms. The term of that name is minimised by
        that optimizer alone; all terms are logged.
        """
        return iter(())

    def loss(self, step: Step) -> tuple[Tensor, Terms]:
        """The student's logits, and named terms of one batch.

        The term ``loss`` is minimised by all optimizers that ``extra_updates`` does not name; all
        terms are logged.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Method):
    """Learn from the labels alone ("softmax" in RCO's tables)."""

    def loss(self, step):
        logits = step.student(step.x)
        ce = F.cross_entropy(logits, step.labels)
        return logits, {"loss": ce, "ce": ce}


@dataclass(frozen=True)
class Run:
    """One training: data, model, method, recipe, seed. A teacher in the method is itself a Run.

    Making a run reads no file. An image folder, or the file of an architecture that a search has
    found, is read when the run is named (``id``) or trained.

    Attributes:
        data: name for ``load_data``.
        model: name for ``build_model``.
        images: number of training images, classes in turn; None for all.
        start: begin from the last weights of this run, of the same data and model, instead of
            random weights; optimizer and schedule begin anew.
        keep: epochs whose weights stay in the store besides the last. Not part of the id, because
            it changes no number.
        save_logits: keep also the logits of the validation images after every epoch, in half
            precision. Not part of the id either.

    Raises UnknownName where the data set or the model is unknown, ValueError where the method does
    not fit the model.
    """

    data: str
    model: str
    recipe: Recipe
    method: Method = CrossEntropy()
    seed: int = 0
    images: int | None = None
    start: Run | None = None
    keep: tuple[int, ...] = field(default=(), compare=False)
    save_logits: bool = field(default=False, compare=False)

    def __post_init__(self):
        check_name(self.data)
        check_model(self.model)
        # index refuses 1.5, and makes Python's integers of numpy's
        object.__setattr__(self, "keep", tuple(sorted({index(epoch) for epoch in self.keep})))
        self.method.check(self)
        if beyond := [e for e in self.keep if not 1 <= e <= self.recipe.epochs]:
            raise ValueError(f"Epochs {beyond} to keep are not within {self.recipe.epochs} epochs.")
        if not self.method.standalone and self.save_logits:
            raise ValueError(
                f"The student of {self._title} does not work without its auxiliary modules, so it "
                f"has no logits to save."
            )
        if self.start and not self.start.method.standalone:
            raise ValueError(
                f"A run cannot start from {self.start._title}: that student does not work without "
                f"its auxiliary modules."
            )
        if self.start and (self.start.data, self.start.model) != (self.data, self.model):
            raise ValueError(
                f"A {self.model} on {self.data} cannot start from {self.start._title}."
            )

    @cached_property
    def dataset(self) -> str:
        """The name of the data set on every machine: of a folder its own name and content hash."""
        return canonical_name(self.data)

    @cached_property
    def id(self) -> str:
        text = json.dumps([ENGINE_VERSION, self.description], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def description(self) -> dict:
        """The content of the id as plain JSON, with the descriptions of all ancestors."""
        return describe(self)

    @cached_property
    def teachers(self) -> list[Checkpoint]:
        """The checkpoints that teach this run, and those whose modules its method uses."""
        lenders = {Checkpoint(run, run.recipe.epochs) for run in self.method.pretrained().values()}
        return [*self.method.checkpoints(self.recipe.epochs), *lenders]

    @cached_property
    def parents(self) -> list[Checkpoint]:
        """The teachers, and the checkpoint that the run starts from."""
        first = [Checkpoint(self.start, self.start.recipe.epochs)] if self.start else []
        return [*first, *self.teachers]

    @property
    def epochs_before(self) -> int:
        """Epochs of the runs that this one starts from. The order of images continues there."""
        return self.start.epochs_before + self.start.recipe.epochs if self.start else 0

    @property
    def _title(self) -> str:
        method = type(self.method).__name__
        if at := getattr(self.method, "at", None):
            method += f" of epoch {at}"
        return f"{self.model} · {method} · seed {self.seed}"

    def __str__(self) -> str:
        return f"{self._title} · {self.id}"


def describe(value):
    """A frozen dataclass as plain JSON.

    Fields at their default are left out, so that a new field with a default changes no id.
    """
    if is_dataclass(value):
        kind = type(value)
        own = kind.__module__.startswith("kdlib.")
        parts = {"kind": kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"}
        for f in fields(value):
            named = isinstance(value, Run) and f.name == "data"
            content = value.dataset if named else getattr(value, f.name)
            if f.compare and content != f.default:
                parts[f.name] = describe(content)
        return parts
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    # 1 and 1.0 are equal, and so are runs that differ in nothing else
    return int(value) if isinstance(value, float) and value.is_integer() else value
