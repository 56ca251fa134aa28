"""Search for a student: its gates, how they move, and the loss that its weights follow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gated import (
    BOTTLENECKS,
    SMALL,
    InItsOwn,
    close,
    gated_convolutions,
    gated_logits,
    gates_of,
    images,
    lively,
    values_of,
)
from scipy.special import log_softmax, softmax

from kdlib import KD, GateSearch, Recipe, Run, build_model
from kdlib.methods import Step
from kdlib.methods.gates import AcceleratedProximal, Gates, soft_threshold
from kdlib.models.channels import Channels

CPU = torch.device("cpu")


# --- how gates move -------------------------------------------------------------------------------


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


def test_soft_threshold_moves_towards_zero_and_stops_there(random):
    x = random.normal(0, 1, 200)
    for threshold in (0.0, 0.3, 10.0):
        got = soft_threshold(torch.tensor(x), threshold).numpy()
        np.testing.assert_allclose(got, shrink(x, threshold), rtol=0, atol=1e-16)
    each = np.abs(random.normal(0, 1, 200))
    got = soft_threshold(torch.tensor(x), torch.tensor(each)).numpy()
    np.testing.assert_allclose(got, shrink(x, each), rtol=0, atol=1e-16)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_gates_move_as_the_equation_says_step_by_step(random, momentum):
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


def test_momentum_goes_on_from_step_to_step():
    gradients = np.full((40, 1), 0.1)
    path, velocity = moved(np.ones(1), gradients, np.array([0.0]))
    without, _ = moved(np.ones(1), gradients, np.array([0.0]), momentum=0.0)
    steps = -np.diff(path[:, 0], prepend=1.0)
    assert without[-1, 0] == pytest.approx(1 - 40 * 0.001)
    assert velocity[0] < -0.005
    assert steps[-1] == pytest.approx(0.001 / (1 - 0.9), rel=0.05)  # ten times that of one step
    assert (np.diff(steps[1:]) > 0).all()


def test_a_gate_without_gradient_closes_at_the_pace_that_the_paper_needs():
    """η·λ₂·α/(1 - μ) a step: 26 epochs of 391 steps at the paper's settings and α = 1."""
    path, _ = moved(np.ones(1), np.zeros((1200, 1)), np.array([0.01 * 1e-2]))  # ten times as fast
    closed = int((path[:, 0] > 0).sum())
    assert closed == pytest.approx(26 * 39.1, rel=0.03)


def test_gates_settle_at_the_sparse_minimum_of_a_quadratic(random):
    """½Σ c(g - b)² + λΣ αg for g ≥ 0 has its minimum at max(0, b - λα/c)."""
    b, c, alpha = random.normal(0.5, 1, 50), random.uniform(0.5, 4, 50), random.uniform(0, 2, 50)
    rate, strength = 0.05, 0.4
    gate = torch.nn.Parameter(torch.ones(50, dtype=torch.float64))
    optimizer = AcceleratedProximal([gate], torch.tensor(rate * strength * alpha), rate)
    for _ in range(2000):
        gate.grad = torch.tensor(c) * (gate.detach() - torch.tensor(b))
        optimizer.step()
    expected = np.maximum(0, b - strength * alpha / c)
    np.testing.assert_allclose(gate.detach().numpy(), expected, atol=1e-9)
    assert 5 < (expected == 0).sum() < 45
    assert ((gate.detach().numpy() == 0) == (expected == 0)).all()


def test_coupled_gates_settle_where_no_direction_improves(random):
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


def scaled_twin(gradients, scale, overflow=()):
    """The same steps with gradients as a GradScaler leaves them; infinite ones in between."""
    gate = torch.nn.Parameter(torch.ones(gradients.shape[1], dtype=torch.float64))
    optimizer = AcceleratedProximal([gate], torch.tensor(0.001), 0.01)
    for k, gradient in enumerate(gradients):
        optimizer.grad_scale = torch.tensor(scale)
        if k in overflow:
            before = gate.detach().clone(), optimizer.state[gate]["momentum_buffer"].clone()
            gate.grad = torch.full_like(gate, torch.inf)
            gate.grad[0] = torch.nan
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            assert torch.equal(gate, before[0])
            assert torch.equal(optimizer.state[gate]["momentum_buffer"], before[1])
        gate.grad = scale * torch.tensor(gradient)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
    return gate.detach().numpy()


def test_scaled_gradients_move_gates_as_plain_ones_and_an_overflow_not_at_all(random):
    gradients = random.normal(0, 3, (12, 9))
    plain, _ = moved(np.ones(9), gradients, 0.001)
    assert (scaled_twin(gradients, 1024.0) == plain[-1]).all()
    assert (scaled_twin(gradients, 1024.0, overflow=(1, 5)) == plain[-1]).all()


def test_gates_may_overflow_in_their_very_first_step():
    gate = torch.nn.Parameter(torch.ones(3))
    optimizer = AcceleratedProximal([gate], torch.tensor(0.001), 0.01)
    gate.grad = torch.tensor([torch.inf, 1.0, torch.nan])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(gate, torch.ones(3))
    assert torch.equal(optimizer.state[gate]["momentum_buffer"], torch.zeros(3))


def test_a_real_scaler_hands_its_scale_over():
    gates = []
    for enabled in (False, True):
        gate = torch.nn.Parameter(torch.tensor([1.0, 0.5]))
        optimizer = AcceleratedProximal([gate], torch.tensor(0.001), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for factor in (3.0, torch.inf, -2.0) if enabled else (3.0, -2.0):
            gate.grad = None
            scaler.scale((factor * gate).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        gates.append(gate.detach())
    assert torch.equal(*gates)


# --- gates on a network ---------------------------------------------------------------------------


def explicit_logits(network, values, x):
    """Every convolution's input multiplied by its gates before it is read."""
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


def alive(gates):
    """Whether every layer has an open gate."""
    return all(part.any() for part in values_of(gates).values())


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


@pytest.mark.parametrize("name", [*SMALL, BOTTLENECKS])
def test_gates_at_one_change_nothing(name):
    network, gates, x = doubled(name)
    gates.values.data.fill_(1)
    assert torch.equal(gated_logits(network, gates, x), network(x))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_open_gates_and_weights_are_those_of_the_multiplication(name):
    network, gates, x = doubled(name)
    network.train()
    wanted = [gates.values, *network.parameters()]
    logits = gated_logits(network, gates, x), explicit_logits(network, gates.values, x)
    got, expected = (torch.autograd.grad(z.square().sum(), wanted) for z in logits)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    assert all(part.any() for part in got[0].split(gates.channels.sizes))


@pytest.mark.parametrize("name", SMALL)
def test_a_closed_gate_still_feels_the_loss(name):
    """Its slope at 0 is what may open it again."""
    network, gates, x = doubled(name)
    for part in values_of(gates).values():
        part[0] = 0
    assert alive(gates)
    logits = gated_logits(network, gates, x), explicit_logits(network, gates.values, x)
    got, expected = (torch.autograd.grad(z.square().sum(), gates.values)[0] for z in logits)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
    assert expected[gates.values == 0].any()


@pytest.mark.parametrize("dead", ["body.0.0", "body.1.4", "body.2.4"])
def test_what_a_layer_without_inputs_puts_out_counts_as_closed(dead):
    """It is a constant, which would be left behind if it were taken out."""
    network, gates, x = doubled("densenet-bc-16-4")
    everywhere = [reader.name for reader in gates.channels.gated]
    close(gates, f"{dead}.conv1")
    got = gated_logits(network, gates, x)
    close(gates, f"{dead}.conv2")
    close(gates, *everywhere, source=f"{dead}.conv2")
    if dead == "body.2.4":  # the head reads it, too, after the eight channels of a transition
        assert not torch.allclose(got, explicit_logits(network, gates.values, x))
        network.get_submodule("head.2.2").weight.data[:, 8:12] = 0
    expected = explicit_logits(network, gates.values, x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_of_a_residual_block_without_inputs_the_shortcut_remains():
    network, gates, x = doubled("resnet14-x0.25")
    block = network.body[1][1]
    close(gates, "body.1.1.convs.1")
    got = gated_logits(network, gates, x)
    block.norms[1].weight.data.zero_()
    block.norms[1].bias.data.zero_()
    torch.testing.assert_close(got, explicit_logits(network, gates.values, x))
    assert block.norms[0].bias.any()


@pytest.mark.parametrize("name", SMALL)
def test_gates_weigh_what_closing_them_saves(name):
    network = lively(name)
    gates = gates_of(network)
    savings = torch.tensor(gates.channels.savings(), dtype=torch.float64)
    assert gates.alpha.mean().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(gates.alpha.double() * savings.mean(), savings, rtol=1e-5, atol=0)
    assert gates_of(network, weighted=False).alpha.unique().tolist() == [1]


def test_gates_start_open_and_only_they_are_to_be_learned():
    network = lively("densenet-bc-16-4")
    method = GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5)
    gates = method.parts(network, None, images())["gates"]
    assert gates.values.tolist() == [1] * sum(gates.channels.sizes)
    assert [name for name, _ in gates.named_parameters()] == ["values"]
    assert list(gates.state_dict()) == ["values"]
    assert method.told({"gates": gates})["macs_share"] == 1
    assert not method.may_stop({"gates": gates}, steps=1)


def test_an_epoch_is_watched_where_the_penalty_alone_may_reach_the_budget():
    """At η·λ₂·α/(1 - μ) a step, 1e-3 here, gates at 0.1 need a hundred."""
    gates = gates_of(lively("densenet-bc-16-4"), weighted=False)
    method = GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5, strength=0.01)
    gates.values.data.fill_(0.1)
    assert method.may_stop({"gates": gates}, steps=110)
    assert not method.may_stop({"gates": gates}, steps=20)
    assert not method.arrived({"gates": gates})
    gates.values.data.zero_()
    assert method.arrived({"gates": gates})


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
    targets = torch.randn(4, 5, dtype=torch.float64, generator=torch.manual_seed(7))
    student, part = (InItsOwn(m, CPU, torch.float64) for m in (network, gates))
    return Step(x, labels, targets, student, None, {"gates": part}, {})


@pytest.mark.parametrize("target", FORMULAS)
def test_the_loss_equals_its_formula_written_out(target):
    teacher = teacher_of("densenet-bc-16-4")
    method = GateSearch(teacher, budget=0.5, target=target, weight=2.5, strength=0.03)
    step = step_of(method)
    gates = step.parts["gates"].network
    logits, terms = method.loss(step)
    expected = gated_logits(step.student.network, gates, step.x)
    torch.testing.assert_close(logits, expected)
    numbers = expected.detach().numpy(), step.targets.numpy(), step.labels.tolist()
    assert terms["loss"].item() == pytest.approx(2.5 * FORMULAS[target](*numbers), rel=1e-9)
    penalty = 0.03 * (gates.alpha.numpy() * gates.values.detach().numpy()).sum()
    assert terms["sparsity"].item() == pytest.approx(penalty, rel=1e-6)
    assert terms.keys() == {"loss", "sparsity", *(["kd"] if target == "soft" else [])}


def test_the_penalty_is_left_to_the_proximal_step():
    """A gradient of it would shrink the gates a second time."""
    teacher, gradients = teacher_of("densenet-bc-16-4"), []
    for strength in (1e-3, 10.0):
        method = GateSearch(teacher, budget=0.5, strength=strength)
        step = step_of(method)
        method.loss(step)[1]["loss"].backward()
        gradients.append(step.parts["gates"].network.values.grad)
    assert torch.equal(*gradients)
    gates = gates_of(lively("densenet-bc-16-4"))
    optimizer = replace(method, rate=0.02, momentum=0.8).optimizers({"gates": gates})["gates"]
    torch.testing.assert_close(optimizer.threshold, 0.02 * 10.0 * gates.alpha)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.02, 0.8)
    assert [p is gates.values for p in group["params"]] == [True]


def test_a_divergence_is_held_by_pushing_it_up_from_below():
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


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": "hard"}, "'hard', but soft, output, truth"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.0}, "budget"),
        ({"budget": -0.2}, "budget"),
        ({"target": "truth", "held_at": 0.1}, "held"),
        ({"target": "output", "held_at": 0.1}, "held"),
    ],
)
def test_searches_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        GateSearch(teacher_of("densenet-bc-16-4"), **{"budget": 0.5, **settings})


def test_a_search_starts_as_its_teacher_and_takes_a_network_that_has_gates():
    teacher, refused = teacher_of("resnet8-x0.25"), teacher_of("wrn-10-1-x0.25")
    method = GateSearch(teacher, budget=0.5)
    search = replace(teacher, method=method, start=teacher)
    assert search.method == method
    for start in (None, replace(teacher, seed=1)):
        with pytest.raises(ValueError, match="begins as its teacher"):
            replace(teacher, method=method, start=start)
    with pytest.raises(ValueError, match="no gates for a"):
        replace(refused, method=GateSearch(refused, budget=0.5), start=refused)
    with pytest.raises(ValueError, match="is no teacher"):
        KD(search)


@pytest.mark.parametrize(
    "setting", [{"momentum": 1.0}, {"strength": -1}, {"held_at": -1}, {"rate": -0.1}]
)
def test_a_number_out_of_its_range_is_refused(setting):
    with pytest.raises(ValueError, match="below"):
        GateSearch(teacher_of("densenet-bc-16-4"), budget=0.5, **setting)


def test_only_the_truth_needs_no_labels_of_a_teacher():
    teacher = teacher_of("densenet-bc-16-4")
    assert [GateSearch(teacher, budget=0.5, target=t).labelled for t in FORMULAS] == [1, 1, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 0.4},
        {"strength": 0.01},
        {"weight": 2.0},
        {"weighted": False},
        {"target": "output"},
        {"temperature": 2.0},
        {"held_at": 0.1},
        {"rate": 0.02},
        {"momentum": 0.5},
    ],
)
def test_every_part_of_a_search_changes_the_id(change):
    teacher = teacher_of("densenet-bc-16-4")
    search = GateSearch(teacher, budget=0.5)
    methods = (search, replace(search, **change))
    runs = [replace(teacher, method=method, start=teacher) for method in methods]
    assert runs[0].id != runs[1].id


def test_the_last_gate_of_a_neck_stays_and_no_other():
    gates = torch.nn.Parameter(torch.tensor([0.3, 0.5, 0.4, 0.2, 0.1]))
    optimizer = AcceleratedProximal([gates], torch.full((5,), 10.0), necks=[(0, 3)])
    gates.grad = torch.zeros(5)
    for _ in range(3):
        optimizer.step()
        assert gates.tolist() == pytest.approx([0, 0.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "layers"),
    [("densenet-bc-16-4", ["body.1.2", "body.2.2"]), ("resnet8-x0.25", []), ("vgg13-x0.0625", 9)],
)
def test_necks_are_on_the_first_connection_of_what_nothing_leads_around(name, layers):
    channels = Channels(build_model(name, classes=10, seed=0), image_size=16)
    begins = np.cumsum([0, *channels.sizes[:-1]]).tolist()
    gated = dict(zip(begins, channels.gated, strict=True))
    named = [gated[begin].name for begin, _ in channels.necks]
    assert layers in (named, len(named))
    for begin, end in channels.necks:
        assert end - begin == gated[begin].inputs[0].channels


def test_a_network_is_left_though_all_layers_of_a_block_die():
    """The transition's largest gate reads one of them: it is another that stays."""
    gates = Gates(Channels(build_model("densenet-bc-16-4", classes=10, seed=0), image_size=16))
    parts = gates.channels.split(np.full(sum(gates.channels.sizes), 0.5, np.float32))
    for name in ("body.1.2", "body.2.2"):
        parts[name][-4:] = 0.9  # of the block's last layer
    gates.values.data = torch.tensor(np.concatenate([*parts.values()]))
    settings = {"necks": gates.channels.necks}
    optimizer = AcceleratedProximal([gates.values], torch.full_like(gates.values, 10), **settings)
    gates.values.grad = torch.zeros_like(gates.values)
    optimizer.step()
    assert gates.macs() > 0
