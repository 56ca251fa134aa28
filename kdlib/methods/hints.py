"""Learn from a teacher's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import FromTeacher


@dataclass(frozen=True)
class Hint(FromTeacher):
    """ce_weight·CE + hint_weight·mean (f_s - f_t)² of the last stages' features (RCO Eq. 2).

    Eq. 2 up to a constant: its sum over a feature's elements is a mean here, so that the weight
    means the same for every network. The larger map is average-pooled to the smaller; where
    channels differ, a 1x1 convolution that is trained along and dropped at inference maps the
    student's to the teacher's.
    """

    ce_weight: float = 1.0
    hint_weight: float = 1.0
    labelled = False
    live = True

    def parts(self, student, teacher, x):
        ours, theirs = (network.stages(x)[-1].shape[1] for network in (student, teacher))
        return {} if ours == theirs else {"adapter": nn.Conv2d(ours, theirs, kernel_size=1)}

    def loss(self, step):
        *_, feature = step.student.stages(step.x)
        *_, taught = step.teacher.stages(step.x)
        logits = step.student.head(feature)
        if adapter := step.parts.get("adapter"):
            feature = adapter(feature)
        hint = losses.hint(*_to_one_size(feature, taught))
        ce = F.cross_entropy(logits, step.labels)
        loss = self.ce_weight * ce + self.hint_weight * hint
        return logits, {"loss": loss, "ce": ce, "hint": hint}


def _to_one_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both average-pooled to the smaller height and width."""
    size = min(first.shape[2:], second.shape[2:])
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)
