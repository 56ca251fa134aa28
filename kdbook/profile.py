"""Profile: maps the papers' quantities to the quantities that run.

A notebook states the paper's own quantities. No notebook asks which profile it runs in. A route is
a teacher's checkpoints along its training, and its logits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from kdbook.kept_epochs import FOLLOWED, RCO_ANCHORS
from kdlib.data import display_name, split_name
from kdlib.methods import CrossEntropy, Method
from kdlib.runs import Recipe, Run


@dataclass(frozen=True)
class Profile:
    """A mapping from the papers' quantities to the quantities that run.

    Attributes:
        epoch_scale: number of epochs that run for one epoch of the paper.
        iteration_scale: the same for settings in iterations; None for ``epoch_scale``.
        papers: fields that have another value for one of the papers, by chapter.
        seeds: one training for each seed.
        description: one line for the help text.
        cost: the expected time of the whole book, in words.
        instead: another of the papers' data sets that runs in place of a paper's data set.
        datasets: replacement for a paper's data set, by name. A data set without a replacement
            stays as it is.
        models: replacement for a paper's network, likewise.
        suffixes: suffix of a paper's data set, also of its replacement, such as ``+half``.
        images: train on this many images of a paper's data set only; by default on all.
        rates: learning rates that replace the papers', where those are too small for fewer steps.
        batch: the largest batch; a larger one becomes as small, and its rate in proportion smaller.
        repeats: for a paper's data set that is much larger than its replacement, the number of
            epochs of the replacement that count as one epoch of the data set.
        axis_limit: on each axis of a grid of networks, run only this many values; None for all.
        probed: images of a split that a measurement uses at most; None for no limit.
        seeds_of_grid: number of seeds of a grid of networks; None for all.
        further_seeds: those that ``with_further_seeds`` adds.
        tries: number of values of a tuned setting; None for all.
        keep_route: a teacher with a route keeps the weights of every ``keep_route``-th epoch of
            the paper, and of ``RCO_ANCHORS``. A reader's choice: ``--keep-route``.
        evidence: whether a result may count for or against a paper at all.
        substitutes: data sets that the reader chose to replace the profile's, as ``name=label``.
    """

    name: str
    epoch_scale: float
    seeds: tuple[int, ...]
    description: str = ""
    cost: str = ""
    papers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[float, float] = field(default_factory=dict)
    batch: int | None = None
    repeats: Mapping[str, int] = field(default_factory=dict)
    axis_limit: int | None = None
    iteration_scale: float | None = None
    probed: int | None = None
    seeds_of_grid: int | None = None
    further_seeds: tuple[int, ...] = (3, 4)
    tries: int | None = None
    keep_route: int = 1
    evidence: bool = True
    substitutes: tuple[str, ...] = ()

    @property
    def faithful(self) -> bool:
        """Whether every run is as long and as large as in the paper, on the paper's data."""
        smaller = (self.images, self.axis_limit, self.seeds_of_grid, self.batch, self.rates)
        other = (self.instead, self.datasets, self.suffixes, self.models, self.repeats)
        return self.epoch_scale == 1 and not any((*smaller, *other, self.iteration_scale))

    @property
    def scale(self) -> str:
        """``full``, ``reduced`` or ``smoke``: which verdicts its runs allow (``claims.judge``)."""
        return "smoke" if not self.evidence else "full" if self.faithful else "reduced"

    @property
    def folder(self) -> str:
        """Name of the results folder. Each choice of data set and route has a folder of its own."""
        thinned = [f"keep-route={self.keep_route}"] if self.keep_route > 1 else []
        return "+".join([self.name, *thinned, *self.substitutes])

    @property
    def stamp(self) -> str:
        """The words that mark a table of numbers with its profile."""
        return self.folder if self.evidence else f"{self.folder}: no evidence"

    @property
    def grid_seeds(self) -> tuple[int, ...]:
        """The seeds of a grid of networks."""
        return self.seeds[: self.seeds_of_grid]

    def with_further_seeds(self) -> "Profile":
        """The same profile with more seeds, for an exhibit that compares methods of equal rank."""
        return replace(self, seeds=(*self.seeds, *self.further_seeds), further_seeds=())

    def limit_axis(self, values: Iterable) -> tuple:
        """The values that run, of one axis of a grid of networks."""
        return tuple(values)[: self.axis_limit]

    def limit_images(self, count: int | None = None) -> int | None:
        """The number of images that a measurement uses where the notebook asks for ``count``."""
        return min((n for n in (count, self.probed) if n), default=None)

    def scale_epochs(self, paper: int) -> int:
        """The paper's number of epochs in this profile: at least one."""
        return max(1, round(paper * self.epoch_scale))

    def scale_iterations(self, paper: int) -> int:
        """The paper's number of iterations in this profile: at least one."""
        return max(1, round(paper * (self.iteration_scale or self.epoch_scale)))

    def dataset(self, paper: str) -> str:
        """The data set that runs for the paper's data set, with the same distortion."""
        base, distortion = split_name(paper)
        base = self.instead.get(base, base)
        return self.datasets.get(base, base) + self.suffixes.get(base, "") + distortion

    def images_of(self, paper: str) -> int | None:
        """The number of training images of the data set that runs; None for all."""
        base = split_name(paper)[0]
        return self.images.get(self.instead.get(base, base))

    def model(self, paper: str) -> str:
        """The network that runs for the paper's network."""
        return self.models.get(paper, paper)

    def recipe(
        self, epochs: int, milestones: Iterable[int] = (), data: str = "", **settings
    ) -> Recipe:
        """The paper's recipe with scaled epochs and milestones.

        Args:
            data: the paper's data set; name it where its ``repeats`` apply.
            settings: other fields of ``Recipe``.
        """
        scaled = [self._repeat(epoch, data) for epoch in (epochs, *milestones)]
        # Two milestones of a short training can meet. There the rate falls once, not twice.
        recipe = Recipe(epochs=scaled[0], milestones=tuple(dict.fromkeys(scaled[1:])), **settings)
        recipe = replace(recipe, lr=self.rates.get(recipe.lr, recipe.lr))
        if not self.batch or recipe.batch <= self.batch:
            return recipe
        return replace(recipe, batch=self.batch, lr=recipe.lr * self.batch / recipe.batch)

    def _repeat(self, epochs: int, data: str) -> int:
        return self.scale_epochs(epochs * self.repeats.get(data, 1))

    def route_epochs(self, recipe: Recipe) -> tuple[int, ...]:
        """The scaled epochs whose weights a teacher with a route and this recipe keeps."""
        last = round(recipe.epochs / self.epoch_scale)
        kept = {*range(self.keep_route, last + 1, self.keep_route), *RCO_ANCHORS}
        return tuple(sorted({e for e in map(self.scale_epochs, kept) if e <= recipe.epochs}))

    def has_anchor_gap(self, gap: int) -> bool:
        """Whether a route keeps the anchors of the anchor interval ``gap``, in paper epochs."""
        return gap % self.keep_route == 0 or gap in RCO_ANCHORS

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
        """A run, named as in the paper.

        Args:
            recipe: a scaled recipe, from ``recipe``.
            keep: the paper's epochs whose weights the run keeps, besides its ``FOLLOWED`` epochs.
            route: whether students learn from the route of this teacher. If so, the run keeps the
                weights of ``route_epochs(recipe)`` and its logits on validation images.
            start: the run whose weights this run starts from.
        """
        of_last = getattr(method, "at", None) is None
        followed = FOLLOWED.get((model, type(method)), ()) if of_last else ()
        followed = map(self.scale_epochs, followed)
        kept = {*map(self.scale_epochs, keep), *(e for e in followed if e <= recipe.epochs)}
        kept |= {*self.route_epochs(recipe)} if route else set()
        return Run(
            data=self.dataset(data),
            model=self.model(model),
            recipe=recipe,
            method=method,
            seed=seed,
            images=self.images_of(data),
            start=start,
            keep=kept,
            save_logits=route,
        )

    def settings(
        self,
        *datasets: str,
        networks: Mapping[str, str] | None = None,
        epochs: Mapping[str, int | Iterable[int]] | None = None,
        iterations: int | None = None,
        others: Mapping[str, Any] | None = None,
        repeats_of: str = "",
        grid: bool = False,
        ours: Iterable[str] = (),
    ) -> pd.DataFrame:
        """A table of the paper's settings and this profile's settings, one row each.

        Args:
            datasets: the paper's data sets.
            networks: the paper's networks by the name of their row, such as ``teacher``.
            epochs: numbers of epochs by the name of their row.
            iterations: a number of training iterations.
            others: settings that are the same in every profile, by the name of their row.
            repeats_of: the paper's data set whose ``repeats`` apply to ``epochs``.
            grid: whether the exhibit is a grid of networks, with the seeds of a grid.
            ours: names of the rows that the paper does not print.
        """
        rows = []
        for number, name in enumerate(datasets, start=1):
            label = f"data set {number}" if number > 1 else "data set"
            rows.append((label, name, display_name(self.dataset(name))))
        rows += [(label, name, self.model(name)) for label, name in (networks or {}).items()]
        for label, value in (epochs or {}).items():
            several = [value] if isinstance(value, int) else [*value]
            scaled = (self._repeat(epoch, repeats_of) for epoch in several)
            rows.append((label, *(", ".join(map(str, values)) for values in (several, scaled))))
        if iterations:
            rows.append(("iterations", iterations, self.scale_iterations(iterations)))
        rows += [(label, value, value) for label, value in (others or {}).items()]
        rows = [(label, f"{p} (ours)" if label in ours else p, run) for label, p, run in rows]
        most = {f"at most {n:,}" if (n := self.images_of(name)) else "all" for name in datasets}
        rows.append(("seeds", "not stated", len(self.grid_seeds if grid else self.seeds)))
        rows.append(("training images", "all", ", ".join(sorted(most)) or "all"))
        return pd.DataFrame(rows, columns=["", "paper", self.name]).set_index("")
