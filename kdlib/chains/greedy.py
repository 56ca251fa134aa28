"""Greedy search: RCO's anchors, each found with the student of the one before (Algorithm 2)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd

from kdlib import store
from kdlib.chains.divergence import divergence_from_route
from kdlib.methods import FromTeacher
from kdlib.methods.route import following, multi_stage, next_anchor
from kdlib.runs import Run
from kdlib.store import Trained, measure


@dataclass(frozen=True)
class GreedySearch:
    """A chain of runs for ``train``: one per anchor, each from the last one's weights.

    Attributes:
        student: what is trained at each stage; its method learns from a teacher.
        first: the first anchor; the paper does not say which (docs/decisions.md, RCO-h).
        delta: δ, above which r_ij means too hard.
        candidates: the teacher's epochs that may become anchors, besides the last; None for all.
        most: at most so many anchors; the last of them then is the teacher's last epoch. Without a
            limit a search may creep along the route epoch by epoch.

    Raises ValueError where the student has no teacher or the teacher no such first epoch.
    """

    student: Run
    first: int
    delta: float = 0.8
    candidates: tuple[int, ...] | None = None
    most: int = 8

    def __post_init__(self):
        teacher = following(self.student, None, self.first).method.teacher
        every = range(1, teacher.recipe.epochs + 1)
        allowed = every if self.candidates is None else self.candidates
        kept = replace(teacher, keep=(*teacher.keep, *allowed, self.first), route=True)
        method = replace(self.student.method, teacher=kept)
        object.__setattr__(self, "student", replace(self.student, method=method))

    @property
    def _last(self) -> int:
        return self.student.method.teacher.recipe.epochs

    def following(self, trained: Trained | None) -> Run | None:
        """The stage after this one; for None the first, after that of the last anchor None."""
        if trained is None:
            return following(self.student, None, self.first)
        anchor = trained.run.method.anchor
        if anchor == self._last:
            return None
        if len(anchors(trained)) >= self.most - 1:
            return following(self.student, trained.run, self._last)
        table = measure(trained, divergence_from_route)
        divergence = dict(zip(table.epoch, table.kl, strict=True))
        after = next_anchor(divergence, anchor, self.delta, self.candidates)
        return following(self.student, trained.run, after)

    def needs(self, run: Run) -> list[Run]:
        """What must be in the store to say what follows ``run``."""
        return [self.student.method.teacher]

    def estimate(self, stages: int = 4) -> list[Run]:
        """As many stages as the paper usually found, at even intervals: what it may cost."""
        gaps = range(1, stages)
        later = [self.first + (self._last - self.first) * k // (stages - 1) for k in gaps]
        return multi_stage(self.student, sorted({self.first, *later}))


def stages(trained: Trained) -> list[Trained]:
    """A trained chain of runs, first to last."""
    return [store.find_record(run) for run in _backwards(trained.run)][::-1]


def anchors(trained: Trained) -> list[int]:
    """The teacher's epochs that a chain learned from, first to last."""
    return [run.method.anchor for run in _backwards(trained.run)][::-1]


def divergences(trained: Trained) -> pd.DataFrame:
    """H_j of every stage but the last, that is what the search saw: columns anchor, epoch, kl."""
    seen = [pd.DataFrame({"epoch": [], "kl": [], "anchor": []})]  # of a search that took one anchor
    for stage in stages(trained)[:-1]:
        table = measure(stage, divergence_from_route)
        seen.append(table.assign(anchor=stage.run.method.anchor))
    return pd.concat(seen[1:] or seen, ignore_index=True)


def _backwards(run: Run) -> Iterator[Run]:
    """A chain's runs, last to first; what its student itself started from is not among them."""
    yield run
    while run.start and isinstance(run.start.method, FromTeacher):
        run = run.start
        yield run
