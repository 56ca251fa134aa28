"""KR: the teacher's layers aggregated, a sparse recoding penalty, two optimizers in turn.

The paper's formulas are lost. What is written here is this project's reconstruction from the prose
(docs/decisions.md, KR-g to KR-j).
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
class KR(Wrapper, FromTeacher):
    """Knowledge Representing: the prior and the posterior knowledge of a teacher, in turn.

    Every step begins with an update by the prior, the sum over groups of

        beta·Σ_l w_l·mean ρ(A(F_s) - F_l),

    where a group is up to n neighbouring layers of the teacher, F_l their features, w_l their
    standard deviations over the sum of these, F_s the student's layer, A an adapter that is trained
    along, and ρ the sparse recoding penalty. Then follows an update by the posterior,
    D + gamma·(the same penalty). Each has an optimizer, a rate and a schedule of its own.

    Attributes:
        prior: rate and schedule of the first update; epochs and batch are the student's.
        posterior: D, what is learned from logits: CrossEntropy, KD, NST, KDGAN or another; by the
            checkpoint of ``at``, whatever its own says.
        n: 3; 4 on ImageNet.
        gain: a of ρ.
        threshold: t of ρ: ``learned``, of each group, from the mean |A(F_s) - F_l| of the first
            batch; ``fixed`` there; ``none``, which with ``gain`` 1 is KR-Dense.
        pull: t descends beta·(Σ_l w_l·mean ρ + pull·(t - mean |A(F_s) - F_l|)²); without the second
            term it would grow for ever. gamma moves no threshold.

    Raises ValueError for an unknown threshold, a number out of its range, and a posterior that
    learns from another teacher, wraps a method itself or is a search; TypeError for a broken n.
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
            raise ValueError(f"There is no threshold {self.threshold!r}, but {THRESHOLDS}.")
        object.__setattr__(self, "n", index(self.n))
        if self.n < 1 or not min(self.beta, self.gamma, self.gain, self.pull) >= 0:
            raise ValueError(f"KR needs groups of one layer at least, and nothing below 0: {self}.")
        if isinstance(self.posterior, Wrapper) or not self.posterior.standalone:
            raise ValueError(f"A posterior is a plain method, not {type(self.posterior).__name__}.")
        if isinstance(self.posterior, FromTeacher):
            if self.posterior.teacher != self.teacher:
                raise ValueError(
                    f"Prior and posterior are one teacher's: {self.teacher}, not "
                    f"{self.posterior.teacher}."
                )
            object.__setattr__(self, "posterior", replace(self.posterior, at=self.at))

    @property
    def inner(self):
        return self.posterior

    @property
    def needs_logits(self):
        return self.posterior.needs_logits and isinstance(self.posterior, FromTeacher)

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
        """The penalised distance from the teacher's layers, and the share beyond thresholds."""
        ours, theirs = (network.layers(step.x) for network in (step.student, step.teacher))
        return step.aux["prior"](ours, theirs)

    def loss(self, step):
        logits, terms = self.posterior.loss(step)
        if self.gamma:
            terms = terms | {"loss": terms["loss"] + self.gamma * self.represent(step)[0]}
        return logits, terms

    def metrics(self, modules):
        thresholds = modules["prior"].thresholds
        found = {} if thresholds is None else {"threshold": thresholds.mean().item()}
        return found | self.posterior.metrics(modules)


class Group(NamedTuple):
    """Neighbouring layers of a teacher's stage, and the student's layer that learns from them.

    Layers count from 0, within their stage.
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
        thresholds: ``[groups]``, not a number until the first batch; None without any.
    """

    def __init__(self, ours: list[list[Tensor]], theirs: list[list[Tensor]], settings: KR):
        super().__init__()
        self.settings = settings
        self.groups = pair_layers(_shapes(ours), _shapes(theirs), settings.n)
        self.adapters = nn.ModuleList(
            adapter(ours[g.stage][g.student], theirs[g.stage][g.teacher[0]]) for g in self.groups
        )
        start = torch.full((len(self.groups),), torch.nan)
        match settings.threshold:
            case "learned":
                self.thresholds = nn.Parameter(start)
            case "fixed":
                self.register_buffer("thresholds", start)
            case "none":
                self.thresholds = None

    def forward(self, ours: list[list[Tensor]], theirs: list[list[Tensor]]):
        """Sum over the groups of penalty and pull; to log, the share of residuals that count."""
        total, beyond = 0.0, []
        for k, (group, adapt) in enumerate(zip(self.groups, self.adapters, strict=True)):
            layers = torch.stack([theirs[group.stage][layer] for layer in group.teacher]).detach()
            residuals = adapt(ours[group.stage][group.student]) - layers
            weights = losses.aggregation_weights(layers)
            threshold, pulled = self._threshold(k, residuals, weights)
            penalty = losses.recoding(residuals, threshold, self.settings.gain, weights)
            total = total + penalty + pulled
            beyond.append((residuals.detach().abs() > threshold).float().mean())
        return total, torch.stack(beyond).mean()

    def _threshold(self, k: int, residuals: Tensor, weights: Tensor):
        """Of group k: its threshold, and how it is pulled to the mean magnitude of residuals."""
        if self.thresholds is None:
            return 0.0, 0.0
        mean = weights @ residuals.detach().abs().flatten(1).mean(1)
        with torch.no_grad():  # a tensor decides, not the host, so that the step can be captured
            start = torch.where(self.thresholds[k].isnan(), mean, self.thresholds[k])
            self.thresholds[k] = start
        pull = self.settings.pull if self.settings.threshold == "learned" else 0.0
        threshold = self.thresholds[k].clone()
        return threshold.clamp(min=0), pull * (threshold - mean).square()


def _shapes(features: list[list[Tensor]]) -> list[list[torch.Size]]:
    return [[feature.shape[1:] for feature in layers] for layers in features]


def pair_layers(ours: list[list], theirs: list[list], n: int) -> list[Group]:
    """Every stage of the teacher in groups of up to n neighbouring layers of one shape, each for a
    layer of the student: as many groups as it has layers there, or more where n or shapes want it.

    Stages pair by their number, as many as both networks have, without the stems. Groups go to the
    student's layers in order, the last to its last.

    Args:
        ours, theirs: shapes of layers, by stage, the stem's first.
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
    """Neighbours of one shape."""
    borders = [k for k in range(1, len(shapes)) if shapes[k] != shapes[k - 1]]
    return [range(a, b) for a, b in pairwise([0, *borders, len(shapes)])]


def _split(layers: range, n: int, students: int) -> list[range]:
    """As many parts as there are students, or more, so that none has more than n; longer first."""
    count = max(min(students, len(layers)), -(-len(layers) // n))
    borders = [layers.start + -(-k * len(layers) // count) for k in range(count + 1)]
    return [range(a, b) for a, b in pairwise(borders)]
