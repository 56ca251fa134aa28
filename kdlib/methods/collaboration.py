"""STC: the student's front and the teacher's back form one network, and are trained together."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import OnLogits
from kdlib.models.names import builder, count_stages
from kdlib.models.staged import adapter
from kdlib.runs import Run

TARGETS = ("output", "soft", "label", "truth")


@dataclass(frozen=True, kw_only=True)
class STC(OnLogits):
    """alpha·C(teacher's back(student's front(x)), target) + (1 - alpha)·the student's own loss.

    Student-Teacher Collaboration, Eq. 3 to 5. The gradient of the first term reaches the student
    through the teacher's later stages, which are frozen and in eval mode. Where the features differ
    in shape, an adapter connects them. It is trained with the student; at inference neither the
    adapter nor the teacher is used. The student's own loss is that of ``OnLogits``: CE. A kd_weight
    adds KD to it; this is "STC+KD" (decision STC-g).

    Attributes:
        alpha: 0.3 on CIFAR-10, 0.5 elsewhere.
        cut: both networks are cut after this stage.
        back: a run of the teacher's data and model, whose later stages are the back in place of the
            teacher's; None for the teacher. The target stays the teacher's.
        target: ``output``, the teacher's softmax; ``soft``, the softmax at ``temperature``, and the
            loss times T²; ``label``, the teacher's most likely class; ``truth``, the true label.

    Raises ValueError for an alpha outside [0, 1], an unknown target, a cut after a stage that one
    of the networks does not have, and a back of another data set or model than the teacher's.
    """

    alpha: float = 0.3
    cut: int = 2
    target: str = "output"
    back: Run | None = None
    needs_teacher = True

    def __post_init__(self):
        super().__post_init__()
        if self.cut == int(self.cut):  # 2.0 is 2; `check` refuses other numbers
            object.__setattr__(self, "cut", int(self.cut))
        if self.target not in TARGETS:
            raise ValueError(f"Unknown target {self.target!r}. Known: {', '.join(TARGETS)}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: give a share of the loss, from 0 to 1.")

    @property
    def needs_logits(self):
        return self.target != "truth" or self.kd_weight != 0

    def check(self, run):
        stages = min(count_stages(run.model), count_stages(self.teacher.model))
        if self.cut not in range(1, stages + 1):
            raise ValueError(
                f"There is no cut after stage {self.cut}: {run.model} and {self.teacher.model} "
                f"have {stages} stages in common."
            )
        back = self.back or self.teacher
        if (back.data, back.model) != (self.teacher.data, self.teacher.model):
            raise ValueError(f"{back} lends no back: it is not the data and model of the teacher.")

    def pretrained(self):
        return {"back": self.back} if self.back else {}

    def aux_modules(self, student, teacher, x):
        ours, theirs = (network.until(self.cut, x) for network in (student, teacher))
        return {} if ours.shape == theirs.shape else {"adapter": adapter(ours, theirs)}

    def loss(self, step):
        feature = step.student.until(self.cut, step.x)
        logits = step.student.resume(self.cut, feature)
        together = self.collaborate(feature, step.teacher, {**step.aux, **step.pretrained})
        stc = self.imitate(together, step.teacher_logits, step.labels)
        terms = self.on_logits(logits, step.labels, step.teacher_logits)
        loss = self.alpha * stc + (1 - self.alpha) * terms["loss"]
        return logits, {**terms, "loss": loss, "stc": stc}

    def collaborate(self, feature: Tensor, teacher, parts) -> Tensor:
        """The logits of the back, given the student's feature; the teacher's if no part is one."""
        if "adapter" in parts:
            feature = parts["adapter"](feature)
        return parts.get("back", teacher).resume(self.cut, feature)

    def imitate(self, together: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> Tensor:
        """C: the distance of the collaboration's logits from the target."""
        match self.target:
            case "output":
                return losses.imitation(together, teacher_logits)
            case "soft":
                return losses.imitation(together, teacher_logits, self.temperature)
            case "label":
                return F.cross_entropy(together, teacher_logits.argmax(1))
            case "truth":
                return F.cross_entropy(together, labels)

    def composites(self, student, teacher, aux):
        def collaboration(x: Tensor) -> Tensor:
            return self.collaborate(student.until(self.cut, x), teacher, aux)

        return {"collaboration": collaboration}


@dataclass(frozen=True, kw_only=True)
class FreshBack(STC):
    """A control that the paper lacks: STC with a back of random weights that is trained along.

    The back has the shape of the teacher's, and learns from the same term as the student's front.
    So nothing of the teacher's later weights is used; what the teacher knows comes by its logits.
    """

    def aux_modules(self, student, teacher, x):
        aux, classes = super().aux_modules(student, teacher, x), teacher(x).shape[1]
        fresh = builder(self.teacher.model)(classes=classes, channels=x.shape[1])
        return {**aux, "back": Back(*fresh.body[self.cut :], fresh.head)}


class Back(nn.Sequential):
    """The later stages and the head of a network."""

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        return self(feature)
