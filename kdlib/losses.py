"""Losses: one formula each, averaged over the batch, with gradients to the student only.

Logits are ``[b, classes]``, features ``[b, channels, height, width]``. Every function returns a
0-dim tensor. The teacher's side is detached, so the teacher never receives a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(z_t/T) ‖ softmax(z_s/T)), in nats (Hinton et al. 2015)."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * kl


def imitation(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·CE(softmax(z_t/T), softmax(z/T)), STC's L_STC; T = 1 unless the target is soft.

    It equals ``kd`` plus T² times the teacher's entropy, which no student can change.
    """
    target = F.softmax(teacher_logits.detach() / temperature, dim=1)
    return temperature**2 * F.cross_entropy(logits / temperature, target)


def hint(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Mean squared error of two equally shaped features (FitNet, Romero et al. 2015)."""
    return F.mse_loss(student_feature, teacher_feature.detach())


def attention(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Mean of (q_s - q_t)², q the L2-normalised map mean_c(F²) (AT, Zagoruyko & Komodakis 2017).

    The numbers of channels may differ; height and width must be equal.
    """
    student, teacher = _attention_map(student_feature), _attention_map(teacher_feature.detach())
    return F.mse_loss(student, teacher)


def factor(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Mean of |f_s - f_t|, each image's factor L2-normalised (FT, Kim et al. 2018)."""
    student, teacher = student_factor.flatten(1), teacher_factor.detach().flatten(1)
    return F.l1_loss(F.normalize(student), F.normalize(teacher))


def fsp(student_in: Tensor, student_out: Tensor, teacher_in: Tensor, teacher_out: Tensor) -> Tensor:
    """Mean of (G_s - G_t)², G the flow matrix between two layers (FSP, Yim et al. 2017).

    Student and teacher need equal numbers of channels at both layers. Of two layers of different
    size, the larger is max-pooled to the size of the smaller.
    """
    return F.mse_loss(_flow(student_in, student_out), _flow(teacher_in, teacher_out).detach())


def nst(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Squared MMD of the channels' activation patterns, kernel (x·y)² (NST, Huang & Wang 2017).

    A pattern is one channel's L2-normalised map. The numbers of channels may differ; height and
    width must be equal. The kernels are batched matrix products ``[b, c, c]``, so that no tensor of
    ``b x c x c x hw`` is made.
    """
    student = F.normalize(student_feature.flatten(2), dim=2)
    teacher = F.normalize(teacher_feature.detach().flatten(2), dim=2)
    within = _mean_kernel(student, student) + _mean_kernel(teacher, teacher)
    return within - 2 * _mean_kernel(student, teacher)


def recoding(
    residual: Tensor,
    threshold: Tensor | float,
    gain: float = 2.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean of ρ(u), the sparse recoding penalty in this project's reconstruction (KR, Eq. 3, 4).

    ρ(u) = gain/2·max(u² - t², 0). Its gradient is 0 where |u| ≤ t, and gain·u elsewhere. With a
    threshold of 0 and a gain of 1 it is ½u², the dense penalty.

    Args:
        weights: ``[m]`` for residuals ``[m, …]``: the weights of a sum of m means; None for the
            mean over all.
    """
    penalty = F.relu(residual.square() - threshold**2)
    mean = penalty.mean() if weights is None else weights @ penalty.flatten(1).mean(1)
    return gain / 2 * mean


def gated_recoding(
    residual: Tensor, threshold: Tensor | float, gain: float, width: Tensor | float
) -> Tensor:
    """Mean of gain/2·u²·1[|u| > t], the penalty in a second reading of KR (Eq. 3, 4).

    It is flat within t and jumps at t, so it is not convex. Its gradient is 0 where |u| ≤ t, and
    gain·u elsewhere. The step has no gradient in t; in its place stands that of the sigmoid
    σ((|u| - t) / width), a surrogate gradient.
    """
    size = residual.detach().abs()
    soft = torch.sigmoid((size - threshold) / width)
    gate = (size > threshold).to(size.dtype) + (soft - soft.detach())
    return gain / 2 * (gate * residual.square()).mean()


def aggregation(aggregate: Tensor, features: Tensor) -> Tensor:
    """Σ_l w_l·mean (F_A - F_l)², w the ``aggregation_weights`` (KR, Eq. 9).

    Args:
        aggregate: F_A, of the shape of one of the features.
        features: F_l of neighbouring layers, ``[m, …]``.
    """
    features = features.detach()
    distances = (aggregate - features).square().flatten(1).mean(1)
    return aggregation_weights(features) @ distances


def aggregation_weights(features: Tensor) -> Tensor:
    """Weights ``[m]`` of features ``[m, …]``: their standard deviations over the sum of these.

    Without gradient (KR, Eq. 9: "to penalize more on the layer with higher accumulation error").
    Where all features are constant, all weights are 0.
    """
    features = features.detach().flatten(1)
    # std(1) takes eight times as long on a CPU.
    spread = (features - features.mean(1, keepdim=True)).square().mean(1).sqrt()
    return spread / spread.sum().clamp(min=torch.finfo(spread.dtype).tiny)


def concrete(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """A relaxed sample ``[b, classes]`` of the softmax of logits, which has a gradient.

    softmax((log p + g) / τ), g = -log(-log u) (Gumbel-softmax; Jang et al. 2017).

    Args:
        uniform: u in (0, 1), of the logits' shape.
    """
    gumbel = -(-uniform.log()).log()
    return F.softmax((F.log_softmax(logits, dim=1) + gumbel) / temperature, dim=1)


def _attention_map(feature: Tensor) -> Tensor:
    return F.normalize(feature.square().mean(1).flatten(1))


def _flow(first: Tensor, last: Tensor) -> Tensor:
    """G[b, i, j] = mean over positions of first_i · last_j."""
    size = min(first.shape[2:], last.shape[2:])
    first, last = (F.adaptive_max_pool2d(f, size).flatten(2) for f in (first, last))
    return torch.bmm(first, last.transpose(1, 2)) / first.shape[2]


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x, y.transpose(1, 2)).square().mean()
