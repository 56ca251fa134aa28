"""KR: aggregated layers of the teacher, a sparse recoding penalty, two optimizers in turn.

The copies of the paper at hand have lost its formulas. This is the project's reconstruction from
the prose (docs/decisions.md, KR-g to KR-j).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import FromTeacher, Wrapper
from kdlib.models.precision import InFloat32
from kdlib.models.staged import adapter
from kdlib.runs import SGD, CrossEntropy, Method, Recipe

THRESHOLDS = ("learned", "fixed", "none")


@dataclass(frozen=True, kw_only=True)
class Representing(Wrapper, FromTeacher):
    """Base of KR: two optimizers in turn, of a teacher's prior and of its posterior knowledge.

    Attributes:
        prior: rate and schedule of the first update. Epochs and batch are those of the student;
            the prior's own are ignored, but they are part of the id.
        posterior: D, the method on logits: CrossEntropy, KD, NST, KDGAN or another. It learns from
            the checkpoint ``at`` of KR, not from its own.
        n: 3; 4 on ImageNet.
        beta, gamma: weights of the two parts, as the subclass says.
        gain: a of the penalty ρ.
        threshold: t of ρ, one for each group: ``learned``, ``fixed`` at its start, or ``none``,
            which with ``gain`` 1 is KR-Dense.
        pull: weight of the term that keeps a learned t from growing without limit.

    Raises ValueError for an unknown threshold, a number outside its range, and a posterior that
    learns from another teacher, is a Wrapper or is a search; TypeError for an n that is no integer.
    """

    prior: Recipe
    posterior: Method = CrossEntropy()
    n: int = 3
    beta: float = 1.0
    gamma: float = 0.0
    gain: float = 2.0
    threshold: str = "learned"
    pull: float = 1.0
    needs_teacher = True
    runs_teacher = True

    def __post_init__(self):
        super().__post_init__()
        if self.threshold not in THRESHOLDS:
            raise ValueError(
                f"Unknown threshold {self.threshold!r}. Known: {', '.join(THRESHOLDS)}."
            )
        object.__setattr__(self, "n", index(self.n))
        if self.n < 1 or not min(self.beta, self.gamma, self.gain, self.pull) >= 0:
            raise ValueError(f"KR needs n of at least 1 and no number below 0: {self}.")
        if isinstance(self.posterior, Wrapper) or not self.posterior.standalone:
            raise ValueError(f"{type(self.posterior).__name__} cannot be the posterior of KR.")
        if isinstance(self.posterior, FromTeacher):
            if self.posterior.teacher != self.teacher:
                raise ValueError(
                    f"Prior and posterior must have one teacher: {self.teacher}, not "
                    f"{self.posterior.teacher}."
                )
            object.__setattr__(self, "posterior", replace(self.posterior, at=self.at))

    @property
    def inner(self):
        return self.posterior

    @property
    def needs_logits(self):
        return self.posterior.needs_logits and isinstance(self.posterior, FromTeacher)

    def metrics(self, modules):
        thresholds = modules["prior"].thresholds
        found = {} if thresholds is None else {"threshold": thresholds.mean().item()}
        return found | self.posterior.metrics(modules)


@dataclass(frozen=True, kw_only=True)
class KR(Representing):
    """Knowledge Representing: learn a teacher's prior and posterior knowledge, in turn.

    Every step begins with an update by the prior, the sum over groups of

        beta·Σ_l w_l·mean ρ(A(F_s) - F_l).

    A group is up to n neighbouring layers of the teacher. F_l are their features, and w_l the
    standard deviations of the features over the sum of these. F_s is the feature of the student's
    layer, A an adapter that is trained with the student, ρ the sparse recoding penalty. Then
    follows an update by the posterior, D + gamma·(the same penalty). Each update has an optimizer,
    a rate and a schedule of its own.

    A threshold starts at the mean |A(F_s) - F_l| of the first batch. A learned one minimises
    beta·(Σ_l w_l·mean ρ + pull·(t - mean |A(F_s) - F_l|)²) by gradient descent; gamma does not
    change it.
    """

    def aux_modules(self, student, teacher, x):
        prior = Aggregation(student.layers(x), teacher.layers(x), self)
        return {"prior": prior, **self.posterior.aux_modules(student, teacher, x)}

    def optimizers(self, modules):
        prior = SGD(self.prior, ("prior", "student"))
        return {**self.posterior.optimizers(modules), "prior": prior}

    def extra_updates(self, step):
        prior, beyond = self.represent(step)
        yield "prior", {"prior": self.beta * prior, "beyond": beyond}

    def represent(self, step) -> tuple[Tensor, Tensor]:
        """The penalty over all groups, and the share of residuals beyond the thresholds."""
        ours, theirs = (network.layers(step.x) for network in (step.student, step.teacher))
        return step.aux["prior"](ours, theirs)

    def loss(self, step):
        logits, terms = self.posterior.loss(step)
        if self.gamma:
            terms = terms | {"loss": terms["loss"] + self.gamma * self.represent(step)[0]}
        return logits, terms


class Group(NamedTuple):
    """Neighbouring layers of a teacher's stage, and the student's layer that learns from them.

    Layers are counted from 0 within their stage.
    """

    stage: int
    student: int
    teacher: range


class Aggregation(InFloat32):
    """Adapters from a student's layers to groups of its teacher's, and a threshold for each.

    Args:
        ours, theirs: features of both networks, as ``Staged.layers`` gives them.
        settings: n, gain, threshold and pull.

    Attributes:
        thresholds: ``[groups]``, NaN until the first batch; None without thresholds.
    """

    def __init__(self, ours: list[list[Tensor]], theirs: list[list[Tensor]], settings: KR):
        super().__init__()
        self.settings = settings
        self.groups = pair_layers(shapes_of(ours), shapes_of(theirs), settings.n)
        self.adapters = nn.ModuleList(
            adapter(ours[g.stage][g.student], theirs[g.stage][g.teacher[0]]) for g in self.groups
        )
        start = torch.full((len(self.groups),), torch.nan)
        self.thresholds = thresholds_of(settings.threshold, start)

    def forward(self, ours: list[list[Tensor]], theirs: list[list[Tensor]]):
        """The sum of penalty and pull over all groups; the share of residuals beyond thresholds."""
        groups = []
        for group, adapt in zip(self.groups, self.adapters, strict=True):
            layers = torch.stack([theirs[group.stage][layer] for layer in group.teacher]).detach()
            residuals = adapt(ours[group.stage][group.student]) - layers
            groups.append((residuals, losses.aggregation_weights(layers)))
        total, beyond = 0.0, []
        thresholds, pulls = self._thresholds(groups)
        for (residuals, weights), threshold, pull in zip(groups, thresholds, pulls, strict=True):
            penalty = losses.recoding(residuals, threshold, self.settings.gain, weights)
            total = total + penalty + pull
            beyond.append((residuals.detach().abs() > threshold).float().mean())
        return total, torch.stack(beyond).mean()

    def _thresholds(self, groups: list[tuple[Tensor, Tensor]]):
        """The groups' thresholds, and the terms that pull them to the residuals' mean magnitude."""
        if self.thresholds is None:
            return [[0.0] * len(groups)] * 2
        means = torch.stack([w @ r.detach().abs().flatten(1).mean(1) for r, w in groups])
        with torch.no_grad():  # decided on the device, so that the step can be captured
            self.thresholds.copy_(torch.where(self.thresholds.isnan(), means, self.thresholds))
        pull = self.settings.pull if self.settings.threshold == "learned" else 0.0
        pulls = pull * (self.thresholds - means).square()
        return self.thresholds.clamp(min=0).unbind(), pulls.unbind()


def thresholds_of(kind: str, start: Tensor) -> nn.Parameter | nn.Buffer | None:
    """The ``thresholds`` of a module; one of the kinds of ``THRESHOLDS``."""
    kinds = {"learned": nn.Parameter, "fixed": nn.Buffer}
    return kinds[kind](start) if kind in kinds else None


def shapes_of(features: list[list[Tensor]]) -> list[list[torch.Size]]:
    return [[feature.shape[1:] for feature in layers] for layers in features]


def pair_layers(ours: list[list], theirs: list[list], n: int) -> list[Group]:
    """Groups of up to n neighbouring layers of the teacher, each with a layer of the student.

    Stages of the same number form a pair, without the stems. The layers of a group have one shape.
    A stage has as many groups as the student has layers there, or more if n or shapes need more.
    Groups belong to the student's layers in order, the last group to the last layer.

    Args:
        ours, theirs: shapes of layers, by stage, those of the stem first.
    """
    groups = []
    for stage, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if stage == 0:
            continue
        several = [part for block in _alike(other) for part in _split(block, n, len(own))]
        for k, layers in enumerate(several):
            groups.append(Group(stage, -(-(k + 1) * len(own) // len(several)) - 1, layers))
    return groups


def _alike(shapes: list) -> list[range]:
    """Ranges of neighbouring layers with one shape."""
    borders = [k for k in range(1, len(shapes)) if shapes[k] != shapes[k - 1]]
    return [range(a, b) for a, b in pairwise([0, *borders, len(shapes)])]


def _split(layers: range, n: int, students: int) -> list[range]:
    """``students`` parts, or more if a part would have over n layers; longer parts first."""
    count = max(min(students, len(layers)), -(-len(layers) // n))
    borders = [layers.start + -(-k * len(layers) // count) for k in range(count + 1)]
    return [range(a, b) for a, b in pairwise(borders)]
