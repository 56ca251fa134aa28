"""Calibration: choose a distortion of a data set by the loss of accuracy that it causes."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from kdlib import store
from kdlib.data import is_distorted
from kdlib.runs import Run
from kdlib.store import Trained

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Calibration:
    """Trains one network on a data set and on distorted copies, and chooses one of the copies.

    It chooses the copy on which the loss of test accuracy is nearest to ``drop``. No other network
    takes part: the results of students choose nothing.

    Attributes:
        clean: the training on the data set without distortion.
        distortions: endings for the data set's name, such as ``+noise0.04``.
        drop: in points of accuracy.
    """

    clean: Run
    distortions: tuple[str, ...]
    drop: float

    def __post_init__(self):
        object.__setattr__(self, "distortions", tuple(self.distortions))

    @property
    def runs(self) -> list[Run]:
        """The trainings of the network, first on images without distortion."""
        return [self.clean, *(distorted(self.clean, d) for d in self.distortions)]

    def drops(self) -> pd.Series:
        """The loss of accuracy in points, by distortion. All ``runs`` must be trained."""
        import pandas as pd  # `import kdlib` needs no pandas

        return pd.Series(self._drops(), name="drop")

    def choose(self) -> str:
        """The distortion with the nearest loss; the first of equal ones."""
        return min((drops := self._drops()), key=lambda name: abs(drops[name] - self.drop))

    def _drops(self) -> dict[str, float]:
        clean, *others = (store.require_record(run).final["test_top1"] for run in self.runs)
        return dict(zip(self.distortions, (clean - top1 for top1 in others), strict=True))


@dataclass(frozen=True)
class OnDistorted:
    """A chain of runs for ``train``: a calibration, then a run on the data set that it chose.

    Attributes:
        run: described on images without distortion; its teachers get the distortion as well.
    """

    run: Run
    calibration: Calibration

    def next_run(self, trained: Trained | None) -> Run | None:
        """The missing runs of the calibration; then the run itself; then None."""
        for run in self.calibration.runs:
            if store.find_record(run) is None:
                return run
        final = distorted(self.run, self.calibration.choose())
        return None if trained and trained.run == final else final

    def needs(self, run: Run) -> list[Run]:
        """None: records hold all accuracies."""
        return []

    def estimate(self) -> list[Run]:
        return [*self.calibration.runs, distorted(self.run, self.calibration.distortions[0])]


def distorted(description: Any, distortion: str) -> Any:
    """A run, or an object that holds runs, with every data set in it distorted.

    Raises ValueError for a run that is distorted already.
    """
    if not is_dataclass(description):
        return description
    parts = {f.name: getattr(description, f.name) for f in fields(description)}
    changed = {name: distorted(part, distortion) for name, part in parts.items()}
    if isinstance(description, Run):
        if is_distorted(description.data):
            raise ValueError(f"The data set of {description} is distorted already.")
        changed["data"] = description.data + distortion
    return replace(description, **changed)
