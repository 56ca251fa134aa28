"""Run, Method, Recipe, Step: one recursive type, since the teacher of a run's method is a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from kdlib.data import canonical_name, check_name
from kdlib.description import describe
from kdlib.models import Staged
from kdlib.models.names import check_model
from kdlib.models.precision import AutocastNetwork

# Part of every id. Raise it when a change of the code changes the result of a training.
ENGINE_VERSION = 1

Terms = dict[str, Tensor]
Modules = Mapping[str, AutocastNetwork | nn.Module]


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with (Nesterov's) momentum and a rate that falls in steps.

    Attributes:
        epochs: passes over the training images.
        batch: images in one step.
        lr: initial learning rate.
        milestones: epochs after which the rate is multiplied by ``decay``.
        weight_decay: factor of the L2 penalty on every parameter.
    """

    epochs: int
    batch: int
    lr: float
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

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
    """The input of a loss: one batch, and networks that return float32 on every device.

    Attributes:
        x: images ``[b, channels, height, width]``.
        labels: int64 ``[b]``.
        teacher_logits: ``[b, classes]``, for exactly these views, with ``needs_logits``; else None.
        student: the network to train.
        teacher: the teacher, frozen, with ``needs_teacher``; else None.
        aux: the auxiliary modules that the method trains, by name.
        pretrained: modules that other runs have trained, by name, in eval mode.
        inputs: this step's part of the method's ``epoch_inputs``, by name.
    """

    x: Tensor
    labels: Tensor
    teacher_logits: Tensor | None
    student: AutocastNetwork
    teacher: AutocastNetwork | None
    aux: Modules
    pretrained: Modules
    inputs: Mapping[str, Tensor] = {}


class SGD(NamedTuple):
    """An optimizer of these modules, with the rate and the schedule of a recipe of its own."""

    recipe: Recipe
    modules: tuple[str, ...]


class Curve(NamedTuple):
    """Means of a term of the loss over ``every`` steps each; a record keeps the first ``bins``."""

    term: str
    every: int
    bins: int


@dataclass(frozen=True)
class Method:
    """How a student learns. The fields of a subclass are part of the run's description.

    Attributes:
        needs_logits: the loss reads the teacher's logits.
        needs_teacher: the method uses the teacher itself; ``runs_teacher``: in every step.
        standalone: the student works without the auxiliary modules.
        reads_gradients: nothing may compute in half precision, where gradients are scaled.
        curve: a term that the record keeps at a finer resolution than epochs.
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
        """The teacher's checkpoint for the student's ``epoch`` (from 0); None without a teacher."""
        return None

    def checkpoints(self, epochs: int) -> set[Checkpoint]:
        """All checkpoints that teach a run of this many epochs."""
        return {c for e in range(epochs) if (c := self.teacher_at(e)) is not None}

    def check(self, run: Run) -> None:
        """Raise ValueError where ``run`` cannot learn in this way; called when a run is made."""

    def aux_modules(
        self, student: Staged, teacher: Staged | None, x: Tensor
    ) -> dict[str, nn.Module]:
        """New modules to train with the student, by name. Whole networks are tested like it.

        Called once, under a seeded random state, with a few images ``x``.
        """
        return {}

    def optimizers(self, modules: nn.ModuleDict) -> dict[str, SGD | Optimizer]:
        """Further optimizers. The student's updates every module that none of these updates.

        An ``Optimizer`` has the name of the module that it updates, and keeps its momentum as
        ``momentum_buffer``.
        """
        return {}

    def pretrained(self) -> dict[str, Run]:
        """Runs that lend the module of this name, or else their network."""
        return {}

    def composites(
        self, student: AutocastNetwork, teacher: AutocastNetwork | None, aux: Modules
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """Classifiers made of several networks, by name, to test after each epoch; ``student`` in
        the student's place. ``aux`` has the ``pretrained`` modules, too.
        """
        return {}

    def metrics(self, modules: nn.ModuleDict) -> dict[str, float]:
        """Numbers for the log, after an epoch."""
        return {}

    def should_stop(self, modules: nn.ModuleDict, within: int = 0) -> bool:
        """Whether the run ends now, before its recipe's last epoch; asked after every epoch.

        Given ``within``, whether it may end within so many steps; asked before every epoch. If so,
        the engine asks the first question after each step of that epoch.
        """
        return False

    def epoch_inputs(
        self, epoch: int, generator: torch.Generator, steps: int, batch: int, classes: int
    ) -> dict[str, Tensor]:
        """Random numbers and schedules that the steps of an epoch read, ``[steps, …]``, by name.

        A step itself draws no random numbers and knows no epoch, so that it can be captured as a
        graph. Shapes stay the same. Seed and epoch (from 0) of the run seed the ``generator``.
        """
        return {}

    def extra_updates(self, step: Step) -> Iterator[tuple[str, Terms]]:
        """Updates before that of ``loss``: names of optimizers, each with named terms.

        An optimizer alone minimises the term of its name; all terms are logged.
        """
        return iter(())

    def loss(self, step: Step) -> tuple[Tensor, Terms]:
        """The student's logits, and named terms. All are logged, and ``loss`` is minimised."""
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
    """One training: data, model, method, recipe, seed.

    Making a run reads no file. An image folder is read when the run's ``id`` is asked for, the file
    of a found architecture when the run is trained.

    Attributes:
        data, model: names for ``load_data`` and ``build_model``.
        images: number of training images, classes in turn; None for all.
        start: begin with the last weights of this run, of the same data and model, and with a new
            optimizer and schedule.
        keep: epochs whose weights stay in the store besides the last; not part of the id.
        save_logits: save the logits of the validation images after every epoch, in half precision;
            not part of the id.

    Raises UnknownName where the data set or the model is unknown, ValueError where the method does
    not fit the model.
    """

    DESCRIBED_BY: ClassVar = {"data": "dataset"}
    data: str
    model: str
    recipe: Recipe
    method: Method = CrossEntropy()
    seed: int = 0
    images: int | None = None
    start: Run | None = None
    keep: tuple[int, ...] = field(default=(), compare=False)
    save_logits: bool = field(default=False, compare=False)
    # ``data`` and ``dataset``, found once, also for the copies that ``replace`` makes
    _named: tuple[str, str] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "data", check_name(self.data))
        check_model(self.model)
        # index refuses 1.5, and makes Python's integers of numpy's
        object.__setattr__(self, "keep", tuple(sorted({index(epoch) for epoch in self.keep})))
        self.method.check(self)
        if beyond := [e for e in self.keep if not 1 <= e <= self.recipe.epochs]:
            raise ValueError(f"Epochs {beyond} to keep are not within {self.recipe.epochs} epochs.")
        if not self.method.standalone and self.save_logits:
            raise ValueError(f"A {self.model} that needs auxiliary modules saves no logits.")
        if (start := self.start) and not start.method.standalone:
            raise ValueError(f"start cannot be a {start.model} that needs auxiliary modules.")
        if start and (start.data, start.model) != (self.data, self.model):
            raise ValueError(f"start must be a {self.model} on {self.data}, as this run.")

    @property
    def dataset(self) -> str:
        """The data set's name on every machine; a folder's name has a hash of its images."""
        if not (self._named and self._named[0] == self.data):
            object.__setattr__(self, "_named", (self.data, canonical_name(self.data)))
        return self._named[1]

    @cached_property
    def id(self) -> str:
        text = json.dumps([ENGINE_VERSION, self.description], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def description(self) -> dict:
        """All fields as plain JSON. The id is a hash of them and of ENGINE_VERSION."""
        return describe(self)

    @cached_property
    def teachers(self) -> list[Checkpoint]:
        """The checkpoints that teach this run, and those that give modules to its method."""
        lenders = {Checkpoint(run, run.recipe.epochs) for run in self.method.pretrained().values()}
        return [*self.method.checkpoints(self.recipe.epochs), *lenders]

    @cached_property
    def parents(self) -> list[Checkpoint]:
        """The teachers, and the checkpoint that the run starts from."""
        start = self.start
        return [*([Checkpoint(start, start.recipe.epochs)] if start else []), *self.teachers]

    @property
    def epochs_before(self) -> int:
        """Epochs in the chain of ``start`` runs. The order of images continues after them."""
        return self.start.epochs_before + self.start.recipe.epochs if self.start else 0

    def __str__(self) -> str:
        method = type(self.method).__name__
        if at := getattr(self.method, "at", None):
            method += f" of epoch {at}"
        return f"{self.model} · {method} · seed {self.seed} · {self.id}"
