"""RCO: learn from the checkpoints of the teacher's route, easy to hard (Jin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kdlib.methods.distill import FromTeacher, Wrapper
from kdlib.runs import Checkpoint, Run


@dataclass(frozen=True)
class OneStage(Wrapper):
    """One-stage EEI: the teacher's checkpoint changes every ``gap`` epochs (RCO §4.4).

    The student's first ``gap`` epochs learn from the teacher's epoch ``gap``, the next from its
    epoch ``2 * gap``, and so on, up to the teacher's last epoch. The learning rate does not begin
    again.

    Attributes:
        method: how to learn from each checkpoint, such as ``KD(teacher)``.
        gap: M_gap, the interval of the anchors, in epochs of the student.
        stride: the same interval in epochs of the teacher, where it had longer training than the
            student; None for ``gap``.

    Raises ValueError for a gap or a stride that is not a whole number of at least 1.
    """

    method: FromTeacher
    gap: int
    stride: int | None = None

    def __post_init__(self):
        if self.gap < 1 or self.gap != int(self.gap):
            raise ValueError(
                f"gap={self.gap}: give a whole number of epochs, at least 1. A gap of one step, "
                f"with the teacher in training beside the student, is RocketLaunching."
            )
        object.__setattr__(self, "gap", int(self.gap))
        if self.stride is not None:
            if self.stride < 1 or self.stride != int(self.stride):
                raise ValueError(f"stride={self.stride}: give a whole number of at least 1.")
            stride = None if self.stride == self.gap else int(self.stride)
            object.__setattr__(self, "stride", stride)
        # The method's own checkpoint makes no difference, so it must not change the id.
        object.__setattr__(self, "method", replace(self.method, at=None))

    @property
    def inner(self):
        return self.method

    def teacher_at(self, epoch):
        teacher = self.method.teacher
        at = min((epoch // self.gap + 1) * (self.stride or self.gap), teacher.recipe.epochs)
        return Checkpoint(teacher, at)


def multi_stage(student: Run, anchors: Iterable[int]) -> list[Run]:
    """A full training for every anchor, each from the weights of the one before (Algorithm 1).

    Optimizer and schedule begin again with every anchor.

    Args:
        student: the run of one stage; its method learns from a teacher. Where it has a ``start``,
            the first stage starts there.
        anchors: the teacher's epochs, first to last.
    """
    stages: list[Run] = []
    for anchor in anchors:
        stages.append(next_stage(student, stages[-1] if stages else None, anchor))
    return stages


def next_stage(student: Run, before: Run | None, anchor: int) -> Run:
    """The stage of ``anchor``, after the stage ``before``. It keeps only its last weights.

    Raises ValueError where the student's method does not learn from one checkpoint of a teacher.
    """
    if not isinstance(student.method, FromTeacher):
        raise ValueError(
            f"{student} does not learn from a checkpoint. Give it a method such as KD(teacher)."
        )
    method = replace(student.method, at=anchor)
    return replace(student, method=method, start=before or student.start, keep=())


def hardness(divergence: Mapping[int, float], anchor: int) -> dict[int, float]:
    """r_ij of Eq. 6 for all epochs j after the anchor i: (H_j - H_i) / H_i.

    Args:
        divergence: H by the teacher's epoch: the divergence from a student of the anchor.
    """
    own = divergence[anchor]
    return {
        j: (h - own) / own if own else math.inf * (h > 0)
        for j, h in sorted(divergence.items())
        if j > anchor
    }


def next_anchor(
    divergence: Mapping[int, float],
    anchor: int,
    delta: float = 0.8,
    candidates: Iterable[int] | None = None,
) -> int:
    """Greedy search (Algorithm 2): the last epoch before the first one that is too hard, r_ij > δ.

    If this is the anchor itself, the next epoch, so that the search advances. If no epoch is too
    hard, the last, N, which is never tested (``while j < N``).

    Args:
        divergence: H by the teacher's epoch, 1 to N, from the student of the anchor.
        anchor: i.
        candidates: the epochs that may be anchors; None for all. N may always be one.

    Raises ValueError where the anchor is the last epoch.
    """
    last = max(divergence)
    if anchor >= last:
        raise ValueError(f"No anchor follows epoch {anchor}: it is the teacher's last.")
    allowed = range(1, last) if candidates is None else sorted(candidates)
    later = [j for j in allowed if anchor < j < last] + [last]
    hard = (j for j, r in hardness(divergence, anchor).items() if j < last and r > delta)
    if (first_hard := next(hard, None)) is None:
        return last
    return max((j for j in later if j < first_hard), default=later[0])
