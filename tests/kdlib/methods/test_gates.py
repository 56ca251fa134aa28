"""Search for a student: gates on a network, and the loss of the search."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gated import (
    SMALL,
    close,
    gated_convolutions,
    gated_logits,
    gates_of,
    images,
    lively,
    values_of,
)
from helpers import Called
from scipy.special import log_softmax, softmax

from kdlib import KD, GateSearch, Recipe, Run
from kdlib.methods import Step

# --- gates on a network ---------------------------------------------------------------------------


def explicit_logits(network, values, x):
    """Logits with the input of every gated convolution multiplied by its gates."""
    layers = [module for _, module in gated_convolutions(network)]
    sizes = [layer.in_channels for layer in layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, g=g: (args[0] * g.view(1, -1, 1, 1),))
        for layer, g in zip(layers, values.split(sizes), strict=True)
    ]
    logits = network(x)
    for handle in handles:
        handle.remove()
    return logits


def doubled(name, closed=0.0, seed=0):
    network = lively(name, seed)
    gates = gates_of(network, closed, seed).double()
    return network.double(), gates, images(dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("closed", [0.0, 0.2], ids=["open", "some closed"])
@pytest.mark.parametrize("name", SMALL)
def test_a_gate_multiplies_the_channel_that_its_layer_reads(name, closed, training):
    network, gates, x = doubled(name, closed)
    assert [reader.name for reader in gates.channels.gated] == [
        layer for layer, _ in gated_convolutions(network)
    ]
    for k, part in enumerate(values_of(gates).values()):
        part[k % len(part)] = 0.7  # no layer closes altogether
    network.train(training)
    expected = explicit_logits(network, gates.values, x)
    torch.testing.assert_close(gated_logits(network, gates, x), expected, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(expected, network(x), rtol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_gates_and_weights_are_those_of_the_multiplication(name):
    """Those of closed gates too: they may open again."""
    network, gates, x = doubled(name)
    network.train()
    for part in values_of(gates).values():
        part[0] = 0
    wanted = [gates.values, *network.parameters()]
    logits = gated_logits(network, gates, x), explicit_logits(network, gates.values, x)
    got, expected = (torch.autograd.grad(z.square().sum(), wanted) for z in logits)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    assert all(part.any() for part in got[0].split(gates.channels.sizes))
    assert got[0][gates.values == 0].any()


@pytest.mark.parametrize("dead", ["body.0.0", "body.1.4", "body.2.4"])
def test_outputs_of_a_layer_without_inputs_count_as_closed(dead):
    """They are constant. If the layer were taken out, the constant would be lost."""
    network, gates, x = doubled("densenet-bc-16-4")
    everywhere = [reader.name for reader in gates.channels.gated]
    close(gates, f"{dead}.conv1")
    got = gated_logits(network, gates, x)
    close(gates, f"{dead}.conv2")
    close(gates, *everywhere, source=f"{dead}.conv2")
    if dead == "body.2.4":  # the head reads them, too, after the eight channels of a transition
        assert not torch.allclose(got, explicit_logits(network, gates.values, x))
        network.get_submodule("head.2.2").weight.data[:, 8:12] = 0
    expected = explicit_logits(network, gates.values, x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_residual_block_without_inputs_keeps_its_shortcut():
    network, gates, x = doubled("resnet14-x0.25")
    block = network.body[1][1]
    close(gates, "body.1.1.convs.1")
    got = gated_logits(network, gates, x)
    block.norms[1].weight.data.zero_()
    block.norms[1].bias.data.zero_()
    torch.testing.assert_close(got, explicit_logits(network, gates.values, x))
    assert block.norms[0].bias.any()


@pytest.mark.parametrize("name", SMALL)
def test_the_weights_of_gates_are_the_savings_of_closing_them(name):
    network = lively(name)
    gates = gates_of(network)
    savings = torch.tensor(gates.channels.savings(), dtype=torch.float64)
    assert gates.alpha.mean().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(gates.alpha.double() * savings.mean(), savings, rtol=1e-5, atol=0)
    assert gates_of(network, weighted=False).alpha.unique().tolist() == [1]


def test_gates_start_open_and_only_their_values_are_learned():
    network = lively("densenet-bc-16-4")
    method = GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5)
    gates = method.aux_modules(network, None, images())["gates"]
    assert gates.values.tolist() == [1] * sum(gates.channels.sizes)
    assert [name for name, _ in gates.named_parameters()] == ["values"]
    assert list(gates.state_dict()) == ["values", "before"]
    assert method.metrics({"gates": gates})["macs_share"] == 1
    assert not method.should_stop({"gates": gates}, within=1)


def test_a_search_may_stop_in_an_epoch_where_the_penalty_alone_may_reach_the_budget():
    """At η·λ₂·α/(1 - μ) a step, 1e-3 here, gates at 0.1 need a hundred."""
    gates = gates_of(lively("densenet-bc-16-4"), weighted=False)
    method = GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5, strength=0.01)
    gates.values.data.fill_(0.1)
    assert method.should_stop({"gates": gates}, within=110)
    assert not method.should_stop({"gates": gates}, within=20)
    assert not method.should_stop({"gates": gates})
    gates.values.data.zero_()
    assert method.should_stop({"gates": gates})


# --- the loss -------------------------------------------------------------------------------------


def teacher_of(model):
    return Run("digits", model, Recipe(2, 24, 0.05))


def kl_at(temperature, o, z):
    p, q = (log_softmax(logits / temperature, axis=1) for logits in (z, o))
    return temperature**2 * np.mean((np.exp(p) * (p - q)).sum(1))


FORMULAS = {
    "soft": lambda o, z, y: kl_at(4, o, z),
    "output": lambda o, z, y: -np.mean((softmax(z, axis=1) * log_softmax(o, axis=1)).sum(1)),
    "truth": lambda o, z, y: (
        -np.mean([log_softmax(o, axis=1)[k, label] for k, label in enumerate(y)])
    ),
}


def step_of(method, name="densenet-bc-16-4"):
    network, gates, x = doubled(name, closed=0.1)
    network.train()
    labels = torch.tensor([1, 0, 4, 2])
    teacher_logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.manual_seed(7))
    return Step(x, labels, teacher_logits, Called(network), None, {"gates": gates}, {})


@pytest.mark.parametrize("target", FORMULAS)
def test_the_loss_equals_its_formula_written_out(target):
    teacher = teacher_of("densenet-bc-16-4")
    method = GateSearch(teacher, budget=0.5, target=target, weight=2.5, strength=0.03)
    step = step_of(method)
    gates = step.aux["gates"]
    logits, terms = method.loss(step)
    expected = gated_logits(step.student.network, gates, step.x)
    torch.testing.assert_close(logits, expected)
    numbers = expected.detach().numpy(), step.teacher_logits.numpy(), step.labels.tolist()
    assert terms["loss"].item() == pytest.approx(2.5 * FORMULAS[target](*numbers), rel=1e-9)
    penalty = 0.03 * (gates.alpha.numpy() * gates.values.detach().numpy()).sum()
    assert terms["sparsity"].item() == pytest.approx(penalty, rel=1e-6)
    assert terms.keys() == {"loss", "sparsity", *(["kd"] if target == "soft" else [])}


def test_the_penalty_has_no_gradient_because_the_proximal_step_minimises_it():
    """A gradient would shrink the gates a second time."""
    teacher, gradients = teacher_of("densenet-bc-16-4"), []
    for strength in (1e-3, 10.0):
        method = GateSearch(teacher, budget=0.5, strength=strength)
        step = step_of(method)
        method.loss(step)[1]["loss"].backward()
        gradients.append(step.aux["gates"].values.grad)
    assert torch.equal(*gradients)
    gates = gates_of(lively("densenet-bc-16-4"))
    optimizer = replace(method, rate=0.02, momentum=0.8).optimizers({"gates": gates})["gates"]
    torch.testing.assert_close(optimizer.threshold, 0.02 * 10.0 * gates.alpha)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.02, 0.8)
    assert [p is gates.values for p in group["params"]] == [True]


def test_a_held_divergence_is_pushed_up_from_below():
    o, z = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    kd = kl_at(4, o.numpy(), z.numpy())
    search = GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5)
    slopes = {}
    for held_at in (0.0, 0.5 * kd, 1.5 * kd):
        logits = o.clone().requires_grad_()
        terms = replace(search, held_at=held_at).imitate(logits, z, torch.zeros(4).long())
        assert terms["loss"].item() == pytest.approx(abs(kd - held_at))
        assert terms["kd"].item() == pytest.approx(kd)
        terms["loss"].backward()
        slopes[held_at / kd] = logits.grad
    plain, above, below = slopes.values()
    assert torch.equal(above, plain)
    assert torch.equal(below, -plain)
    assert plain.any()


def test_below_a_hinge_the_divergence_is_let_alone():
    o, z = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    kd = kl_at(4, o.numpy(), z.numpy())
    search = GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5, held_by="hinge")
    for held_at, expected in ((0.0, kd), (0.5 * kd, 0.5 * kd), (1.5 * kd, 0.0)):
        logits = o.clone().requires_grad_()
        loss = replace(search, held_at=held_at).imitate(logits, z, torch.zeros(4).long())["loss"]
        assert loss.item() == pytest.approx(expected)
        loss.backward()
        assert bool(logits.grad.any()) == (expected > 0)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "hard"}, "'hard'. Known: soft, output, truth"),
        ({"held_by": "rope"}, "'rope'. Known: distance, hinge"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.0}, "budget"),
        ({"target": "truth", "held_at": 0.1}, "held"),
        ({"target": "output", "held_at": 0.1}, "held"),
        ({"momentum": 1.0}, "below"),
        ({"strength": -1}, "below"),
        ({"held_at": -1}, "below"),
        ({"rate": -0.1}, "below"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GateSearch(teacher_of("densenet-bc-16-4"), **{"budget": 0.5, **settings})


def test_a_search_starts_as_its_teacher_and_takes_a_network_that_has_gates():
    teacher, refused = teacher_of("resnet8-x0.25"), teacher_of("wrn-10-1-x0.25")
    method = GateSearch(teacher, budget=0.5)
    search = replace(teacher, method=method, start=teacher)
    assert search.method == method
    for start in (None, replace(teacher, seed=1)):
        with pytest.raises(ValueError, match="starts as its teacher"):
            replace(teacher, method=method, start=start)
    with pytest.raises(ValueError, match="no gates for a"):
        replace(refused, method=GateSearch(refused, budget=0.5), start=refused)
    with pytest.raises(ValueError, match="cannot be a teacher"):
        KD(search)


def test_only_the_target_truth_needs_no_teacher_logits():
    teacher = teacher_of("densenet-bc-16-4")
    assert [GateSearch(teacher, budget=0.5, target=t).needs_logits for t in FORMULAS] == [1, 1, 0]
