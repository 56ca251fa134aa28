"""Search for a student inside the teacher: proximal gradient closes gates on its channels."""

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
from kdlib.models.channels import Channels, Masks, close_in_order, read_channels
from kdlib.models.names import builder
from kdlib.models.precision import AutocastNetwork, InFloat32
from kdlib.models.staged import Staged

TARGETS = ("soft", "output", "truth")
HOLDS = {"distance": Tensor.abs, "hinge": F.relu}
# An epoch is watched step by step if this many times the penalty alone would reach the budget.
REACH = 2


@dataclass(frozen=True, kw_only=True)
class GateSearch(FromTeacher):
    """Minimise weight·C(gated(x), target) + strength·Σ α_j|g_j| until a budget is reached.

    Search for Better Students, Eq. 3 to 5. The student starts as the teacher (``Run.start``), with
    a gate of 1 on every input channel of a gated layer. The run's recipe updates the weights,
    accelerated proximal gradient the gates, both from one backward pass.

    Attributes:
        budget: a share of the teacher's multiply-accumulates. The run ends as soon as the network
            of the open gates costs no more than this.
        strength: λ₂.
        weight: factor of the first term; the effect of λ₂ depends on it.
        weighted: α_j is the saving of gate j over the mean saving; else α_j is 1.
        target: ``soft``, the teacher's softmax at ``temperature``, by T²·KL (the paper's choice);
            ``output``, the teacher's softmax at T = 1, by cross-entropy (the paper's "network
            pruning"); ``truth``, the true label (the usual meaning of network pruning).
        held_at: ε: with ``soft``, the divergence is driven to this value instead of to 0.
        held_by: ``distance``, |divergence - ε|; ``hinge``, max(divergence - ε, 0).
        rate, momentum: η and μ of the gates' updates.

    Raises ValueError for an unknown target, ``held_at`` without ``soft``, a number outside its
    range, a run that does not start as the teacher, and a network without gates.
    """

    budget: float
    strength: float = 1e-3
    weight: float = 1.0
    weighted: bool = True
    target: str = "soft"
    temperature: float = 4.0
    held_at: float = 0.0
    held_by: str = "distance"
    rate: float = 0.01
    momentum: float = 0.9
    standalone = False

    def __post_init__(self):
        super().__post_init__()
        if self.target not in TARGETS:
            raise ValueError(f"Unknown target {self.target!r}. Known: {', '.join(TARGETS)}.")
        if self.held_by not in HOLDS:
            raise ValueError(f"Unknown held_by {self.held_by!r}. Known: {', '.join(HOLDS)}.")
        if not 0 < self.budget < 1:
            raise ValueError(
                f"budget={self.budget}: give a share of the teacher's cost, between 0 and 1."
            )
        if (
            min(self.strength, self.weight, self.rate, self.held_at) < 0
            or not 0 <= self.momentum < 1
        ):
            raise ValueError(f"A search needs a momentum below 1 and no number below 0: {self}.")
        if self.held_at and self.target != "soft":
            raise ValueError(f"held_at needs the target soft, not {self.target!r}.")

    @property
    def needs_logits(self):
        return self.target != "truth"

    def check(self, run):
        if run.start != self.teacher or self.teacher_epoch != self.teacher.recipe.epochs:
            raise ValueError(
                f"A search starts as its teacher: set start={self.teacher} of the run."
            )
        _refuse_without_gates(run.model)

    def aux_modules(self, student, teacher, x):
        return {"gates": Gates(Channels(student, x.shape[-1]), self.weighted)}

    def optimizers(self, modules):
        gates = modules["gates"]
        threshold = self.rate * self.strength * gates.alpha
        settings = {"lr": self.rate, "momentum": self.momentum}
        settings |= {"keep_one": gates.channels.keep_one, "before": gates.before}
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
        """The first term of Eq. 3 or Eq. 5; the proximal step minimises the term ``sparsity``."""
        match self.target:
            case "soft":
                kd = losses.kd(logits, teacher_logits, self.temperature)
                held = HOLDS[self.held_by](kd - self.held_at) if self.held_at else kd
                return {"loss": held, "kd": kd}
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
        # the decrease of each gate by the penalty alone, in so many steps
        closing = within * self.rate * self.strength / (1 - self.momentum) * gates.alpha
        return gates.share(above=REACH * closing) <= self.budget


@lru_cache
def _refuse_without_gates(model: str) -> None:
    if MARK in model:
        raise ValueError(f"{model} is the result of a search. Search in the whole network instead.")
    with torch.device("meta"):
        read_channels(builder(model)(classes=2, channels=1))


class Gates(InFloat32):
    """A gate on every input channel of a gated layer, at first 1.

    A gate multiplies the weights that read its channel, which has the same effect as to multiply
    the channel. A layer whose gates are all closed has no inputs. The gates of the channels that it
    computes count as closed too, so that extraction changes no logit. Such a layer has no gradient,
    and stays closed.

    Attributes:
        values: the gates ``[m]``, layer by layer.
        before: the gates before the last step.
        alpha: α ``[m]``, their weights in the penalty; their mean is 1.
    """

    def __init__(self, channels: Channels, weighted: bool = True):
        super().__init__()
        self.channels = channels
        count = sum(channels.sizes)
        savings = channels.savings() if weighted else np.ones(count)
        self.values = nn.Parameter(torch.ones(count))
        self.register_buffer("before", torch.ones(count))
        alpha = torch.tensor(savings / savings.mean(), dtype=torch.float32)
        self.register_buffer("alpha", alpha, persistent=False)
        # Layer 0 stands for the image and for all sums, which no gate closes.
        numbers = {None: 0} | {r.name: k for k, r in enumerate(channels.readers, 1)}
        order = self.order = sorted(channels.readers, key=lambda reader: not reader.gated)
        inputs = [(numbers[r.name], numbers[c.source], c.channels) for r in order for c in r.inputs]
        layers, sources, repeats = torch.tensor(inputs).T
        places = (layers * len(numbers) + sources).repeat_interleave(repeats)
        # Above 0 where the layer of the row reads the layer of the column through no gate.
        reads = torch.eye(len(numbers)).flatten().index_fill(0, places[count:], 1)
        self.register_buffer("reads", reads.view(len(numbers), -1), persistent=False)
        self.register_buffer("places", places[:count], persistent=False)
        self.register_buffer("sources", sources.repeat_interleave(repeats), persistent=False)

    def forward(self, network: Staged | AutocastNetwork) -> dict[str, Tensor]:
        """The weights of the gated network that differ from the network's own, by name."""
        mask, others = self._mask().tensor_split([len(self.values)])
        # Not masked by the gate itself: a closed gate still has a gradient, and may open again.
        gates = [*(self.values * mask).split(self.channels.sizes)]
        gates += others.split([reader.channels for reader in self.order if not reader.gated])
        scaled = {}
        for reader, gate in zip(self.order, gates, strict=True):
            layer = network.get_submodule(reader.name)
            if isinstance(layer, nn.BatchNorm2d):  # of a block that may have no inputs
                scaled[f"{reader.name}.weight"] = layer.weight * gate
                scaled[f"{reader.name}.bias"] = layer.bias * gate
            else:
                shape = (1, -1, 1, 1)[: layer.weight.ndim]
                scaled[f"{reader.name}.weight"] = layer.weight * gate.view(shape)
        return scaled

    @torch.no_grad()
    def _mask(self) -> Tensor:
        """1 for each channel whose layer an open path connects to the image or to a sum, else 0.

        Squared often enough, the matrix of open connections between layers has all paths. To follow
        them layer by layer takes five operations for each layer.
        """
        is_open = (self.values > 0).to(self.reads.dtype)
        paths = self.reads.flatten().index_add(0, self.places, is_open).view_as(self.reads)
        for _ in range(len(paths).bit_length()):
            paths = (paths @ paths).clamp(max=1)
        return paths[self.sources, 0]

    def kept(self, above: Tensor | float = 0.0) -> Masks:
        """The channels that remain if gates above this value, or these values ``[m]``, are open."""
        is_open = (self.values.detach() > above).cpu().numpy()
        return self.channels.remaining(self.channels.split(is_open))

    @torch.no_grad()
    def reopen(self, macs: int) -> None:
        """Open gates that the last step closed, the largest first, as many as this cost allows.

        One step can close many gates. A gate gets the value that it had before the step.
        """
        closed = (self.before > 0) & (self.values <= 0)
        last = closed.nonzero()[:, 0]
        order = last[self.before[last].argsort(stable=True)].cpu().numpy()
        is_open = close_in_order(self.channels, (self.values > 0).cpu().numpy(), order, macs)
        again = closed & torch.from_numpy(is_open).to(closed.device)
        self.values.copy_(torch.where(again, self.before, self.values))

    def macs(self, above: Tensor | float = 0.0) -> int:
        """Multiply-accumulates of the network that ``kept`` describes."""
        return self.channels.macs(self.kept(above))

    def share(self, above: Tensor | float = 0.0) -> float:
        """The same as a share of the whole network's."""
        return self.macs(above) / self.channels.total_macs


class AcceleratedProximal(torch.optim.Optimizer):
    """Accelerated proximal gradient in its momentum form, for parameters that stay at least 0.

    z = g - η∇;  v ← S(z) - g + μv;  g ← max(0, S(z) + μv), where S(z) = sign(z)·max(|z| - a, 0)
    (Huang & Wang 2018, whose update Search for Better Students takes as its Eq. 4).

    Args:
        threshold: a, that is η·λ₂·α, of the parameters' shape.
        lr: η, which never falls.
        momentum: μ.
        keep_one: ranges of parameters in which at least one must stay open, or the network would be
            cut in two. If all would close, the largest keeps its value.
        before: a tensor of the parameters' shape that gets their values before each step.
    """

    # The scaler of half precision passes scale and overflow as tensors: the host does not wait.
    _step_supports_amp_scaling = True

    def __init__(
        self, parameters, threshold: Tensor, lr=0.01, momentum=0.9, keep_one=(), before=None
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self.threshold, self.keep_one, self.before = threshold, keep_one, before

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
                for begin, end in self.keep_one:
                    _keep_largest(gate[begin:end], moved[begin:end])
                if overflow is not None:  # undo this step
                    velocity = torch.where(overflow > 0, state["momentum_buffer"], velocity)
                    moved = torch.where(overflow > 0, gate, moved)
                if self.before is not None:
                    self.before.copy_(gate)
                state["momentum_buffer"].copy_(velocity)
                gate.copy_(moved)


def _keep_largest(before: Tensor, after: Tensor) -> None:
    """If a step closed all of a range, restore the largest value from before."""
    place = before.argmax().unsqueeze(0)
    after.scatter_(0, place, torch.where(after.any(), after, before)[place])


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(x)·max(|x| - threshold, 0): the proximal operator of threshold·|x|."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)
