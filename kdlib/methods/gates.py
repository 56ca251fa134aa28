"""Search for a student inside the teacher: a gate on every channel, closed by proximal gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import FromTeacher
from kdlib.models.architecture import MARK
from kdlib.models.channels import Channels, Kept, read_channels
from kdlib.models.names import builder
from kdlib.models.precision import AutocastNetwork, InFloat32
from kdlib.models.staged import Staged

TARGETS = ("soft", "output", "truth")
# An epoch may be the search's last where the budget would be reached by summary all gates within
# so many times what the penalty alone takes of each in an epoch.
REACH = 2


@dataclass(frozen=True, kw_only=True)
class GateSearch(FromTeacher):
    """weight·C(gated(x), target) + strength·Σ α_j|g_j|, until what is open costs at most a budget.

    Search for Better Students, Eq. 3 to 5. The student starts as the teacher (``Run.start``) with a
    gate of 1 on every channel that a gated layer reads. Its weights move by the run's recipe, its
    gates by accelerated proximal gradient, in one backward pass.

    Attributes:
        budget: of the whole network's multiply-accumulates the share that the network to find may
            cost; the run ends as soon as the network that its open gates make costs no more.
        strength: λ₂.
        weight: of the first term, beside which λ₂ has its meaning.
        weighted: α_j is what summary gate j saves, over the mean of all; else 1.
        target: ``soft``, the teacher's softmax at ``temperature``, as T²·KL (the paper's);
            ``output``, its softmax at T = 1, as cross-entropy (its "network pruning"); ``truth``,
            the label of the data set (what is usually called so).
        held_at: ε: with ``soft``, the divergence is pushed to this value instead of to 0.
        rate, momentum: of the gates' updates, η and μ.

    Raises ValueError for an unknown target, ``held_at`` without ``soft``, a number out of its
    range, a run that does not start as the teacher, and a network that has no gates.
    """

    budget: float
    strength: float = 1e-3
    weight: float = 1.0
    weighted: bool = True
    target: str = "soft"
    temperature: float = 4.0
    held_at: float = 0.0
    rate: float = 0.01
    momentum: float = 0.9
    standalone = False

    def __post_init__(self):
        super().__post_init__()
        if self.target not in TARGETS:
            raise ValueError(f"There is no target {self.target!r}, but {', '.join(TARGETS)}.")
        if not 0 < self.budget < 1:
            raise ValueError(f"A budget is a share of the teacher's cost, not {self.budget}.")
        if (
            min(self.strength, self.weight, self.rate, self.held_at) < 0
            or not 0 <= self.momentum < 1
        ):
            raise ValueError(f"A search needs a momentum below 1, and nothing below 0: {self}.")
        if self.held_at and self.target != "soft":
            raise ValueError(f"Only a soft target is held at a divergence, not {self.target!r}.")

    @property
    def needs_logits(self):
        return self.target != "truth"

    def check(self, run):
        if run.start != self.teacher or self.teacher_epoch != self.teacher.recipe.epochs:
            raise ValueError(f"A search begins as its teacher: give {run} start={self.teacher}.")
        _refuse_without_gates(run.model)

    def aux_modules(self, student, teacher, x):
        return {"gates": Gates(Channels(student, x.shape[-1]), self.weighted)}

    def optimizers(self, modules):
        gates = modules["gates"]
        threshold = self.rate * self.strength * gates.alpha
        settings = {"lr": self.rate, "momentum": self.momentum, "necks": gates.channels.necks}
        return {"gates": AcceleratedProximal([gates.values], threshold, **settings)}

    def loss(self, step):
        gates = step.aux["gates"]
        logits = self.gated(step.student, gates, step.x)
        terms = self.imitate(logits, step.teacher_logits, step.labels)
        sparsity = self.strength * (gates.alpha * gates.values.detach()).sum()
        return logits, {**terms, "loss": self.weight * terms["loss"], "sparsity": sparsity}

    def gated(self, student: AutocastNetwork, gates: Gates, x: Tensor) -> Tensor:
        """Logits of the gated network."""
        return student.with_weights(gates(student), x)

    def imitate(
        self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The first term of Eq. 3, or of Eq. 5; ``sparsity`` is minimised by the proximal step."""
        match self.target:
            case "soft":
                kd = losses.kd(logits, teacher_logits, self.temperature)
                return {"loss": (kd - self.held_at).abs() if self.held_at else kd, "kd": kd}
            case "output":
                return {"loss": losses.imitation(logits, teacher_logits)}
            case "truth":
                return {"loss": F.cross_entropy(logits, labels)}

    def composites(self, student, teacher, aux):
        # the gated network is tested in the place of the student
        return {"student": partial(self.gated, student, aux["gates"])}

    def metrics(self, modules):
        gates = modules["gates"]
        open_gates = int((gates.values > 0).sum())
        return {"macs": gates.macs(), "macs_share": gates.share(), "open_gates": open_gates}

    def should_stop(self, modules, within=0):
        gates = modules["gates"]
        # what the penalty alone takes of each gate in so many steps
        closing = within * self.rate * self.strength / (1 - self.momentum) * gates.alpha
        return gates.share(above=REACH * closing) <= self.budget


@lru_cache
def _refuse_without_gates(model: str) -> None:
    if MARK in model:
        raise ValueError(f"{model} was found by a search itself: search in the whole network.")
    with torch.device("meta"):
        read_channels(builder(model)(classes=2, channels=1))


class Gates(InFloat32):
    """A gate on every channel that a gated layer reads, 1 at first.

    To multiply a channel is to multiply the weights that read it: a convolution of a gated image is
    the convolution by gated weights. The gate of a channel that a layer without inputs puts out
    counts as closed, so that what is closed can be taken out without a change. Such a layer has no
    gradient any more: it stays dead.

    Attributes:
        values: the gates ``[m]``, layer by layer.
        alpha: α ``[m]``, their weights in the penalty; their mean is 1.
    """

    def __init__(self, channels: Channels, weighted: bool = True):
        super().__init__()
        self.channels = channels
        count = sum(channels.sizes)
        savings = channels.savings() if weighted else np.ones(count)
        self.values = nn.Parameter(torch.ones(count))
        alpha = torch.tensor(savings / savings.mean(), dtype=torch.float32)
        self.register_buffer("alpha", alpha, persistent=False)
        # Of every reader, which layer each of its channels comes from: the last stands for none.
        numbers = {r.name: k for k, r in enumerate(channels.readers)} | {None: -1}
        sources = [numbers[c.source] for r in channels.readers for c in r.inputs]
        repeats = [c.channels for r in channels.readers for c in r.inputs]
        index = torch.tensor(sources).repeat_interleave(torch.tensor(repeats))
        self.register_buffer("sources", index % (len(numbers)), persistent=False)

    def forward(self, network: Staged | AutocastNetwork) -> dict[str, Tensor]:
        """The weights of the gated network that are not the network's own, by name."""
        scaled = {}
        for reader, gate in zip(self.channels.readers, self._effective(), strict=True):
            layer = network.get_submodule(reader.name)
            if isinstance(layer, nn.BatchNorm2d):  # of a block that may have no inputs
                scaled[f"{reader.name}.weight"] = layer.weight * gate
                scaled[f"{reader.name}.bias"] = layer.bias * gate
            else:
                shape = (1, -1, 1, 1)[: layer.weight.ndim]
                scaled[f"{reader.name}.weight"] = layer.weight * gate.view(shape)
        return scaled

    def _effective(self) -> list[Tensor]:
        """What each reader's channels are multiplied by."""
        readers = self.channels.readers
        gates = iter(self.values.split(self.channels.sizes))
        gates = [next(gates) if reader.gated else None for reader in readers]
        with torch.no_grad():
            lives = torch.ones(len(readers) + 1, dtype=torch.bool, device=self.values.device)
            sources = self.sources.split([reader.channels for reader in readers])
            masks = []
            for k, (gate, source) in enumerate(zip(gates, sources, strict=True)):
                masks.append(lives[source])
                lives[k] = (masks[k] if gate is None else masks[k] & (gate > 0)).any()
        # Not by the gate's own sign: a closed one still has a slope, and may open again.
        return [
            mask.float() if gate is None else gate * mask
            for gate, mask in zip(gates, masks, strict=True)
        ]

    def kept(self, above: Tensor | float = 0.0) -> Kept:
        """The channels that stay where the gates above a value, or values ``[m]``, are open."""
        is_open = (self.values.detach() > above).cpu().numpy()
        return self.channels.settle(self.channels.split(is_open))

    def macs(self, above: Tensor | float = 0.0) -> int:
        """Multiply-accumulates of the network that would be extracted."""
        return self.channels.macs(self.kept(above))

    def share(self, above: Tensor | float = 0.0) -> float:
        """The same over those of the whole network."""
        return self.macs(above) / self.channels.whole


class AcceleratedProximal(torch.optim.Optimizer):
    """Accelerated proximal gradient in its momentum form, for parameters that stay at least 0.

    z = g - η∇;  v ← S(z) - g + μv;  g ← max(0, S(z) + μv), where S(z) = sign(z)·max(|z| - a, 0)
    (Huang & Wang 2018, whose update Search for Better Students takes as its Eq. 4).

    Args:
        threshold: a, that is η·λ₂·α, of the parameters' shape.
        lr: η, which never falls.
        momentum: μ.
        necks: ranges of which the largest value stays as it is where all would vanish: without any
            the network would be cut in two.
    """

    # Told of half precision's scale and overflow by tensors: no host sync in a step.
    _step_supports_amp_scaling = True

    def __init__(self, parameters, threshold: Tensor, lr=0.01, momentum=0.9, necks=()):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.threshold, self.necks = threshold, necks

    @torch.no_grad()
    def step(self, closure=None):
        scale, overflow = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        for group in self.param_groups:
            for gate in group["params"]:
                state = self.state[gate]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gate)
                gradient = gate.grad if scale is None else gate.grad / scale
                shrunk = soft_threshold(gate - group["lr"] * gradient, self.threshold)
                momentum = group["momentum"] * state["momentum_buffer"]
                velocity = shrunk - gate + momentum
                moved = (shrunk + group["momentum"] * velocity).clamp(min=0)
                for begin, end in self.necks:
                    _keep_largest(gate[begin:end], moved[begin:end])
                if overflow is not None:  # as if this step had not been
                    velocity = torch.where(overflow > 0, state["momentum_buffer"], velocity)
                    moved = torch.where(overflow > 0, gate, moved)
                state["momentum_buffer"].copy_(velocity)
                gate.copy_(moved)


def _keep_largest(before: Tensor, after: Tensor) -> None:
    """Where nothing is left after a step, put back the largest of before."""
    place = before.argmax().unsqueeze(0)
    after.scatter_(0, place, torch.where(after.any(), after, before)[place])


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(x)·max(|x| - threshold, 0): the proximal operator of threshold·|x|."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)
