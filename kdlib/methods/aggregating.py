"""KR in a second reading: an aggregate that is trained itself, and a penalty on the student alone.

As ``representing``, it is the project's reconstruction from the prose (docs/decisions.md, KR-s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.penalties import weights_of
from kdlib.methods.representing import Group, Representing, pair_layers, shapes_of, thresholds_of
from kdlib.models.precision import InFloat32
from kdlib.models.staged import adapter, batch_norm, conv
from kdlib.runs import SGD


@dataclass(frozen=True, kw_only=True)
class AggregateKR(Representing):
    """Knowledge Representing with a trained aggregate: Eq. 9 trains it, Eq. 10 the student.

    For each group of up to n neighbouring layers of the teacher, F_A is what one new layer makes of
    the group's input. Every step begins with an update of the new layers alone, by the sum over
    groups of

        beta·Σ_l w_l·mean (F_A - F_l)²,

    w_l as in ``KR``. Then the student, its adapters A and the thresholds t learn from

        D + gamma·Σ (mean ρ(A(F_s) - F_A) + pull·(t - t_0)²),

    where F_A has no gradient, and ρ(u) is gain/2·u² where |u| > t, else 0. Every t starts at t_0,
    the mean magnitude of the student's first weights.
    """

    gamma: float = 1.0

    def aux_modules(self, student, teacher, x):
        ours, theirs = student.layers(x), teacher.layers(x)
        groups = pair_layers(shapes_of(ours), shapes_of(theirs), self.n)
        size = torch.cat([w.detach().abs().flatten() for w in weights_of(student).values()])
        return {
            "aggregate": Aggregate(theirs, groups),
            "prior": Recoding(ours, theirs, groups, size.mean(), self),
            **self.posterior.aux_modules(student, teacher, x),
        }

    def optimizers(self, modules):
        return {
            **self.posterior.optimizers(modules),
            "prior": SGD(self.prior, ("aggregate",)),
        }

    def extra_updates(self, step):
        theirs = step.teacher.layers(step.x)
        aggregate = step.aux["aggregate"]
        parts = [
            losses.aggregation(feature, torch.stack([theirs[g.stage][k] for k in g.teacher]))
            for feature, g in zip(aggregate(theirs), aggregate.groups, strict=True)
        ]
        yield "prior", {"prior": self.beta * sum(parts)}

    def loss(self, step):
        logits, terms = self.posterior.loss(step)
        features = [f.detach() for f in step.aux["aggregate"](step.teacher.layers(step.x))]
        penalty, beyond = step.aux["prior"](step.student.layers(step.x), features)
        total = terms["loss"] + self.gamma * penalty
        return logits, terms | {"loss": total, "recoding": penalty, "beyond": beyond}


class Aggregate(InFloat32):
    """F_A of every group, by one layer from the group's input: 3x3 convolution and batch norm.

    Pooling or a repetition of positions comes first where the group's features have another size.
    """

    def __init__(self, theirs: list[list[Tensor]], groups: list[Group]):
        super().__init__()
        self.groups = groups
        pairs = ((_input(theirs, g), theirs[g.stage][g.teacher[0]]) for g in groups)
        self.layers = nn.ModuleList(_layer(given, wanted) for given, wanted in pairs)

    def forward(self, theirs: list[list[Tensor]]) -> list[Tensor]:
        pairs = zip(self.layers, self.groups, strict=True)
        return [layer(_input(theirs, group).detach()) for layer, group in pairs]


class Recoding(InFloat32):
    """Adapters from a student's layers to aggregates, and a threshold for each group.

    Attributes:
        thresholds: ``[groups]``; None without thresholds.
    """

    def __init__(
        self,
        ours: list[list[Tensor]],
        theirs: list[list[Tensor]],
        groups: list[Group],
        start: Tensor,
        settings: Representing,
    ):
        super().__init__()
        self.groups, self.settings = groups, settings
        self.adapters = nn.ModuleList(
            adapter(ours[g.stage][g.student], theirs[g.stage][g.teacher[0]]) for g in groups
        )
        self.register_buffer("start", start.clone())
        self.thresholds = thresholds_of(settings.threshold, start.repeat(len(groups)))

    def forward(self, ours: list[list[Tensor]], aggregates: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of penalty and pull over all groups; the share of residuals beyond thresholds."""
        thresholds, total, beyond = [0.0] * len(self.groups), 0.0, []
        if self.thresholds is not None:
            thresholds = self.thresholds.clamp(min=0).unbind()
            total = self.settings.pull * (self.thresholds - self.start).square().sum()
        parts = zip(self.groups, self.adapters, aggregates, thresholds, strict=True)
        for group, adapt, feature, t in parts:
            residual = adapt(ours[group.stage][group.student]) - feature
            total = total + losses.gated_recoding(residual, t, self.settings.gain, self.start)
            beyond.append((residual.detach().abs() > t).float().mean())
        return total, torch.stack(beyond).mean()


def _input(theirs: list[list[Tensor]], group: Group) -> Tensor:
    """The feature that enters the first layer of a group."""
    first = group.teacher[0]
    return theirs[group.stage][first - 1] if first else theirs[group.stage - 1][-1]


def _layer(given: Tensor, wanted: Tensor) -> nn.Sequential:
    size, channels = wanted.shape[2:], wanted.shape[1]
    resize = [] if given.shape[2:] == size else [nn.AdaptiveAvgPool2d(size)]
    return nn.Sequential(*resize, conv(given.shape[1], channels, 3), batch_norm(channels))
