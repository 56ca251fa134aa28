"""Accelerated proximal gradient: updates, half precision, ranges that keep one gate."""

import numpy as np
import pytest
import torch

from kdlib import build_model
from kdlib.methods.gates import AcceleratedProximal, Gates, soft_threshold
from kdlib.models.channels import Channels


def shrink(z, a):
    return np.sign(z) * np.maximum(np.abs(z) - a, 0)


def by_hand(gate, gradients, a, rate=0.01, momentum=0.9):
    """Eq. 4 step by step, in float64."""
    velocity, path = np.zeros_like(gate), []
    for gradient in gradients:
        s = shrink(gate - rate * gradient, a)
        velocity = s - gate + momentum * velocity
        gate = np.maximum(0, s + momentum * velocity)
        path.append(gate)
    return np.array(path), velocity


def moved(gate, gradients, a, rate=0.01, momentum=0.9):
    gate = torch.nn.Parameter(torch.tensor(gate))
    optimizer, path = AcceleratedProximal([gate], torch.tensor(a), rate, momentum), []
    for gradient in gradients:
        gate.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(gate.detach().clone().numpy())
    return np.array(path), optimizer.state[gate]["momentum_buffer"].numpy()


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_soft_threshold_moves_values_towards_zero_and_stops_there(random):
    x = random.normal(0, 1, 200)
    for threshold in (0.0, 0.3, 10.0, np.abs(random.normal(0, 1, 200))):
        got = soft_threshold(torch.tensor(x), torch.tensor(threshold, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(got, shrink(x, threshold), rtol=0, atol=1e-16)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gates_follow_the_equation_step_by_step(random, momentum):
    gate, a = np.ones(40), 0.002 * random.uniform(0, 3, 40)
    gradients = random.normal(0.5, 5, (60, 40))
    path, velocity = moved(gate, gradients, a, 0.01, momentum)
    expected, kept = by_hand(gate, gradients, a, 0.01, momentum)
    np.testing.assert_allclose(path, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(velocity, kept, rtol=1e-12, atol=1e-14)
    assert (expected == 0).any()
    assert (expected > 1).any()


def test_gates_are_never_negative_and_can_open_again():
    gradients = np.array([[200.0, 200.0]] + [[-30.0, 0.0]] * 30)
    path, _ = moved(np.ones(2), gradients, 0.001)
    assert (path >= 0).all()
    assert path[0].tolist() == [0, 0]
    assert path[-1, 0] > 0
    assert path[-1, 1] == 0


def test_a_gate_without_gradient_closes_as_fast_as_in_the_paper():
    """η·λ₂·α/(1 - μ) a step: 26 epochs of 391 steps at the paper's settings and α = 1."""
    path, _ = moved(np.ones(1), np.zeros((1200, 1)), np.array([0.01 * 1e-2]))  # ten times as fast
    closed = int((path[:, 0] > 0).sum())
    assert closed == pytest.approx(26 * 39.1, rel=0.03)


def test_gates_converge_to_the_sparse_minimum_of_a_quadratic(random):
    """½gᵀQg - bᵀg + λΣg for g ≥ 0: the slope is 0 at open gates, and above 0 at closed ones."""
    root = random.normal(0, 1, (12, 12))
    quadratic, linear = root @ root.T + np.eye(12), 5 * random.normal(0, 1, 12)
    gate = torch.nn.Parameter(torch.ones(12, dtype=torch.float64))
    optimizer = AcceleratedProximal([gate], torch.full((12,), 0.002 * 0.7), 0.002)
    for _ in range(5000):
        gate.grad = torch.tensor(quadratic) @ gate.detach() - torch.tensor(linear)
        optimizer.step()
    g = gate.detach().numpy()
    slope = quadratic @ g - linear + 0.7
    assert 0 < (g == 0).sum() < 12
    np.testing.assert_allclose(slope[g > 0], 0, atol=1e-6)
    assert (slope[g == 0] > 0).all()


@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
def test_a_gradient_scaler_changes_no_update_and_an_overflow_is_no_step(random, overflow):
    factors = random.normal(0, 3, 6).tolist()
    with_overflows = [overflow, *factors[:3], overflow, *factors[3:]]
    results = []
    for enabled in (False, True):
        gate = torch.nn.Parameter(torch.tensor([1.0, 0.5]))
        optimizer = AcceleratedProximal([gate], torch.tensor(0.001), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for k, factor in enumerate(with_overflows if enabled else factors):
            gate.grad = None
            scaler.scale((factor * gate).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if enabled and k == 0:
                assert gate.tolist() == [1.0, 0.5]
        results.append((gate.detach(), optimizer.state[gate]["momentum_buffer"]))
    assert all(map(torch.equal, *results))


# --- ranges that keep one gate -------------------------------------------------------------------


def test_the_last_gate_of_a_neck_stays_and_no_other():
    gates = torch.nn.Parameter(torch.tensor([0.3, 0.5, 0.4, 0.2, 0.1]))
    optimizer = AcceleratedProximal([gates], torch.full((5,), 10.0), keep_one=[(0, 3)])
    gates.grad = torch.zeros(5)
    for _ in range(3):
        optimizer.step()
        assert gates.tolist() == pytest.approx([0, 0.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "layers"),
    [("densenet-bc-16-4", ["body.1.2", "body.2.2"]), ("resnet8-x0.25", []), ("vgg13-x0.0625", 9)],
)
def test_the_ranges_are_the_first_connections_of_layers_without_a_bypass(name, layers):
    channels = Channels(build_model(name, classes=10, seed=0), image_size=16)
    begins = np.cumsum([0, *channels.sizes[:-1]]).tolist()
    gated = dict(zip(begins, channels.gated, strict=True))
    named = [gated[begin].name for begin, _ in channels.keep_one]
    assert layers in (named, len(named))
    for begin, end in channels.keep_one:
        assert end - begin == gated[begin].inputs[0].channels


def test_a_network_remains_though_all_layers_of_a_block_close():
    """The transition's largest gate reads one of them, but another gate must stay."""
    gates = Gates(Channels(build_model("densenet-bc-16-4", classes=10, seed=0), image_size=16))
    parts = gates.channels.split(np.full(sum(gates.channels.sizes), 0.5, np.float32))
    for name in ("body.1.2", "body.2.2"):
        parts[name][-4:] = 0.9  # of the block's last layer
    gates.values.data = torch.tensor(np.concatenate([*parts.values()]))
    settings = {"keep_one": gates.channels.keep_one}
    optimizer = AcceleratedProximal([gates.values], torch.full_like(gates.values, 10), **settings)
    gates.values.grad = torch.zeros_like(gates.values)
    optimizer.step()
    assert gates.macs() > 0
