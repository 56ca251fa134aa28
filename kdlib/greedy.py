"""Greedy search: RCO's anchors, each found with the student of the one before (Algorithm 2)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd

from kdlib import analysis, store
from kdlib.methods import FromTeacher
from kdlib.methods.route import following, multi_stage, next_anchor
from kdlib.runs import Run
from kdlib.store import Trained, measure


@dataclass(frozen=True)
class GreedySearch:
    """A chain of runs for ``train``: one per anchor, each from the last one's weights.

    Attributes:
        student: what is trained at each stage; its method learns from a teacher, whose every epoch
            may become an anchor.
        first: the first anchor; the paper does not say which (docs/decisions.md, RCO-h).
        delta: δ, above which r_ij means too hard.
        every: only multiples of this may be anchors, besides the last epoch.
    """

    student: Run
    first: int
    delta: float = 0.8
    every: int = 1

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"Anchors every {self.every} epochs: at least one is needed.")
        teacher = self._method.teacher
        allowed = [e for e in range(1, teacher.recipe.epochs + 1) if self._allowed(e)]
        kept = replace(teacher, keep=(*teacher.keep, *allowed, self.first), route=True)
        method = replace(self._method, teacher=kept)
        object.__setattr__(self, "student", replace(self.student, method=method))

    @property
    def _method(self) -> FromTeacher:
        return self.student.method

    def _allowed(self, epoch: int) -> bool:
        return epoch % self.every == 0

    def following(self, trained: Trained | None) -> Run | None:
        """The stage after this one; for None the first, after that of the last anchor None."""
        if trained is None:
            return following(self.student, None, self.first)
        anchor = trained.run.method.anchor
        if anchor == self._method.teacher.recipe.epochs:
            return None
        table = measure(trained, analysis.divergence_from_route)
        divergence = dict(zip(table.epoch, table.kl, strict=True))
        after = next_anchor(divergence, anchor, self.delta, self._allowed)
        return following(self.student, trained.run, after)

    def looks_at(self, run: Run) -> list[Run]:
        """What must be in the store to say what follows ``run``."""
        return [self._method.teacher]

    def foreseen(self, stages: int = 4) -> list[Run]:
        """As many stages as the paper usually found, at even intervals: what it may cost."""
        last = self._method.teacher.recipe.epochs
        later = [self.first + (last - self.first) * k // (stages - 1) for k in range(1, stages)]
        return multi_stage(self.student, sorted({self.first, *later}))


def stages(trained: Trained) -> list[Trained]:
    """A trained chain of runs, first to last."""
    chain: Iterator[Run] = _backwards(trained.run)
    return [store.find_record(run) for run in chain][::-1]


def anchors(trained: Trained) -> list[int]:
    """The teacher's epochs that a chain learned from, first to last."""
    return [stage.run.method.anchor for stage in stages(trained)]


def total_epochs(trained: Trained) -> int:
    """Student epochs of the whole chain."""
    return trained.run.epochs_before + trained.run.recipe.epochs


def divergences(trained: Trained) -> pd.DataFrame:
    """H_j of every stage but the last, that is what the search saw: columns anchor, epoch, kl."""
    seen = [pd.DataFrame({"epoch": [], "kl": [], "anchor": []})]  # of a search that took one anchor
    for stage in stages(trained)[:-1]:
        table = measure(stage, analysis.divergence_from_route)
        seen.append(table.assign(anchor=stage.run.method.anchor))
    return pd.concat(seen[1:] or seen, ignore_index=True)


def _backwards(run: Run | None) -> Iterator[Run]:
    while run is not None:
        yield run
        run = run.start
