"""Accelerated proximal gradient: updates, half precision, ranges that keep one gate."""

import numpy as np
import pytest
import torch

from kdlib.methods.gates import AcceleratedProximal, soft_threshold


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
