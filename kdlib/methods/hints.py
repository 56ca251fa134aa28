"""Learn from a teacher's features: FitNet, AT, FT, FSP and NST."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses
from kdlib.methods.distill import FromTeacher, OnLogits
from kdlib.models.names import count_stages
from kdlib.models.precision import AutocastNetwork
from kdlib.runs import Recipe, Run, Step


@dataclass(frozen=True, kw_only=True)
class OnFeatures(OnLogits):
    """Adds a weighted term of the stages' features to the loss on the logits.

    The teacher runs in every step, and so gives its logits as well.
    """

    needs_logits = False
    needs_teacher = True

    def term(
        self, ours: list[Tensor], theirs: list[Tensor], step: Step
    ) -> tuple[str, float, Tensor]:
        """Name, weight and value of the term, given ``features`` of both networks."""
        raise NotImplementedError

    def features(self, network: AutocastNetwork, x: Tensor) -> list[Tensor]:
        """The features of a network for ``term``; the last is that of the last stage."""
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

    The mean over a feature's elements replaces the sum of Eq. 2, so that one weight suits networks
    of all sizes. The larger map is average-pooled to the smaller. Where the numbers of channels
    differ, a 1x1 convolution maps the student's to the teacher's; it is trained with the student,
    and not used at inference.

    FitNet trains in two parts: a run with ce_weight 0, and a second run that starts from the first
    (``Run.start``).

    Attributes:
        stage: the stage of both networks whose output is the hint; None for the last.

    Raises ValueError for a stage that one of the networks does not have.
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

    q is an image's map of mean squared activations, L2-normalised. Stages of the same number form a
    pair, as far as both networks have them. The larger map is average-pooled to the smaller.

    Attributes:
        attention_weight: β, 1,000 in the authors' code for images of 32x32. For n pixels it is
            multiplied by n/1,024, because the mean over a normalised map grows with 1/n.
    """

    attention_weight: float = 1000.0

    def term(self, ours, theirs, step):
        pairs = zip(ours, theirs, strict=False)
        attention = sum(losses.attention(*_to_one_size(*pair)) for pair in pairs)
        return "attention", self.attention_weight * step.x[0, 0].numel() / 1024, attention


@dataclass(frozen=True)
class Paraphrase(FromTeacher):
    """FT's first part: an autoencoder of the teacher's last features, by L1 (Kim et al. 2018).

    The encoder is the paper's paraphraser: its output is the teacher's factor. The student of such
    a run does not change; ``paraphrase`` makes the teacher itself that student. Encoder and decoder
    have three convolutions each, with leaky ReLU, without batch norm, as in the authors' code.

    Attributes:
        rate: k, the channels of the factor over those of the feature.
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
    """The run that trains the paraphraser of a teacher; the teacher's weights do not change."""
    method = Paraphrase(teacher, rate=rate)
    return replace(teacher, method=method, recipe=recipe, start=teacher, keep=(), save_logits=False)


@dataclass(frozen=True, kw_only=True)
class FactorTransfer(OnFeatures):
    """FT: factor_weight·mean |f_s - f_t| of factors, each L2-normalised (Kim et al. 2018).

    The paraphraser makes the teacher's factor from its last stage. A translator makes the student's
    factor from the stage of the same number, or from its last: three convolutions that are trained
    with the student, and not used at inference.

    Attributes:
        paraphraser: the run that ``paraphrase`` makes.
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
                f"{self.paraphraser} is not a paraphraser of {self.teacher}, epoch "
                f"{self.teacher_epoch}. paraphrase(teacher, recipe) makes one for the last epoch."
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

    G holds the inner products of a stage's input channels with its output channels. Stages of the
    same number form a pair, as far as both networks have them. The authors train in two parts: a
    run by this loss alone (ce_weight 0), and a run by the labels alone that starts from the first.
    Their networks have equal channels. Where ours differ, 1x1 convolutions that are trained with
    the student give its features the teacher's channels (an extension of ours).
    """

    fsp_weight: float = 1.0

    def aux_modules(self, student, teacher, x):
        ours, theirs = ([f.shape[1] for f in net.features(x)] for net in (student, teacher))
        pairs = [*zip(ours, theirs, strict=False)]
        if all(own == other for own, other in pairs):
            return {}
        return {"adapters": nn.ModuleList(nn.Conv2d(*pair, kernel_size=1) for pair in pairs)}

    def features(self, network, x):
        return network.features(x)

    def term(self, ours, theirs, step):
        if "adapters" in step.aux:
            adapters = step.aux["adapters"]
            ours = [adapt(f) for adapt, f in zip(adapters, ours, strict=False)]
        flows = zip(pairwise(ours), pairwise(theirs), strict=False)
        return "fsp", self.fsp_weight, sum(losses.fsp(*own, *other) for own, other in flows)


@dataclass(frozen=True, kw_only=True)
class NST(OnFeatures):
    """nst_weight·MMD² of the last stages' channels (neuron selectivity, Huang & Wang 2017).

    The kernel is (x·y)² of normalised maps. The numbers of channels may differ. The larger map is
    average-pooled to the smaller.

    Attributes:
        nst_weight: 50, as in the authors' code.
    """

    nst_weight: float = 50.0

    def term(self, ours, theirs, step):
        return "nst", self.nst_weight, losses.nst(*_to_one_size(ours[-1], theirs[-1]))


def _leaky(layer: type[nn.Module], widths) -> nn.Sequential:
    """3x3 layers with bias from each width to the next, each followed by leaky ReLU."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [layer(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _to_one_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both average-pooled to the smaller height and width."""
    size = min(first.shape[2:], second.shape[2:])
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)
