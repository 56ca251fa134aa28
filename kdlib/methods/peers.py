"""Peers: networks that train in the steps of the student: DML, Rocket Launching, KDGAN."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import FromTeacher
from kdlib.models import build_model
from kdlib.models.names import check_model
from kdlib.models.staged import PoolAndClassify
from kdlib.runs import SGD, Method, Recipe


@dataclass(frozen=True)
class WithPeer(Method):
    """A peer network learns from the same images, with an optimizer of its own.

    Attributes:
        peer: name of its network, for ``build_model``.
        recipe: its rate and schedule; epochs and batch are those of the student.
    """

    peer: str
    recipe: Recipe

    def __post_init__(self):
        check_model(self.peer)

    def aux_modules(self, student, teacher, x):
        classes = student(x).shape[1]
        return {"peer": build_model(self.peer, classes, channels=x.shape[1])}

    def optimizers(self, modules):
        return {"peer": SGD(self.recipe, ("peer",))}


@dataclass(frozen=True)
class RocketLaunching(WithPeer):
    """The student learns from a peer that is in training as well (Zhou et al. 2018, RCO §4.4).

    The peer learns from the labels alone. The student learns by CE + kd_weight·T²·KL to the peer's
    logits of the same step, without a gradient to the peer. This is RCO with the smallest
    interval between anchors: one iteration. The networks share no layers (decision RCO-j).
    """

    temperature: float = 5.0
    kd_weight: float = 1.0

    def loss(self, step):
        logits, peer = step.student(step.x), step.aux["peer"](step.x)
        ce, peer_ce = (F.cross_entropy(z, step.labels) for z in (logits, peer))
        kd = losses.kd(logits, peer, self.temperature)
        # One sum is enough: the networks share no parameter, so each gets only its own gradient.
        loss = ce + self.kd_weight * kd + peer_ce
        return logits, {"loss": loss, "ce": ce, "kd": kd, "peer_ce": peer_ce}


@dataclass(frozen=True)
class MutualLearning(WithPeer):
    """DML: each learns from CE + kd_weight·KL(the other ‖ itself) at T = 1 (Zhang et al. 2018)."""

    kd_weight: float = 1.0

    def loss(self, step):
        logits, peer = step.student(step.x), step.aux["peer"](step.x)
        ce, peer_ce = (F.cross_entropy(z, step.labels) for z in (logits, peer))
        kd = losses.kd(logits, peer, temperature=1)
        peer_kd = losses.kd(peer, logits, temperature=1)
        terms = {"ce": ce, "kd": kd, "peer_ce": peer_ce, "peer_kd": peer_kd}
        loss = ce + self.kd_weight * kd + peer_ce + self.kd_weight * peer_kd
        return logits, {"loss": loss, **terms}


@dataclass(frozen=True, kw_only=True)
class KDGAN(FromTeacher):
    """Student and teacher learn from each other, against a discriminator (Wang et al. 2018).

    The discriminator D separates an image's true label y from labels z that are sampled from the
    student and the teacher:

        max_D  E log D(x, y) + share·E log(1 - D(x, z_s)) + (1 - share)·E log(1 - D(x, z_t)).

    Student and teacher minimise the same terms. The student minimises also
    kd_weight·T²·KL(teacher ‖ student), the teacher back_weight·T²·KL(student ‖ teacher). Samples
    are relaxed (``losses.concrete``). A copy of the teacher takes part, so that the teacher's run
    does not change. All three networks are updated in one step.

    Attributes:
        discriminator, copy: their rates and schedules; epochs and batch are those of the student.
        relaxation: τ of the samples.
        temperature: T.

    Raises ValueError for a share outside [0, 1], a weight below 0, and a τ or T of 0 or less.
    """

    discriminator: Recipe
    copy: Recipe
    share: float = 0.5
    kd_weight: float = 1.0
    back_weight: float = 0.1
    temperature: float = 3.0
    relaxation: float = 1.0
    needs_logits = False
    needs_teacher = True
    runs_teacher = False  # only its copy runs

    def __post_init__(self):
        super().__post_init__()
        weights, divisors = (self.kd_weight, self.back_weight), (self.temperature, self.relaxation)
        if not (0 <= self.share <= 1 and min(weights) >= 0 and min(divisors) > 0):
            raise ValueError(f"A number of KDGAN is outside its range (see help(KDGAN)): {self}.")

    def aux_modules(self, student, teacher, x):
        copy = deepcopy(teacher).requires_grad_(True)
        judge = build_discriminator(x.shape[1], classes=teacher(x).shape[1])
        return {"teacher": copy, "discriminator": judge}

    def optimizers(self, modules):
        recipes = {"teacher": self.copy, "discriminator": self.discriminator}
        return {name: SGD(recipe, (name,)) for name, recipe in recipes.items()}

    def epoch_inputs(self, epoch, generator, steps, batch, classes):
        uniform = torch.rand(steps, batch, 2, classes, generator=generator)
        return {"uniform": uniform.clamp_(2**-24, 1 - 2**-24)}

    def loss(self, step):
        logits, taught = step.student(step.x), step.aux["teacher"](step.x)
        scores = step.aux["discriminator"](step.x)
        samples = [
            losses.concrete(z, step.inputs["uniform"][:, k], self.relaxation)
            for k, z in enumerate((logits, taught))
        ]
        terms = {
            # One sum is enough: no term gives a gradient to another network than its own.
            "adversarial": self.share * _recognised(samples[0], scores.detach()),
            "kd": self.kd_weight * losses.kd(logits, taught, self.temperature),
            "teacher_adversarial": (1 - self.share) * _recognised(samples[1], scores.detach()),
            "teacher_kd": self.back_weight * losses.kd(taught, logits, self.temperature),
            "discriminator": self.discriminate(scores, step.labels, samples),
        }
        return logits, {"loss": sum(terms.values()), **terms}

    def discriminate(self, scores: Tensor, labels: Tensor, samples: list[Tensor]) -> Tensor:
        """The discriminator's loss, given its score ``[b, classes]`` of every label."""
        real = F.logsigmoid(scores.gather(1, labels[:, None])).mean()
        ours, theirs = (_recognised(sample.detach(), scores) for sample in samples)
        return -(real + self.share * ours + (1 - self.share) * theirs)


def _recognised(sample: Tensor, scores: Tensor) -> Tensor:
    """E log(1 - D(x, z)): the log-probability that D recognises samples ``[b, classes]``."""
    return F.logsigmoid(-(sample * scores).sum(1)).mean()


def build_discriminator(channels: int, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions of stride 2, with 32, 64 and 128 channels; a score for each label.

    With leaky ReLU, without batch norm.
    """
    layers = []
    for inputs, outputs in pairwise((channels, 32, 64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, PoolAndClassify(128, classes))
