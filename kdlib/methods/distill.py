"""How a student learns from labels alone, or from a teacher's logits: KD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from kdlib import losses

if TYPE_CHECKING:
    from kdlib.models import Staged
    from kdlib.models.precision import AutocastNetwork
    from kdlib.runs import Recipe, Run

# A checkpoint of a teacher: the run and how many epochs of it.
Anchor = tuple["Run", int]


class Step(NamedTuple):
    """What a loss may read: one batch, and the networks of a student in training.

    Networks are called as they are, and give float32 on every device: losses run in float32.

    Attributes:
        x: images ``[b, channels, height, width]``.
        labels: int64 ``[b]``.
        targets: ``[b, classes]``, the teacher_at's logits for exactly these views; None where there
            is no teacher_at or the method is not ``labelled``.
        student: the network to train.
        teacher: the teacher_at itself, frozen, for a method that is ``live``; else None.
        parts: what else the method trains, by name.
        frozen: parts that other runs trained, by name, in eval mode.
        noise: uniform in (0, 1), ``[b, noises, classes]``; None where the method has no ``noises``.
    """

    x: Tensor
    labels: Tensor
    targets: Tensor | None
    student: AutocastNetwork
    teacher: AutocastNetwork | None
    parts: Mapping[str, AutocastNetwork]
    frozen: Mapping[str, AutocastNetwork]
    noise: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """What every method says of itself; its fields are part of the run's description."""

    # Whether the loss reads the teacher_at's logits, and whether it needs the teacher itself.
    labelled = True
    live = False
    # Whether the student is a network by itself, without the method's parts.
    whole = True
    # Whether networks may compute in half precision. There losses are scaled at times, which a
    # method that looks at gradients must not see.
    half = True
    # How many random numbers the loss reads for every image and class.
    noises = 0

    def teacher_at(self, epoch: int) -> Anchor | None:
        """Whose logits label the student's ``epoch`` (from 0): a teacher's run and its epoch.

        None where no teacher is needed. Plain distillation and every RCO strategy differ in
        nothing but this answer.
        """
        return None

    def anchors(self, epochs: int) -> set[Anchor]:
        """All checkpoints that label a run of this many epochs."""
        return {anchor for e in range(epochs) if (anchor := self.teacher_at(e)) is not None}

    def check(self, run: Run) -> None:
        """Called as soon as a run is made: raise ValueError where it cannot learn so."""

    def parts(self, student: Staged, teacher: Staged | None, x: Tensor) -> dict[str, nn.Module]:
        """Modules that are trained along with the student, freshly initialised.

        Called once with a few images ``x`` under a seeded random state. A part that is a whole
        network is tested after each epoch, as the student is.
        """
        return {}

    def recipes(self) -> dict[str, Recipe]:
        """Parts that learn at a rate and schedule of their own; others share the student's."""
        return {}

    def turns(self) -> dict[str, Recipe]:
        """Updates that every step begins with, before that of ``loss``: their names and recipes.

        Each has an optimizer of its own, which moves the student and the part of its name by the
        gradient of ``turn``. Epochs and batch are the student's.
        """
        return {}

    def turn(self, name: str, step: Step) -> dict[str, Tensor]:
        """Named terms of such an update; the one of its name is minimised, all are logged."""
        raise NotImplementedError

    def optimizers(self, parts: Mapping[str, nn.Module]) -> dict[str, Optimizer]:
        """Parts that are not moved by gradient descent: their names, what moves each of them.

        Its momentum is kept as ``momentum_buffer``, as that of ``torch.optim.SGD``.
        """
        return {}

    def frozen(self) -> dict[str, Run]:
        """Parts that this method uses as another run has trained them: their names, that run."""
        return {}

    def joined(
        self,
        student: AutocastNetwork,
        teacher: AutocastNetwork | None,
        parts: Mapping[str, AutocastNetwork],
    ) -> dict[str, Callable[[Tensor], Tensor]]:
        """Classifiers joined of these networks, from images to logits, by name.

        They are tested after each epoch, as the student is. One named ``student`` is tested in its
        place.
        """
        return {}

    def told(self, parts: Mapping[str, nn.Module]) -> dict[str, float]:
        """Numbers to log after an epoch."""
        return {}

    def arrived(self, parts: Mapping[str, nn.Module]) -> bool:
        """Whether the run ends here, before its recipe does: asked after every epoch, and after
        every step of one in which it ``may_stop``."""
        return False

    def may_stop(self, parts: Mapping[str, nn.Module], steps: int) -> bool:
        """Whether the epoch that begins, of so many steps, may be the last."""
        return False

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits and named terms of one batch; ``loss`` is minimised, all are
        logged."""
        raise NotImplementedError


class Wrapper(Method):
    """A method around another, ``inner``: what it does not say itself, the inner one says."""

    @property
    def inner(self) -> Method:
        raise NotImplementedError

    live = property(lambda self: self.inner.live)
    labelled = property(lambda self: self.inner.labelled)
    whole = property(lambda self: self.inner.whole)
    half = property(lambda self: self.inner.half)
    noises = property(lambda self: self.inner.noises)

    def check(self, run):
        self.inner.check(run)

    def parts(self, student, teacher, x):
        return self.inner.parts(student, teacher, x)

    def recipes(self):
        return self.inner.recipes()

    def turns(self):
        return self.inner.turns()

    def turn(self, name, step):
        return self.inner.turn(name, step)

    def optimizers(self, parts):
        return self.inner.optimizers(parts)

    def frozen(self):
        return self.inner.frozen()

    def joined(self, student, teacher, parts):
        return self.inner.joined(student, teacher, parts)

    def told(self, parts):
        return self.inner.told(parts)

    def arrived(self, parts):
        return self.inner.arrived(parts)

    def may_stop(self, parts, steps):
        return self.inner.may_stop(parts, steps)

    def loss(self, step):
        return self.inner.loss(step)


@dataclass(frozen=True)
class CrossEntropy(Method):
    """Learn from the labels alone ("softmax" in RCO's tables)."""

    def loss(self, step):
        logits = step.student(step.x)
        ce = F.cross_entropy(logits, step.labels)
        return logits, {"loss": ce, "ce": ce}


@dataclass(frozen=True)
class FromTeacher(Method):
    """Learn from one checkpoint of a trained teacher.

    Attributes:
        teacher: the run that labels.
        at: by its checkpoint after this many epochs; None for its last.
    """

    teacher: Run
    at: int | None = None

    def __post_init__(self):
        if not self.teacher.method.whole:
            raise ValueError(
                f"{self.teacher} is no teacher: its student needs what it trained along."
            )
        # one training, one id: the last epoch is None
        last = self.teacher.recipe.epochs
        if self.at is not None and self.at not in range(1, last + 1):
            raise ValueError(f"There is no epoch {self.at} of {self.teacher}: it has 1 to {last}.")
        at = None if self.at is None or self.at == last else int(self.at)
        object.__setattr__(self, "at", at)

    @property
    def anchor(self) -> int:
        """The teacher's epoch that labels."""
        return self.teacher.recipe.epochs if self.at is None else self.at

    def teacher_at(self, epoch):
        return self.teacher, self.anchor


@dataclass(frozen=True, kw_only=True)
class OnLogits(FromTeacher):
    """ce_weight·CE + kd_weight·T²·KL(teacher ‖ student) on the student's own logits.

    A method that looks at features adds its term to it, and so works with KD and without.

    Attributes:
        ce_weight, kd_weight: 0.1 and 0.9 are usual for "+KD".
        temperature: T.
    """

    ce_weight: float = 1.0
    kd_weight: float = 0.0
    temperature: float = 4.0

    @property
    def labelled(self):
        return self.kd_weight != 0

    def on_logits(self, logits: Tensor, labels: Tensor, taught: Tensor | None) -> dict[str, Tensor]:
        """The terms ``ce``, ``kd`` where it has a weight, and ``loss``, their weighted sum.

        ``taught`` are the teacher's logits, read only where ``kd`` has a weight.
        """
        terms = {"ce": F.cross_entropy(logits, labels)}
        # What has no weight gives no gradient, rather than one of zero.
        loss = self.ce_weight * terms["ce"] if self.ce_weight else 0.0
        if self.kd_weight:
            terms["kd"] = losses.kd(logits, taught, self.temperature)
            loss = loss + self.kd_weight * terms["kd"]
        return {"loss": loss, **terms}


@dataclass(frozen=True, kw_only=True)
class KD(OnLogits):
    """ce_weight·CE + kd_weight·T²·KL(teacher ‖ student) (Hinton et al. 2015; RCO Eq. 1).

    Attributes:
        ce_weight, kd_weight: RCO's λ is not printed; both are 1 by default (docs/decisions.md).
        temperature: T, RCO's τ = 5 by default.
    """

    kd_weight: float = 1.0
    temperature: float = 5.0

    def loss(self, step):
        logits = step.student(step.x)
        return logits, self.on_logits(logits, step.labels, step.targets)
