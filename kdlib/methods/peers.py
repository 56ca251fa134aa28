"""Peers: networks that learn beside the student, in the same steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F

from kdlib import losses
from kdlib.methods.distill import Method
from kdlib.models import build_model
from kdlib.models.names import builder

if TYPE_CHECKING:
    from kdlib.runs import Recipe


@dataclass(frozen=True)
class WithPeer(Method):
    """A peer of another architecture sees the same images and takes its own steps.

    Attributes:
        peer: name of its network, for ``build_model``.
        recipe: its rate and schedule; epochs and batch are the student's.
    """

    peer: str
    recipe: Recipe

    def __post_init__(self):
        builder(self.peer)  # an unknown name is refused here, not after hours

    def parts(self, student, teacher, x):
        classes = student(x).shape[1]
        return {"peer": build_model(self.peer, classes, channels=x.shape[1])}

    def recipes(self):
        return {"peer": self.recipe}


@dataclass(frozen=True)
class RocketLaunching(WithPeer):
    """The student follows a teacher that is only learning itself (Zhou et al. 2018, RCO §4.4).

    The peer learns from the labels alone; the student from CE + weight·T²·KL to the peer's logits
    of this very step, which get no gradient. RCO's smallest M_gap: one iteration. No layers are
    shared (docs/decisions.md, RCO-j).
    """

    temperature: float = 5.0
    kd_weight: float = 1.0

    def loss(self, step):
        logits, peer = step.student(step.x), step.parts["peer"](step.x)
        ce, peer_ce = (F.cross_entropy(z, step.labels) for z in (logits, peer))
        kd = losses.kd(logits, peer, self.temperature)
        # One sum: the two share no parameter, so that each gets its own gradient.
        loss = ce + self.kd_weight * kd + peer_ce
        return logits, {"loss": loss, "ce": ce, "kd": kd, "peer_ce": peer_ce}


@dataclass(frozen=True)
class MutualLearning(WithPeer):
    """DML: each learns from CE + KL(the other ‖ itself) at T = 1 (Zhang et al. 2018)."""

    def loss(self, step):
        logits, peer = step.student(step.x), step.parts["peer"](step.x)
        ce, peer_ce = (F.cross_entropy(z, step.labels) for z in (logits, peer))
        kd = losses.kd(logits, peer, temperature=1)
        peer_kd = losses.kd(peer, logits, temperature=1)
        terms = {"ce": ce, "kd": kd, "peer_ce": peer_ce, "peer_kd": peer_kd}
        return logits, {"loss": sum(terms.values()), **terms}
