"""Choose a setting by held-out images: candidates first, then the run with the best of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kdlib import store
from kdlib.engine.graph import is_complete
from kdlib.errors import NothingFound
from kdlib.runs import Run
from kdlib.store import Trained


@dataclass(frozen=True)
class Tuned:
    """A chain of runs for ``train``: candidates, then the run that belongs to the best of them.

    A candidate whose loss is not finite loses, and is not tried again; the chain goes on.

    Attributes:
        candidates: one run for each value of a setting. On a data set with the suffix ``+held``
            they are tested on training images, so that no test image chooses.
        runs: for each candidate, the run that follows if it is the best.

    Raises ValueError where there is no candidate, or not one run for each.
    """

    candidates: tuple[Run, ...]
    runs: tuple[Run, ...]
    tolerant = True

    def __post_init__(self):
        object.__setattr__(self, "candidates", tuple(self.candidates))
        object.__setattr__(self, "runs", tuple(self.runs))
        if not self.candidates or len(self.candidates) != len(self.runs):
            raise ValueError(
                f"{len(self.candidates)} candidates and {len(self.runs)} runs: give one or more "
                f"candidates, and one run for each."
            )

    def next_run(self, trained: Trained | None) -> Run | None:
        """The missing candidates; then the run of the best one; then None."""
        for run in self.candidates:
            if not (is_complete(run, False, {}) or store.failure_path(run).exists()):
                return run
        final = self.runs[self.choose()]
        return None if trained and trained.run == final else final

    def accuracies(self) -> list[float]:
        """The candidates' accuracies after their last epoch; minus infinity without a record."""
        found = map(store.find_record, self.candidates)
        return [record.final["test_top1"] if record else -math.inf for record in found]

    def choose(self) -> int:
        """The place of the most accurate candidate; of equal ones, the first.

        Raises NothingFound where no candidate has a record.
        """
        accuracies = self.accuracies()
        if max(accuracies) == -math.inf:
            raise NothingFound(f"No candidate of {self.runs[0]} was trained to its end.")
        return accuracies.index(max(accuracies))

    def needs(self, run: Run) -> list[Run]:
        """None: records hold all accuracies."""
        return []

    def estimate(self) -> list[Run]:
        """The candidates, and the last of the runs that may follow them."""
        return [*self.candidates, self.runs[-1]]
