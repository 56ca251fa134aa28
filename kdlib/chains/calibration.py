"""Calibration: a distorted data set is chosen by how far the teacher's accuracy falls on it."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pandas as pd

from kdlib import store
from kdlib.data import split_name
from kdlib.runs import Run
from kdlib.store import Trained


@dataclass(frozen=True)
class Calibration:
    """Trains one network on a data set and on distorted copies, and chooses one of these.

    The chosen one is where test accuracy falls by what is nearest to ``drop``. Only this network
    takes part: which student is the best there chooses nothing.

    Attributes:
        clean: the network's training on the data set as it is.
        distortions: what is appended to the data set's name, such as ``+noise0.04``.
        drop: in points of accuracy.
    """

    clean: Run
    distortions: tuple[str, ...]
    drop: float

    def __post_init__(self):
        object.__setattr__(self, "distortions", tuple(self.distortions))

    @property
    def runs(self) -> list[Run]:
        """The network's trainings, first on clean images."""
        return [self.clean, *(distorted(self.clean, d) for d in self.distortions)]

    def drops(self) -> pd.Series:
        """By how many points accuracy falls, by distortion. Needs all ``runs`` trained."""
        clean, *others = (store.find_record(run).final["test_top1"] for run in self.runs)
        return pd.Series([clean - top1 for top1 in others], self.distortions, name="drop")

    def choose(self) -> str:
        """The distortion whose drop is nearest; of equals the first."""
        return (self.drops() - self.drop).abs().idxmin()


@dataclass(frozen=True)
class OnDistorted:
    """A chain of runs for ``train``: a calibration, then a run on the data that it chose.

    Attributes:
        run: as it is on clean images; its teachers move with it.
    """

    run: Run
    calibration: Calibration

    def following(self, trained: Trained | None) -> Run | None:
        """What the calibration lacks, run by run; then the run itself; then None."""
        for run in self.calibration.runs:
            if store.find_record(run) is None:
                return run
        final = distorted(self.run, self.calibration.choose())
        return None if trained and trained.run == final else final

    def needs(self, run: Run) -> list[Run]:
        return []  # accuracies alone decide, and records tell them

    def estimate(self) -> list[Run]:
        return [*self.calibration.runs, distorted(self.run, self.calibration.distortions[0])]


def distorted(description: Any, distortion: str) -> Any:
    """A run, or what holds runs, with every data set in it distorted: teachers, too."""
    if not is_dataclass(description):
        return description
    parts = {f.name: getattr(description, f.name) for f in fields(description)}
    moved = {name: distorted(part, distortion) for name, part in parts.items()}
    if isinstance(description, Run):
        if split_name(description.data)[1]:
            raise ValueError(f"{description} learns from distorted images as it is.")
        moved["data"] = description.data + distortion
    return replace(description, **moved)
