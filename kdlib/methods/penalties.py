"""Penalties on a network that learns from labels: L1, L2, and sparse recoding of its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.methods.distill import Method

PENALTIES = ("none", "l1", "l2", "sparse")


@dataclass(frozen=True, kw_only=True)
class Penalised(Method):
    """CE with a penalty on the weights of convolutions and linear layers (KR §4.1, Figures 4, 5).

    ``l1`` and ``l2`` add weight·Σ|w| and weight/2·Σw² to the loss. ``sparse`` is this project's
    reconstruction of the sparse recoding penalty, which "penalizes the gradients directly": every
    gradient g of a weight becomes ∇ρ(g), that is gain·g where |g| > t, else 0. Each layer has a
    threshold t of its own, which starts at the mean magnitude of its first gradient and then
    descends mean ρ(g) + pull·(t - mean|g|)².

    The label term is kept as a curve: its mean over each of ``bins`` times ``every`` steps.

    Raises ValueError for an unknown penalty, a number below 0, and a curve without bins or steps.
    """

    penalty: str = "none"
    weight: float = 1e-4
    gain: float = 2.0
    pull: float = 1.0
    bins: int = 200
    every: int = 100
    half = False

    def __post_init__(self):
        if min(self.bins, self.every) < 1:
            raise ValueError(f"A curve needs a bin and a step at least: {self}.")
        if not min(self.weight, self.gain, self.pull) >= 0:
            raise ValueError(f"No weight, gain or pull is below 0: {self}.")
        if self.penalty not in PENALTIES:
            raise ValueError(f"There is no penalty {self.penalty!r}, but {', '.join(PENALTIES)}.")

    def parts(self, student, teacher, x):
        parts: dict[str, nn.Module] = {"curve": Curve(self.bins, self.every)}
        if self.penalty == "sparse":
            parts["thresholds"] = Thresholds(len(weights_of(student)))
        return parts

    def loss(self, step):
        weights = weights_of(step.student.network)
        if self.penalty == "sparse":
            thresholds = step.parts["thresholds"].network.values
            recoded = {
                name: Recode.apply(weight, threshold, self.gain, self.pull)
                for (name, weight), threshold in zip(weights.items(), thresholds, strict=True)
            }
            logits = step.student.with_weights(recoded, step.x)
        else:
            logits = step.student(step.x)
        ce = F.cross_entropy(logits, step.labels)
        step.parts["curve"].network.add(ce.detach())
        match self.penalty:
            case "l1":
                penalty = self.weight * sum(weight.abs().sum() for weight in weights.values())
            case "l2":
                penalty = self.weight / 2 * sum(w.square().sum() for w in weights.values())
            case _:
                return logits, {"loss": ce, "ce": ce}
        return logits, {"loss": ce + penalty, "ce": ce, "penalty": penalty}


def weights_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers by name, without biases and batch norm."""
    return {name: p for name, p in network.named_parameters() if p.ndim > 1}


class Thresholds(nn.Module):
    """One threshold a layer, not a number until its first gradient."""

    def __init__(self, count: int):
        super().__init__()
        self.values = nn.Parameter(torch.full((count,), torch.nan))


class Recode(torch.autograd.Function):
    """A weight as it is; its gradient g as ∇ρ(g), and the threshold's as ``Penalised`` says."""

    @staticmethod
    def forward(ctx, weight, threshold, gain, pull):
        ctx.threshold, ctx.gain, ctx.pull = threshold, gain, pull
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        size = gradient.abs()
        mean = size.mean()
        # A tensor decides, not the host, so that the step can be captured.
        threshold = torch.where(ctx.threshold.isnan(), mean, ctx.threshold).clamp(min=0)
        ctx.threshold.data.copy_(threshold)
        beyond = size > threshold
        slope = 2 * ctx.pull * (threshold - mean) - ctx.gain * threshold * beyond.float().mean()
        return ctx.gain * gradient * beyond, slope, None, None


class Curve(nn.Module):
    """Sums of a loss over the steps of a run, ``every`` of them to a bin; later ones are dropped.

    Buffers, so that it is saved and resumed with the weights, and no step waits for the host.
    """

    def __init__(self, bins: int, every: int):
        super().__init__()
        self.every = every
        self.register_buffer("sums", torch.zeros(bins + 1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def add(self, value: Tensor) -> None:
        bin_ = (self.steps // self.every).clamp(max=len(self.sums) - 1)
        self.sums.index_add_(0, bin_, value.view(1))
        self.steps += 1
