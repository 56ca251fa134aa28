"""Greedy search: RCO's anchors, each found with the student of the one before (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdlib import store
from kdlib.chains.divergence import divergence_from_route
from kdlib.methods.distill import FromTeacher
from kdlib.methods.route import multi_stage, next_anchor, next_stage
from kdlib.runs import Run
from kdlib.store import Trained, measure

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GreedySearch:
    """A chain of runs for ``train``: one for each anchor, each from the weights of the one before.

    Attributes:
        student: the run of one stage; its method learns from a teacher.
        first: the first anchor; the paper does not state it (docs/decisions.md, RCO-h).
        delta: δ. An anchor with r_ij above δ is too hard.
        candidates: the teacher's epochs that may become anchors, besides the last; None for all.
        most: the largest number of anchors; the last of them is the teacher's last epoch. Four is
            the paper's budget (§4.4). Without a limit a search may take every epoch as an anchor.

    Raises ValueError where the student has no teacher or the teacher no such first epoch.
    """

    student: Run
    first: int
    delta: float = 0.8
    candidates: tuple[int, ...] | None = None
    most: int = 4

    def __post_init__(self):
        teacher = next_stage(self.student, None, self.first).method.teacher
        every = range(1, teacher.recipe.epochs + 1)
        allowed = every if self.candidates is None else self.candidates
        kept = replace(teacher, keep=(*teacher.keep, *allowed), save_logits=True)
        method = replace(self.student.method, teacher=kept)
        object.__setattr__(self, "student", replace(self.student, method=method))

    @property
    def _last(self) -> int:
        return self.student.method.teacher.recipe.epochs

    def next_run(self, trained: Trained | None) -> Run | None:
        """The stage after this one; the first for None; None after the last anchor's."""
        if trained is None:
            return next_stage(self.student, None, self.first)
        anchor = trained.run.method.teacher_epoch
        if anchor == self._last:
            return None
        after = self._after(trained)
        if len(anchors(trained)) >= self.most - 1:
            after = self._last
        return next_stage(self.student, trained.run, after)

    def was_cut(self, trained: Trained) -> bool:
        """Whether ``most``, not Algorithm 2, chose the last anchor of this trained chain."""
        chain = stages(trained)
        return len(chain) == self.most > 1 and self._after(chain[-2]) != self._last

    def _after(self, trained: Trained) -> int:
        """The anchor after that of a trained stage, by Algorithm 2."""
        table = measure(trained, divergence_from_route)
        divergence = dict(zip(table.epoch, table.kl, strict=True))
        anchor = trained.run.method.teacher_epoch
        return next_anchor(divergence, anchor, self.delta, self.candidates)

    def needs(self, run: Run) -> list[Run]:
        """The teacher: its saved logits decide the next anchor."""
        return [self.student.method.teacher]

    def estimate(self, stages: int = 4) -> list[Run]:
        """Stages at even intervals, as many as the paper usually found."""
        gaps = range(1, stages)
        later = [self.first + (self._last - self.first) * k // (stages - 1) for k in gaps]
        return multi_stage(self.student, sorted({self.first, *later}))


def stages(trained: Trained) -> list[Trained]:
    """All runs of a trained chain, first to last."""
    return [store.find_record(run) for run in _backwards(trained.run)][::-1]


def anchors(trained: Trained) -> list[int]:
    """The anchors of a trained chain, first to last."""
    return [run.method.teacher_epoch for run in _backwards(trained.run)][::-1]


def divergences(trained: Trained) -> pd.DataFrame:
    """H_j of every stage but the last, the basis of the search: columns anchor, epoch, kl."""
    import pandas as pd  # `import kdlib` needs no pandas

    tables = [pd.DataFrame({"epoch": [], "kl": [], "anchor": []})]  # for a search with one anchor
    for stage in stages(trained)[:-1]:
        table = measure(stage, divergence_from_route)
        tables.append(table.assign(anchor=stage.run.method.teacher_epoch))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _backwards(run: Run) -> Iterator[Run]:
    """A chain's runs, last to first, without the run that its student itself started from."""
    yield run
    while run.start and isinstance(run.start.method, FromTeacher):
        run = run.start
        yield run
