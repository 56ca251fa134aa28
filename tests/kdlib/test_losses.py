"""Each loss equals its formula, written in numpy with loops and broadcasting."""

from math import prod

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdlib import losses

B = 3  # images


def make(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


# name: student and teacher tensors, in the order of the loss's arguments
TENSORS = {
    "kd": make((10,), (10,)),
    "imitation": make((10,), (10,)),
    "hint": make((4, 3, 3), (4, 3, 3)),
    "attention": make((4, 3, 3), (7, 3, 3)),
    "factor": make((4, 3, 3), (4, 3, 3)),
    "fsp": make((2, 4, 4), (3, 2, 2), (2, 3, 3), (3, 3, 3)),
    "nst": make((4, 3, 3), (5, 3, 3)),
}
LOSSES = {name: getattr(losses, name) for name in TENSORS} | {
    "kd": lambda s, t: losses.kd(s, t, 4.0),
    "imitation": lambda s, t: losses.imitation(s, t, 4.0),
}
every_loss = pytest.mark.parametrize("name", TENSORS)


# --- the formulas ---------------------------------------------------------------------------------


def kd(student, teacher, temperature=4.0):
    p_teacher, p_student = softmax(teacher / temperature, 1), softmax(student / temperature, 1)
    return temperature**2 * np.mean(
        [rel_entr(t, s).sum() for t, s in zip(p_teacher, p_student, strict=True)]
    )


def imitation(student, teacher, temperature=4.0):
    """Cross-entropy, class by class."""
    p_teacher, p_student = softmax(teacher / temperature, 1), softmax(student / temperature, 1)
    total = 0.0
    for p, q in zip(p_teacher, p_student, strict=True):
        total -= sum(p[c] * np.log(q[c]) for c in range(len(p)))
    return temperature**2 * total / len(teacher)


def hint(student, teacher):
    return np.mean([(s - t) ** 2 for s, t in zip(student.ravel(), teacher.ravel(), strict=True)])


def attention(student, teacher):
    def attention_map(feature):
        q = sum(feature[c] ** 2 for c in range(len(feature))) / len(feature)
        return q.ravel() / np.sqrt((q**2).sum())

    return np.mean(
        [(attention_map(s) - attention_map(t)) ** 2 for s, t in zip(student, teacher, strict=True)]
    )


def factor(student, teacher):
    def unit(f):
        return f.ravel() / np.sqrt((f**2).sum())

    return np.mean([np.abs(unit(s) - unit(t)) for s, t in zip(student, teacher, strict=True)])


def fsp(student_in, student_out, teacher_in, teacher_out):
    def halved(f):  # 2x2 max-pooling
        rows = np.maximum(f[:, 0::2], f[:, 1::2])
        return np.maximum(rows[:, :, 0::2], rows[:, :, 1::2])

    def flow(first, last):
        first = halved(first) if first.shape[1] > last.shape[1] else first
        _, height, width = first.shape
        matrix = np.zeros((len(first), len(last)))
        for i in range(len(first)):
            for j in range(len(last)):
                for h in range(height):
                    for w in range(width):
                        matrix[i, j] += first[i, h, w] * last[j, h, w] / (height * width)
        return matrix

    students, teachers = map(flow, student_in, student_out), map(flow, teacher_in, teacher_out)
    return np.mean([(s - t) ** 2 for s, t in zip(students, teachers, strict=True)])


def nst(student, teacher):
    def patterns(feature):
        flat = feature.reshape(B, feature.shape[1], -1)
        return flat / np.sqrt((flat**2).sum(2, keepdims=True))

    def mean_kernel(x, y):
        products = x[:, :, None, :] * y[:, None, :, :]  # [b, c, c, h·w]
        return (products.sum(3) ** 2).mean()

    s, t = patterns(student), patterns(teacher)
    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


@every_loss
def test_a_loss_equals_its_formula(name):
    tensors = TENSORS[name]
    expected = globals()[name](*(tensor.numpy() for tensor in tensors))
    loss = LOSSES[name](*tensors)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    assert expected > 1e-3


# --- gradients ------------------------------------------------------------------------------------


def split(name):
    """Student tensors and teacher tensors."""
    tensors = TENSORS[name]
    half = len(tensors) // 2
    return tensors[:half], tensors[half:]


@every_loss
def test_gradients_to_the_student_are_right(name):
    student, teacher = split(name)
    student = [tensor.clone().requires_grad_() for tensor in student]
    assert gradcheck(lambda *s: LOSSES[name](*s, *teacher), student)


@every_loss
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = ([t.clone().requires_grad_() for t in part] for part in split(name))
    LOSSES[name](*student, *teacher).backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert all(tensor.grad.abs().sum() > 0 for tensor in student)


@every_loss
def test_a_dead_feature_gives_finite_gradients(name):
    student, teacher = split(name)
    student = [torch.zeros_like(tensor).requires_grad_() for tensor in student]
    loss = LOSSES[name](*student, *teacher)
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in student)


def test_the_default_temperature_of_imitation_is_1():
    student, teacher = TENSORS["imitation"]
    expected = imitation(student.numpy(), teacher.numpy(), temperature=1.0)
    assert float(losses.imitation(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_fsp_pools_a_larger_output_too():
    small, large = make((2, 3, 3), (2, 6, 6))
    assert float(losses.fsp(small, large, small, torch.nn.functional.max_pool2d(large, 2))) == 0


# --- memory of NST --------------------------------------------------------------------------------


def broadcast_nst(student, teacher):
    """The formula as it is often written, with a tensor ``[b, c, c, h·w]``."""
    s, t = (f.flatten(2) / f.flatten(2).norm(dim=2, keepdim=True) for f in (student, teacher))

    def mean_kernel(x, y):
        return (x[:, :, None, :] * y[:, None, :, :]).sum(3).square().mean()

    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def test_nst_in_float32_is_close_to_the_broadcast_formula_with_its_gradient():
    """After a ReLU the kernels are similar, so their difference loses digits."""
    student, teacher = (f.relu() for f in make((16, 8, 8), (24, 8, 8)))
    exact = student.clone().requires_grad_()
    expected = broadcast_nst(exact, teacher)
    expected.backward()
    ours = student.float().requires_grad_()
    loss = losses.nst(ours, teacher.float())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-7)


class Bytes(TorchDispatchMode):
    """Counts the bytes of all results."""

    total = largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                size = prod(tensor.shape) * tensor.itemsize
                self.total, self.largest = self.total + size, max(self.largest, size)
        return results


def test_nst_of_a_resnet50_needs_a_tenth_of_the_memory_of_the_broadcast_formula():
    """Forward and backward pass of the first stage: 256 channels of 32x32, a batch of 64.

    On the meta device, which computes shapes and no numbers.
    """
    counts = []
    for formula in (losses.nst, broadcast_nst):
        student, teacher = (torch.empty(64, 256, 32, 32, device="meta") for _ in range(2))
        with Bytes() as count:
            formula(student.requires_grad_(), teacher).backward()
        counts.append(count)
    ours, broadcast = counts
    assert broadcast.largest == 64 * 256 * 256 * 1024 * 4  # 17 GB
    assert ours.total < broadcast.total / 10
    assert ours.largest == 64 * 256 * 1024 * 4  # the size of a feature


# --- sparse recoding ------------------------------------------------------------------------------


def test_recoding_is_zero_within_its_threshold_and_grows_beyond():
    u = torch.tensor([-3.0, -2.5, -2.0, -0.5, 0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    u.requires_grad_()
    threshold = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = losses.recoding(u, threshold, gain=3.0)
    loss.backward()
    # 3/2·(u² - 4): 7.5, 3.375, 0 five times, 18
    assert loss.item() == (7.5 + 3.375 + 18) / 8
    assert (8 * u.grad).tolist() == [-9.0, -7.5, 0, 0, 0, 0, 0, 12.0]
    assert threshold.grad.item() == -3 * 2 * 3 / 8  # -a·t·share


@pytest.mark.parametrize("threshold", [0.0, 0.4, 99.0])
def test_recoding_equals_its_formula_element_by_element(threshold):
    """The default gain is 2."""
    (u,) = make((4, 3, 3))
    parts = [v**2 - threshold**2 if abs(v) > threshold else 0.0 for v in u.numpy().ravel()]
    assert losses.recoding(u, threshold).item() == pytest.approx(np.mean(parts), rel=1e-12)
    assert losses.recoding(u, threshold, 0.3).item() == pytest.approx(0.15 * np.mean(parts))


def test_recoding_of_several_residuals_sums_their_means_by_weight():
    u, weights = torch.stack(make((4, 3, 3), (4, 3, 3))), torch.tensor([0.25, 0.75]).double()
    expected = 0.25 * losses.recoding(u[0], 0.5, 3.0) + 0.75 * losses.recoding(u[1], 0.5, 3.0)
    torch.testing.assert_close(losses.recoding(u, 0.5, 3.0, weights), expected)


def test_gated_recoding_is_flat_within_its_threshold_and_jumps_at_it():
    u = torch.tensor([-3.0, -2.5, -2.0, -0.5, 0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    u.requires_grad_()
    threshold = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = losses.gated_recoding(u, threshold, gain=3.0, width=0.5)
    loss.backward()
    assert loss.item() == 3 / 2 * (9 + 6.25 + 16) / 8  # no -t² beyond
    assert (8 * u.grad).tolist() == [-9.0, -7.5, 0, 0, 0, 0, 0, 12.0]
    size = u.detach().abs().numpy()
    share = 1 / (1 + np.exp(-(size - 2) / 0.5))
    slope = -np.mean(3 / 2 * size**2 * share * (1 - share) / 0.5)
    assert threshold.grad.item() == pytest.approx(slope, rel=1e-12)


def test_gated_recoding_is_not_convex_and_without_threshold_it_is_a_square():
    def at(u, threshold=1.0):
        return losses.gated_recoding(torch.tensor(u).double(), threshold, 1.0, 0.1).item()

    assert at([0.9]) == at([1.0]) == 0
    assert at([1.2]) > (at([0.9]) + at([1.5])) / 2  # above the chord: not convex
    assert at([0.3, -2.0], threshold=0.0) == pytest.approx((0.09 + 4) / 4)


# --- aggregation ----------------------------------------------------------------------------------


def test_the_aggregation_of_features_weighs_their_distances():
    features, (aggregate,) = torch.stack(make((4, 3, 3), (4, 3, 3))), make((4, 3, 3), seed=5)
    features[1] *= 3
    aggregate.requires_grad_()
    loss = losses.aggregation(aggregate, features)
    spread = features.numpy().std((1, 2, 3, 4))
    w = spread / spread.sum()
    pairs = zip(w, features.numpy(), strict=True)
    expected = sum(wl * ((aggregate.detach().numpy() - f) ** 2).mean() for wl, f in pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, aggregate)
    mean = np.tensordot(w, features.numpy(), 1)  # the weighted mean is the minimum
    by_hand = 2 * (aggregate.detach().numpy() - mean) / gradient.numel()
    np.testing.assert_allclose(gradient.numpy(), by_hand, rtol=1e-9)


def test_aggregation_weights_are_shares_of_the_standard_deviations():
    features = torch.stack([k * f for k, f in enumerate(make((4, 3, 3), (4, 3, 3)), 1)])
    spread = [np.sqrt(((f - f.mean()) ** 2).sum() / (f.size - 1)) for f in features.numpy()]
    weights = losses.aggregation_weights(features.requires_grad_())
    assert weights.tolist() == pytest.approx([s / sum(spread) for s in spread], rel=1e-12)
    assert weights.sum().item() == pytest.approx(1, abs=1e-15)
    assert not weights.requires_grad


# --- samples --------------------------------------------------------------------------------------


def test_samples_equal_the_formula():
    logits, uniform = make((10,), (10,))[0], torch.rand(B, 10, dtype=torch.float64)
    gumbel = -np.log(-np.log(uniform.numpy()))
    expected = softmax((np.log(softmax(logits.numpy(), 1)) + gumbel) / 0.7, 1)
    sample = losses.concrete(logits, uniform, 0.7)
    np.testing.assert_allclose(sample.numpy(), expected, rtol=1e-11)
    torch.testing.assert_close(sample.sum(1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize(("temperature", "scale"), [(0.1, 100.0), (1.0, 1.0)])
def test_samples_are_finite_for_the_least_and_the_largest_random_numbers(temperature, scale):
    least, most = 2**-24, 1 - 2**-24  # in float32
    uniform = torch.tensor([[least] * 4, [most] * 4, [least, most, least, most], [0.5] * 4])
    logits = scale * torch.randn(4, 4, generator=torch.manual_seed(0))
    sample = losses.concrete(logits.requires_grad_(), uniform, temperature)
    (sample * torch.arange(4)).sum().backward()
    assert sample.isfinite().all()
    torch.testing.assert_close(sample.sum(1), torch.ones(4))
    assert logits.grad.isfinite().all()
