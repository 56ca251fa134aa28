"""Run: a frozen description of one training, whose id is a hash of all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from operator import index

from kdlib.data import canonical_name
from kdlib.methods import CrossEntropy, Method
from kdlib.methods.distill import Anchor
from kdlib.models.names import builder

# Part of every id: raise it when a change of the code changes what training computes.
ENGINE_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum and a learning rate that falls in steps.

    Attributes:
        epochs: passes over the training images.
        batch: images a step.
        lr: initial learning rate.
        milestones: after how many epochs the rate is multiplied by ``decay``.
        weight_decay: L2, on every parameter.
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
            raise ValueError(f"A recipe needs at least one epoch and one image a batch: {self}")

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr * self.decay ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Run:
    """One training: data, model, method, recipe, seed. A teacher in the method is itself a Run.

    Attributes:
        data: name for ``load_data``.
        model: name for ``build_model``.
        images: train on the first so many images only, classes in turn; None for all.
        start: begin from the last weights of this run, of the same data and model, instead of
            random ones; optimizer and schedule begin anew.
        keep: epochs whose weights stay in the store besides the last. Not part of the id: a kept
            checkpoint changes no number.
        route: keep also the logits of the validation images after every epoch, in half precision.
            Not part of the id either.

    Raises UnknownName at once where the data set or the model is unknown, ValueError where the
    method does not fit the model.
    """

    data: str
    model: str
    recipe: Recipe
    method: Method = CrossEntropy()
    seed: int = 0
    images: int | None = None
    start: Run | None = None
    keep: tuple[int, ...] = field(default=(), compare=False)
    route: bool = field(default=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "data", canonical_name(self.data))
        # index refuses 1.5, and takes the integers of numpy for those of Python
        object.__setattr__(self, "keep", tuple(sorted({index(epoch) for epoch in self.keep})))
        builder(self.model)  # what is unknown or cannot be is refused here, not after hours
        self.method.check(self)
        if beyond := [e for e in self.keep if not 1 <= e <= self.recipe.epochs]:
            raise ValueError(f"Epochs {beyond} to keep are not within {self.recipe.epochs} epochs.")
        if not self.method.whole and self.route:
            raise ValueError(f"The student of {self} is no network by itself: it has no route.")
        if self.start and not self.start.method.whole:
            raise ValueError(f"{self.start} is no start: its student needs what it trained along.")
        if self.start and (self.start.data, self.start.model) != (self.data, self.model):
            raise ValueError(f"A {self.model} on {self.data} cannot start from {self.start}.")

    @cached_property
    def id(self) -> str:
        text = json.dumps([ENGINE_VERSION, self.description], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def description(self) -> dict:
        """All that the id stands for, as plain JSON: the run's whole ancestry."""
        return describe(self)

    @property
    def teachers(self) -> list[Anchor]:
        """The checkpoints that label this run, and those whose parts its method uses."""
        lent = {(run, run.recipe.epochs) for run in self.method.frozen().values()}
        return [*self.method.anchors(self.recipe.epochs), *lent]

    @property
    def parents(self) -> list[Anchor]:
        """Its teachers, and the checkpoint that it starts from."""
        first = [(self.start, self.start.recipe.epochs)] if self.start else []
        return [*first, *self.teachers]

    @property
    def epochs_before(self) -> int:
        """Epochs of the runs that this one starts from: its order of images goes on from there."""
        return self.start.epochs_before + self.start.recipe.epochs if self.start else 0

    def __str__(self) -> str:
        method = type(self.method).__name__
        if at := getattr(self.method, "at", None):
            method += f" of epoch {at}"
        return f"{self.model} · {method} · seed {self.seed} · {self.id}"


def describe(value):
    """A frozen dataclass as plain JSON, defaults left out, so that a new field with a default
    changes no id."""
    if is_dataclass(value):
        kind = type(value)
        own = kind.__module__.startswith("kdlib.")
        parts = {"kind": kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"}
        for f in fields(value):
            content = getattr(value, f.name)
            if f.compare and content != f.default:
                parts[f.name] = describe(content)
        return parts
    if isinstance(value, tuple | list):
        return [describe(part) for part in value]
    # 1 and 1.0 are equal, and so are runs that differ in nothing else
    return int(value) if isinstance(value, float) and value.is_integer() else value
