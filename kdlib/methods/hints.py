"""Learn from a teacher's features: hints (FitNet), attention maps (AT), factors (FT), flows (FSP),
selectivity (NST)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import FromTeacher, OnLogits
from kdlib.models.names import builder, count_stages
from kdlib.models.precision import AutocastNetwork
from kdlib.runs import Recipe, Run, Step


@dataclass(frozen=True, kw_only=True)
class OnFeatures(OnLogits):
    """Adds a weighted term of the stages' features. The teacher runs beside the student, and gives
    its logits as well."""

    needs_logits = False
    needs_teacher = True

    def term(
        self, ours: list[Tensor], theirs: list[Tensor], step: Step
    ) -> tuple[str, float, Tensor]:
        """Name, weight and value of the term, given ``features`` of both networks."""
        raise NotImplementedError

    def features(self, network: AutocastNetwork, x: Tensor) -> list[Tensor]:
        """What ``term`` is given of a network; the last is the last stage's feature."""
        return network.stages(x)

    def loss(self, step):
        ours, theirs = (self.features(n, step.x) for n in (step.student, step.teacher))
        logits = step.student.head(ours[-1])
        teacher_logits = step.teacher.head(theirs[-1]) if self.kd_weight else None
        terms = self.on_logits(logits, step.labels, teacher_logits)
        name, weight, term = self.term(ours, theirs, step)
        return logits, {**terms, "loss": terms["loss"] + weight * term, name: term}


@dataclass(frozen=True, kw_only=True)
class Hint(OnFeatures):
    """hint_weight·mean (f_s - f_t)² of two features (FitNet, Romero et al. 2015; RCO Eq. 2).

    Eq. 2 up to a constant: its sum over a feature's elements is a mean here, so that the weight
    means the same for every network. The larger map is average-pooled to the smaller; where
    channels differ, a 1x1 convolution that is trained along and dropped at inference maps the
    student's to the teacher's.

    FitNet's first stage is a run of it with ce_weight 0; its second starts from that (``start``).

    Attributes:
        stage: whose output is the hint, in both networks; None for their last.

    Raises ValueError for a stage that they do not have.
    """

    hint_weight: float = 1.0
    stage: int | None = None

    def check(self, run):
        common = min(count_stages(run.model), count_stages(self.teacher.model))
        if self.stage is not None and self.stage not in range(1, common + 1):
            raise ValueError(
                f"There is no stage {self.stage}: {run.model} and {self.teacher.model} have "
                f"{common} stages in common."
            )

    def aux_modules(self, student, teacher, x):
        ours, theirs = (self._hint(network.stages(x)).shape[1] for network in (student, teacher))
        return {} if ours == theirs else {"adapter": nn.Conv2d(ours, theirs, kernel_size=1)}

    def term(self, ours, theirs, step):
        adapter = step.aux.get("adapter", nn.Identity())
        pair = _to_one_size(adapter(self._hint(ours)), self._hint(theirs))
        return "hint", self.hint_weight, losses.hint(*pair)

    def _hint(self, features: list[Tensor]) -> Tensor:
        return features[-1 if self.stage is None else self.stage - 1]


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(OnFeatures):
    """AT: attention_weight·Σ over stages of mean (q_s - q_t)² (Zagoruyko & Komodakis 2017).

    q is an image's map of mean squared activations, L2-normalised. Stages pair by their number, as
    many as both networks have; the larger map is average-pooled to the smaller.

    Attributes:
        attention_weight: β, 1,000 in the authors' code for images of 32x32. For others it is
            multiplied by their pixels over 1,024: a mean over fewer positions of normalised maps
            is larger by so much.
    """

    attention_weight: float = 1000.0

    def term(self, ours, theirs, step):
        pairs = zip(ours, theirs, strict=False)
        attention = sum(losses.attention(*_to_one_size(*pair)) for pair in pairs)
        return "attention", self.attention_weight * step.x[0, 0].numel() / 1024, attention


@dataclass(frozen=True)
class Paraphrase(FromTeacher):
    """FT's first step: an autoencoder of the teacher's last features, by L1 (Kim et al. 2018).

    It learns beside a network that nothing moves; ``paraphrase`` makes that the teacher itself. The
    encoder, the paper's paraphraser, gives the teacher's factor. Three convolutions each way, leaky
    ReLU, no batch norm, as in the authors' code.

    Attributes:
        rate: k, the factor's channels over the feature's.
    """

    rate: float = 0.5
    needs_logits = False
    needs_teacher = True

    def aux_modules(self, student, teacher, x):
        channels = teacher.stages(x)[-1].shape[1]
        widths = (channels, channels, *[max(1, round(self.rate * channels))] * 2)
        decoder = _leaky(nn.ConvTranspose2d, reversed(widths))
        return {"encoder": _leaky(nn.Conv2d, widths), "decoder": decoder}

    def loss(self, step):
        *_, feature = step.teacher.stages(step.x)
        restored = step.aux["decoder"](step.aux["encoder"](feature))
        reconstruction = F.l1_loss(restored, feature)
        return step.teacher.head(feature), {"loss": reconstruction}


def paraphrase(teacher: Run, recipe: Recipe, rate: float = 0.5) -> Run:
    """The run that trains the paraphraser of a teacher, whose own weights it leaves alone."""
    method = Paraphrase(teacher, rate=rate)
    return replace(teacher, method=method, recipe=recipe, start=teacher, keep=(), save_logits=False)


@dataclass(frozen=True, kw_only=True)
class FactorTransfer(OnFeatures):
    """FT: factor_weight·mean |f_s - f_t| of factors, each L2-normalised (Kim et al. 2018).

    The teacher's factor is the paraphraser's, of its last stage; the student's comes from the stage
    of the same number, or its last, by a translator: three convolutions that are trained along and
    dropped at inference.

    Attributes:
        paraphraser: made by ``paraphrase``.
        factor_weight: β, 500 in the authors' code.

    Raises ValueError where the paraphraser is not one of this teacher and epoch.
    """

    paraphraser: Run
    factor_weight: float = 500.0

    def __post_init__(self):
        super().__post_init__()
        method = self.paraphraser.method
        if not isinstance(method, Paraphrase) or method.teacher_at(0) != self.teacher_at(0):
            raise ValueError(
                f"{self.paraphraser} is no paraphraser of epoch {self.teacher_epoch} of {self.teacher}: "
                f"paraphrase(teacher, recipe) makes one of its last."
            )

    def pretrained(self):
        return {"encoder": self.paraphraser}

    def aux_modules(self, student, teacher, x):
        features, (*_, taught) = student.stages(x), teacher.stages(x)
        ours = features[: len(teacher.body)][-1].shape[1]
        factor = max(1, round(self.paraphraser.method.rate * taught.shape[1]))
        return {"translator": _leaky(nn.Conv2d, (ours, ours, factor, factor))}

    def term(self, ours, theirs, step):
        factor = step.aux["translator"](ours[: len(theirs)][-1])
        taught = step.pretrained["encoder"](theirs[-1])
        return "factor", self.factor_weight, losses.factor(*_to_one_size(factor, taught))


@dataclass(frozen=True, kw_only=True)
class FSP(OnFeatures):
    """fsp_weight·Σ over stages of mean (G_s - G_t)² (flow of solution procedure, Yim et al. 2017).

    G holds the inner products of the channels that go into a stage with those that come out of it.
    Stages pair by their number, as many as both networks have. The authors train by this loss alone
    first, a run with ce_weight 0, and then by the labels alone (``start``).

    Raises ValueError where channels differ: G has a place for each pair of them.
    """

    fsp_weight: float = 1.0

    def check(self, run):
        ours, theirs = (_widths(model) for model in (run.model, self.teacher.model))
        if any(own != other for own, other in zip(ours, theirs, strict=False)):
            raise ValueError(
                f"FSP needs equal channels: the stem and the stages of {run.model} put out {ours}, "
                f"those of {self.teacher.model} {theirs}."
            )

    def features(self, network, x):
        return network.features(x)

    def term(self, ours, theirs, step):
        flows = zip(pairwise(ours), pairwise(theirs), strict=False)
        return "fsp", self.fsp_weight, sum(losses.fsp(*own, *other) for own, other in flows)


@dataclass(frozen=True, kw_only=True)
class NST(OnFeatures):
    """nst_weight·MMD² of the last stages' channels (neuron selectivity, Huang & Wang 2017).

    The kernel is (x·y)² of normalised maps. Channels may differ; the larger map is average-pooled
    to the smaller.

    Attributes:
        nst_weight: 50, as in the authors' code.
    """

    nst_weight: float = 50.0

    def term(self, ours, theirs, step):
        return "nst", self.nst_weight, losses.nst(*_to_one_size(ours[-1], theirs[-1]))


@lru_cache
def _widths(model: str) -> list[int]:
    """Channels of the stem's and every stage's output; nothing is computed for it."""
    with torch.device("meta"):
        network = builder(model)(classes=2, channels=1).eval()
        return [f.shape[1] for f in network.features(torch.empty(1, 1, 32, 32))]


def _leaky(layer: type[nn.Module], widths) -> nn.Sequential:
    """3x3 layers from each width to the next, with bias, each followed by leaky ReLU."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [layer(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _to_one_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both average-pooled to the smaller height and width."""
    size = min(first.shape[2:], second.shape[2:])
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)
