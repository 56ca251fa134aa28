"""Learn from a teacher's logits: KD, and the bases of the methods that extend it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kdlib import losses
from kdlib.runs import Checkpoint, Method, Run, Terms


@dataclass(frozen=True)
class FromTeacher(Method):
    """Learn from one checkpoint of a trained teacher.

    Attributes:
        teacher: the teacher's run.
        at: the teacher's checkpoint after this many epochs; None for the last.

    Raises ValueError for an epoch that the teacher does not have, and for a teacher that does not
    work without its auxiliary modules.
    """

    teacher: Run
    at: int | None = None

    def __post_init__(self):
        if not self.teacher.method.standalone:
            raise ValueError(
                f"{self.teacher} cannot be a teacher: its student does not work without its "
                f"auxiliary modules."
            )
        last = self.teacher.recipe.epochs
        if self.at is not None and self.at not in range(1, last + 1):
            raise ValueError(
                f"The teacher {self.teacher} has the epochs 1 to {last}, so not epoch {self.at}."
            )
        # one training has one id: the last epoch is None
        at = None if self.at is None or self.at == last else int(self.at)
        object.__setattr__(self, "at", at)

    @property
    def teacher_epoch(self) -> int:
        """The epoch of the teacher's checkpoint."""
        return self.teacher.recipe.epochs if self.at is None else self.at

    def teacher_at(self, epoch):
        return Checkpoint(self.teacher, self.teacher_epoch)


@dataclass(frozen=True, kw_only=True)
class OnLogits(FromTeacher):
    """ce_weight·CE + kd_weight·T²·KL(teacher ‖ student) on the student's own logits.

    A method of features adds its term to this loss, and so works with KD and without.

    Attributes:
        ce_weight, kd_weight: 0.1 and 0.9 are usual for "+KD".
        temperature: T.
    """

    ce_weight: float = 1.0
    kd_weight: float = 0.0
    temperature: float = 4.0

    @property
    def needs_logits(self):
        return self.kd_weight != 0

    def on_logits(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Terms:
        """The terms ``ce``, ``kd`` where it has a weight, and ``loss``, their weighted sum.

        ``teacher_logits`` are read only where ``kd`` has a weight.
        """
        terms = {"ce": F.cross_entropy(logits, labels)}
        # A term without weight gives no gradient at all, rather than a gradient of zero.
        loss = self.ce_weight * terms["ce"] if self.ce_weight else 0.0
        if self.kd_weight:
            terms["kd"] = losses.kd(logits, teacher_logits, self.temperature)
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
        return logits, self.on_logits(logits, step.labels, step.teacher_logits)


class Wrapper(Method):
    """A method around another, ``inner``.

    Attributes and methods that a subclass does not define come from ``inner``. Only the choice of
    the teacher does not.
    """

    @property
    def inner(self) -> Method:
        raise NotImplementedError


def _forwarded(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


for _name in vars(Method).keys() - {"teacher_at", "checkpoints"}:
    if not _name.startswith("_"):
        setattr(Wrapper, _name, _forwarded(_name))
