"""How a student learns from labels alone, or from a teacher's logits: KD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from kdlib import losses

if TYPE_CHECKING:
    from kdlib.runs import Run

# A checkpoint of a teacher: the run and how many epochs of it; None for the end.
Anchor = tuple["Run", int]


@dataclass(frozen=True)
class Method:
    """What every method says of itself; its fields are part of the run's description."""

    def labeller(self, epoch: int) -> Anchor | None:
        """Whose logits label the student's ``epoch`` (from 0): a teacher's run and its epoch.

        None where no logits are needed. Plain distillation and every RCO strategy differ in
        nothing but this answer.
        """
        return None

    def anchors(self, epochs: int) -> set[Anchor]:
        """All checkpoints that label a run of this many epochs."""
        return {anchor for e in range(epochs) if (anchor := self.labeller(e)) is not None}

    def loss(
        self,
        student: Callable[[Tensor], Tensor],
        x: Tensor,
        labels: Tensor,
        targets: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and named terms of one batch; the term ``loss`` is minimised, all are logged.

        ``student`` gives float32 logits; losses run in float32 on every device. ``targets``
        ``[b, classes]`` are the labeller's logits for exactly these views.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Method):
    """Learn from the labels alone ("softmax" in RCO's tables)."""

    def loss(self, student, x, labels, targets):
        logits = student(x)
        ce = F.cross_entropy(logits, labels)
        return logits, {"loss": ce, "ce": ce}


@dataclass(frozen=True)
class KD(Method):
    """ce_weight·CE + kd_weight·T²·KL(teacher ‖ student) (Hinton et al. 2015; RCO Eq. 1).

    Attributes:
        teacher: the run that labels.
        at: by its checkpoint after this many epochs; None for its last.
        temperature: T, RCO's τ = 5 by default.
        ce_weight, kd_weight: RCO's λ is not printed; both are 1 by default (docs/decisions.md).
    """

    teacher: Run
    at: int | None = None
    temperature: float = 5.0
    ce_weight: float = 1.0
    kd_weight: float = 1.0

    def __post_init__(self):  # one training, one id: the last epoch is None
        if self.at == self.teacher.recipe.epochs:
            object.__setattr__(self, "at", None)

    def labeller(self, epoch):
        return self.teacher, self.teacher.recipe.epochs if self.at is None else self.at

    def loss(self, student, x, labels, targets):
        logits = student(x)
        ce = F.cross_entropy(logits, labels)
        kd = losses.kd(logits, targets, self.temperature)
        return logits, {"loss": self.ce_weight * ce + self.kd_weight * kd, "ce": ce, "kd": kd}
