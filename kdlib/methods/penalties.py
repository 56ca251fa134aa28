"""Penalties on a network that learns from logits: L1, L2, sparse recoding of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from kdlib.methods.distill import KD, Wrapper
from kdlib.models.precision import AutocastNetwork, InFloat32
from kdlib.runs import CrossEntropy, Curve

PENALTIES = ("none", "l1", "l2", "sparse")


@dataclass(frozen=True, kw_only=True)
class Penalised(Wrapper):
    """CE or KD with a penalty on the weights of convolutions and linear layers (KR Figures 4, 5).

    ``l1`` and ``l2`` add weight·Σ|w| and weight/2·Σw² to the loss. ``sparse`` is this project's
    reconstruction of the sparse recoding penalty, which "penalizes the gradients directly": every
    gradient g of a weight becomes ∇ρ(g), which is gain·g where |g| > t, else 0. Each layer has its
    own threshold t. It starts at the mean magnitude of the layer's first gradient, and then
    minimises mean ρ(g) + pull·(t - mean|g|)² by gradient descent.

    The record keeps a curve of the loss of ``base``, without the penalty: ``bins`` means over
    ``every`` steps each, with the name ``ce`` for CE and ``base`` for KD.

    Attributes:
        base: what the network learns from, CrossEntropy or KD.

    Raises ValueError for an unknown penalty, a number below 0, a curve without bins or steps, and
    another base.
    """

    base: CrossEntropy | KD = CrossEntropy()

    penalty: str = "none"
    weight: float = 1e-4
    gain: float = 2.0
    pull: float = 1.0
    bins: int = 200
    every: int = 100
    reads_gradients = True

    def __post_init__(self):
        if min(self.bins, self.every) < 1:
            raise ValueError(f"bins and every must be at least 1: {self}.")
        if not min(self.weight, self.gain, self.pull) >= 0:
            raise ValueError(f"weight, gain and pull must be at least 0: {self}.")
        if self.penalty not in PENALTIES:
            raise ValueError(f"Unknown penalty {self.penalty!r}. Known: {', '.join(PENALTIES)}.")
        if not isinstance(self.base, CrossEntropy | KD):
            raise ValueError(f"The base is CrossEntropy or KD, not {type(self.base).__name__}.")

    @property
    def inner(self):
        return self.base

    def teacher_at(self, epoch):
        return self.base.teacher_at(epoch)

    @property
    def curve(self):
        term = "ce" if isinstance(self.base, CrossEntropy) else "base"
        return Curve(term, self.every, self.bins)

    def aux_modules(self, student, teacher, x):
        return {"thresholds": Thresholds(len(weights_of(student)))} if self.is_sparse else {}

    @property
    def is_sparse(self) -> bool:
        return self.penalty == "sparse"

    def loss(self, step):
        weights = weights_of(step.student)
        if self.is_sparse:
            thresholds = step.aux["thresholds"].values
            recoded = {
                name: Recode.apply(weight, threshold, self.gain, self.pull)
                for (name, weight), threshold in zip(weights.items(), thresholds, strict=True)
            }
            step = step._replace(student=partial(step.student.with_weights, recoded))
        logits, terms = self.base.loss(step)
        terms[self.curve.term] = terms["loss"]
        match self.penalty:
            case "l1":
                penalty = self.weight * sum(weight.abs().sum() for weight in weights.values())
            case "l2":
                penalty = self.weight / 2 * sum(w.square().sum() for w in weights.values())
            case _:
                return logits, terms
        return logits, terms | {"loss": terms["loss"] + penalty, "penalty": penalty}


def weights_of(network: nn.Module | AutocastNetwork) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers by name, without biases and batch norm."""
    return {name: p for name, p in network.named_parameters() if p.ndim > 1}


class Thresholds(InFloat32):
    """One threshold for each layer, NaN until the layer's first gradient."""

    def __init__(self, count: int):
        super().__init__()
        self.values = nn.Parameter(torch.full((count,), torch.nan))


class Recode(torch.autograd.Function):
    """The identity on a weight, whose gradient g becomes ∇ρ(g); see ``Penalised``."""

    @staticmethod
    def forward(ctx, weight, threshold, gain, pull):
        ctx.threshold, ctx.gain, ctx.pull = threshold, gain, pull
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        size = gradient.abs()
        mean = size.mean()
        # Decided on the device, so that the step can be captured.
        threshold = torch.where(ctx.threshold.isnan(), mean, ctx.threshold).clamp(min=0)
        ctx.threshold.data.copy_(threshold)
        beyond = size > threshold
        slope = 2 * ctx.pull * (threshold - mean) - ctx.gain * threshold * beyond.float().mean()
        return ctx.gain * gradient * beyond, slope, None, None
