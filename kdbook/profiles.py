"""Profiles: what is shrunk, and how. One table each; no notebook asks which profile it runs in.

A notebook states the paper's own quantities; the profile maps them to those that are run.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from kdbook import small_networks
from kdlib.data import canonical_name, display_name, split_name
from kdlib.errors import UnknownName
from kdlib.methods import KD, STC, CrossEntropy, GateSearch, Method
from kdlib.runs import Recipe, Run

# The paper's epochs that RCO's teachers keep however thin a route is made. All its fixed anchors
# but those of M_gap = 1, 2 and 4 are among them.
RCO_ROUTE = tuple(range(10, 250, 10))

# Students that a figure follows along their training, and the paper's epochs that they keep. Other
# notebooks ask for them, too: all must ask for the same checkpoints, or one makes the other's runs
# train again.
FOLLOWED = {
    ("mobilenetv2-t4-w0.35", CrossEntropy): range(1, 241),  # RCO's Figure 5
    ("mobilenetv2-t4-w0.35", KD): range(1, 241),
    ("resnet20", STC): range(50, 501, 50),  # where to cut
    ("densenet-bc-100-12", GateSearch): range(5, 301, 5),  # the search, epoch by epoch
}


@dataclass(frozen=True)
class Profile:
    """A mapping from the papers' quantities to those that are run.

    Attributes:
        says: what it runs, in one line.
        length: run epochs per paper epoch.
        seeds: one training each.
        datasets: what stands in for a paper's data set; the paper's own where not named.
        models: likewise for networks.
        images: train on so many images only; None for all.
        repeats: of a paper's data set that is much larger than its stand-in, how many epochs of
            this count as one of that.
        axis: of each axis of a grid of networks, take the first so many; None for all.
        keep_route: of a teacher whose route is learned from, keep the weights of every so many of
            the paper's epochs, besides ``RCO_ROUTE``.
        gate_factors: on strength and rate of a search's gates, which have to close in fewer steps.
        evidence: whether a result may count for or against a paper at all.
        stand_ins: data sets that a reader put in place of the profile's, as ``name=label``.
    """

    name: str
    length: float
    seeds: tuple[int, ...]
    says: str = ""
    datasets: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    images: int | None = None
    repeats: Mapping[str, int] = field(default_factory=dict)
    axis: int | None = None
    keep_route: int = 1
    gate_factors: tuple[float, float] = (1, 1)
    evidence: bool = True
    stand_ins: tuple[str, ...] = ()

    @property
    def faithful(self) -> bool:
        """Whether nothing is shrunk and nothing stands in for anything."""
        return self.length == 1 and not (self.datasets or self.models or self.images or self.axis)

    @property
    def stamp(self) -> str:
        """What stands at a table of numbers besides the exhibit's own."""
        return self.folder if self.evidence else f"{self.folder}: no evidence"

    @property
    def folder(self) -> str:
        """Name of the results folder: another data set's numbers never overwrite the profile's."""
        thinned = [f"keep-route={self.keep_route}"] if self.keep_route > 1 else []
        return "+".join([self.name, *thinned, *self.stand_ins])

    def epochs(self, paper: int) -> int:
        """The paper's number of epochs, in this profile: at least one."""
        return max(1, round(paper * self.length))

    def iterations(self, paper: int) -> int:
        """The paper's number of iterations, likewise."""
        return self.epochs(paper)

    def dataset(self, paper: str) -> str:
        base, distortion = split_name(paper)
        return self.datasets.get(base, base) + distortion

    def model(self, paper: str) -> str:
        return self.models.get(paper, paper)

    def recipe(
        self, epochs: int, milestones: Iterable[int] = (), data: str = "", **settings
    ) -> Recipe:
        """The paper's recipe, its epochs and milestones scaled; ``data`` is told where ``repeats``
        are to count."""
        scaled = [self._repeated(epoch, data) for epoch in (epochs, *milestones)]
        return Recipe(epochs=scaled[0], milestones=tuple(scaled[1:]), **settings)

    def _repeated(self, epochs: int, data: str) -> int:
        return self.epochs(epochs * self.repeats.get(data, 1))

    def along(self, axis: Iterable) -> tuple:
        """The values of one axis of a grid of networks that are run."""
        return tuple(axis)[: self.axis]

    def gates(self, strength: float, rate: float) -> dict[str, float]:
        """λ₂ and η of a search, as settings of ``GateSearch``."""
        on_strength, on_rate = self.gate_factors
        return {"strength": strength * on_strength, "rate": rate * on_rate}

    @property
    def grid_seeds(self) -> tuple[int, ...]:
        """The seeds of a grid of networks: one where the grid is thinned, too."""
        return self.seeds[: 1 if self.axis else None]

    def route(self, recipe: Recipe) -> tuple[int, ...]:
        """The epochs, as run, that a teacher keeps whose route is learned from."""
        last = round(recipe.epochs / self.length)
        kept = {*range(self.keep_route, last + 1, self.keep_route), *RCO_ROUTE}
        return tuple(sorted({e for e in map(self.epochs, kept) if e <= recipe.epochs}))

    def keeps(self, gap: int) -> bool:
        """Whether a route has an anchor every ``gap`` of the paper's epochs."""
        return gap % self.keep_route == 0 or gap in RCO_ROUTE

    def run(
        self,
        data: str,
        model: str,
        recipe: Recipe,
        method: Method = CrossEntropy(),
        seed: int = 0,
        keep: Iterable[int] = (),
        route: bool = False,
        start: Run | None = None,
    ) -> Run:
        """A run named as the paper names it.

        Args:
            start: the run that it begins from.
            keep: the paper's epochs whose weights are kept.
            route: of a teacher whose route is learned from: keep ``route(recipe)`` and what tells
                how far a student is from every epoch.
        """
        followed = map(self.epochs, FOLLOWED.get((model, type(method)), ()))
        kept = {*map(self.epochs, keep), *(e for e in followed if e <= recipe.epochs)}
        kept |= {*self.route(recipe)} if route else set()
        return Run(
            data=self.dataset(data),
            model=self.model(model),
            recipe=recipe,
            method=method,
            seed=seed,
            images=self.images,
            start=start,
            keep=kept,
            route=route,
        )

    def settings(
        self, grid: bool = False, repeated: str = "", ours: Iterable[str] = (), **paper
    ) -> pd.DataFrame:
        """A table of the paper's settings beside this profile's.

        ``grid`` tells of the seeds of a grid of networks, ``repeated`` what recipes have as
        ``data``, ``ours`` which settings the paper does not print.

        Keys name the quantity, values are the paper's: a data set or network by name, a number of
        epochs or several as ``range`` of numbers in a key that ends in ``epochs``, one of
        iterations in a key that ends so.
        """
        rows = []
        for key, value in paper.items():
            if key.endswith("epochs"):
                several = value if isinstance(value, list | tuple) else [value]
                here = ", ".join(str(self._repeated(epoch, repeated)) for epoch in several)
                value = ", ".join(map(str, several))
            elif key.endswith("iterations"):
                here = self.iterations(value)
            elif key.startswith("data"):
                here = display_name(self.dataset(value))
            else:
                here = self.model(value)
            printed = f"{value} (ours)" if key in ours else value
            rows.append((key.replace("_", " "), printed, here))
        seeds = self.grid_seeds if grid else self.seeds
        rows.append(("seeds", "not stated", len(seeds)))
        most = f"at most {self.images}" if self.images else "all"
        rows.append(("training images", "all", most))
        return pd.DataFrame(rows, columns=["", "paper", self.name]).set_index("")


PROFILES = {
    "smoke": Profile(
        name="smoke",
        says="digits 8x8, small ResNets, a twentieth of the epochs; proves the pipeline, no claim",
        length=1 / 20,
        seeds=(0, 1),
        datasets={"cifar10": "digits", "cifar100": "digits", "mnist": "digits"},
        models=small_networks.SMOKE,
        images=1000,
        repeats={"mnist": 60, "cifar10": 2, "cifar100": 2},
        axis=2,
        gate_factors=(250, 5),
        evidence=False,
    ),
    "course": Profile(
        name="course",
        says="CIFAR at a tenth of the epochs; made for one T4-class GPU",
        length=1 / 10,
        seeds=(0, 1, 2),
        models={"resnet50": "resnet50-x0.5"},
        gate_factors=(3, 3),
    ),
    "paper": Profile(
        name="paper",
        says="the papers' own settings; made for a data-centre GPU",
        length=1,
        seeds=(0, 1, 2),
    ),
}


def open_profile(
    name: str = "smoke",
    seeds: Iterable[int] | None = None,
    data: Mapping[str, str] | str | None = None,
) -> Profile:
    """A profile by name, with other seeds or data sets where a reader asks for them.

    Args:
        name: ``smoke``, ``course`` or ``paper``.
        seeds: instead of the profile's own.
        data: what stands in for a data set: ``{"cifar100": "folder:/photos"}``, or the same as
            text, ``"cifar100=folder:/photos"``, several separated by commas.

    Raises:
        UnknownName: for a profile or data set that does not exist.
    """
    if name not in PROFILES:
        raise UnknownName("profile", name, PROFILES)
    profile = replace(PROFILES[name], keep_route=_keep_route())
    if seeds is not None:
        profile = replace(profile, seeds=tuple(seeds))
    if data:
        pairs = data if isinstance(data, Mapping) else _pairs(data)
        canonical = {canonical_name(paper): canonical_name(own) for paper, own in pairs.items()}
        named = tuple(sorted(f"{paper}={display_name(own)}" for paper, own in canonical.items()))
        datasets = {**profile.datasets, **canonical}
        profile = replace(profile, datasets=datasets, stand_ins=named)
    return profile


def _keep_route() -> int:
    """``$KDLIB_KEEP_ROUTE``, which ``./run_all.sh --keep-route`` sets."""
    text = os.environ.get("KDLIB_KEEP_ROUTE") or "1"
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"KDLIB_KEEP_ROUTE is {text!r}: it takes a number of epochs, 1 or more.")
    return int(text)


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    for paper, separator, own in pairs:
        canonical_name(paper)
        if not (separator and own):
            raise ValueError(f"{text!r} does not read as NAME=DATA, such as cifar100=folder:PATH.")
    return {paper: own for paper, _, own in pairs}
