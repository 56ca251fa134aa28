"""Each loss against its formula, written out in numpy with loops and broadcasting."""

import numpy as np
import pytest
import torch
from scipy.special import entr, rel_entr, softmax
from torch.autograd import gradcheck

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
def test_equals_the_formula_written_out(name):
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


# --- what holds of each ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "imitation"])
def test_is_zero_where_student_and_teacher_agree(name):
    student, _ = split(name)
    assert abs(float(LOSSES[name](*student, *student))) < 1e-15


@every_loss
def test_is_a_mean_over_the_batch(name):
    twice = [torch.cat([tensor, tensor]) for tensor in TENSORS[name]]
    once = LOSSES[name](*TENSORS[name])
    torch.testing.assert_close(LOSSES[name](*twice), once)


@pytest.mark.parametrize("name", ["attention", "factor", "nst"])
def test_normalised_losses_ignore_the_scale_of_features(name):
    student, teacher = TENSORS[name]
    torch.testing.assert_close(
        LOSSES[name](3 * student, 0.5 * teacher), LOSSES[name](student, teacher)
    )


def test_kd_ignores_a_shift_of_all_logits():
    student, teacher = TENSORS["kd"]
    torch.testing.assert_close(
        losses.kd(student + 5, teacher - 3, 2.0), losses.kd(student, teacher, 2.0)
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_imitation_is_kd_and_the_teachers_entropy(temperature):
    student, teacher = TENSORS["imitation"]
    p = softmax(teacher.numpy() / temperature, 1)
    least = temperature**2 * entr(p).sum(1).mean()
    assert float(losses.imitation(teacher, teacher, temperature)) == pytest.approx(least, rel=1e-12)
    excess = losses.imitation(student, teacher, temperature) - least
    torch.testing.assert_close(excess, losses.kd(student, teacher, temperature))
    assert excess > 0.1


def test_imitation_has_a_temperature_of_one_unless_told():
    student, teacher = TENSORS["imitation"]
    expected = imitation(student.numpy(), teacher.numpy(), temperature=1.0)
    assert float(losses.imitation(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_imitation_of_a_certain_teacher_is_cross_entropy():
    student, _ = TENSORS["imitation"]
    labels = torch.tensor([3, 0, 9])
    certain = 1e3 * torch.nn.functional.one_hot(labels, 10).double()
    expected = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(losses.imitation(student, certain), expected)


def test_kd_at_high_temperature_matches_centred_logits():
    """Hinton et al. 2015, Eq. 4: then distillation is ½·mean squared error of the logits."""
    student, teacher = TENSORS["kd"]
    difference = student - teacher
    difference = difference - difference.mean(1, keepdim=True)
    limit = 0.5 * difference.square().mean()
    torch.testing.assert_close(losses.kd(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


def test_nst_ignores_the_order_of_channels():
    student, teacher = TENSORS["nst"]
    torch.testing.assert_close(losses.nst(student.flip(1), teacher), losses.nst(student, teacher))


def test_fsp_pools_whichever_layer_is_larger():
    small, large = make((2, 3, 3), (2, 6, 6))
    pooled = torch.nn.functional.max_pool2d(large, 2)
    assert float(losses.fsp(small, large, small, pooled)) == 0
    assert float(losses.fsp(large, small, pooled, small)) == 0
