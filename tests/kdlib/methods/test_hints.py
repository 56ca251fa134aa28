"""Learning from a teacher's features: the loss, the adapter, and the teacher itself in the step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import batches, final_weights, new_trainer, parts_fingerprint, parts_of, same_log
from scipy.special import logsumexp
from torch import nn
from torch.nn import functional as F

from kdlib import build_model, load_data, store, train
from kdlib.engine.plan import mix
from kdlib.engine.teachers import Teachers
from kdlib.engine.trainer import Trainer
from kdlib.methods import Hint, Step
from kdlib.methods.route import OneStage, multi_stage
from kdlib.models.precision import AutocastNetwork
from kdlib.store import fingerprint

CPU = torch.device("cpu")


# --- the loss -------------------------------------------------------------------------------------


def step_of(student, teacher, method, size=32):
    """A batch of three images, and what a lane would hand the loss."""
    torch.manual_seed(0)
    x, labels = torch.randn(3, 1, size, size), torch.tensor([1, 0, 4])
    networks = [build_model(name, 5, 1, seed=k).eval() for k, name in enumerate((student, teacher))]
    networks[1].requires_grad_(False)
    parts = method.parts(*networks, x)
    wrapped = [AutocastNetwork(network, CPU, torch.float32) for network in networks]
    parts = {name: AutocastNetwork(part, CPU, torch.float32) for name, part in parts.items()}
    return Step(x, labels, None, *wrapped, parts, frozen={}), networks


def pooled(feature, size):
    """Mean of equal squares, ``[b, c, h, w]`` to ``[b, c, size, size]``."""
    b, c, h, _ = feature.shape
    return feature.reshape(b, c, size, h // size, size, h // size).mean((3, 5))


PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25"),
    "other channels": ("resnet8-x0.25", "resnet14-x0.5"),
    "student's map is larger": ("resnet8-x0.25", "mobilenetv2-t1-w0.1"),
    "teacher's map is larger": ("mobilenetv2-t1-w0.1", "resnet14-x0.25"),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_loss_equals_its_formula_written_out(tiny, pair):
    method = Hint(tiny(), ce_weight=0.3, hint_weight=2.0)
    step, (student, teacher) = step_of(*PAIRS[pair], method)
    logits, terms = method.loss(step)
    ours, theirs = (
        network.until(len(network.body), step.x).detach().double().numpy()
        for network in (student, teacher)
    )
    size = min(ours.shape[2], theirs.shape[2])
    assert (ours.shape[2] > size, theirs.shape[2] > size) == (
        pair.startswith("student's"),
        pair.startswith("teacher's"),
    )
    if "adapter" in step.parts:
        adapter = step.parts["adapter"].network
        kernel = adapter.weight.detach().double().numpy()[:, :, 0, 0]
        bias = adapter.bias.detach().double().numpy()
        ours = np.einsum("oi,bihw->bohw", kernel, ours) + bias[:, None, None]
    hint = np.mean((pooled(ours, size) - pooled(theirs, size)) ** 2)
    z = student(step.x).detach().double().numpy()
    ce = np.mean([logsumexp(z[k]) - z[k, label] for k, label in enumerate(step.labels)])
    torch.testing.assert_close(logits, student(step.x))
    assert terms["hint"].item() == pytest.approx(hint, rel=1e-5)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(0.3 * ce + 2.0 * hint, rel=1e-5)
    assert hint > 1e-6


@pytest.mark.parametrize("pair", PAIRS)
def test_there_is_an_adapter_only_where_channels_differ(tiny, pair):
    step, (student, teacher) = step_of(*PAIRS[pair], Hint(tiny()))
    ours, theirs = (n.stages(step.x)[-1].shape[1] for n in (student, teacher))
    assert ("adapter" in step.parts) == (pair != "equal") == (ours != theirs)
    if "adapter" in step.parts:
        assert step.parts["adapter"].network.weight.shape == (theirs, ours, 1, 1)


@pytest.mark.parametrize("pair", ["equal", "other channels"])
def test_gradients_reach_student_and_adapter_but_not_the_teacher(tiny, pair):
    method = Hint(tiny(), ce_weight=0.0)
    step, (student, teacher) = step_of(*PAIRS[pair], method)
    teacher.requires_grad_(True)
    method.loss(step)[1]["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.any() for p in student.body.parameters())
    assert all(p.grad.any() for name in step.parts for p in step.parts[name].network.parameters())


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tiny):
    """Twice as wide as the student: it needs an adapter from 16 to 32 channels."""
    return tiny(epochs=3, model="resnet8-x0.5", keep=(1, 2))


def first_adapter(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", seed))
        return nn.Conv2d(16, 32, kernel_size=1)


def adapter_of(trained):
    tensors = parts_of(trained)
    assert tensors.keys() == {"adapter.weight", "adapter.bias"}
    return tensors


def test_training_equals_a_plain_pytorch_loop(tiny, teacher):
    run = tiny(milestones=(1,), method=Hint(teacher, at=2, ce_weight=0.5, hint_weight=3.0), seed=4)
    trained = train([run])[0]
    taught_by, images = store.find_record(teacher).model(2), load_data("digits").first(128)
    model = build_model(run.model, classes=10, channels=1, seed=mix("weights", 4)).train()
    model, adapter = model.to(memory_format=torch.channels_last), first_adapter(seed=4)
    parameters = [*model.parameters(), *adapter.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch, index, view in batches(run, images):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 1 else 0.005
        x = images.batch(index, view)
        feature = model.until(3, x)
        hint = (adapter(feature) - taught_by.until(3, x)).square().mean()
        ce = F.cross_entropy(model.head(feature), images.labels[index])
        optimizer.zero_grad()
        (0.5 * ce + 3 * hint).backward()
        optimizer.step()
    got, kept = trained.model().state_dict(), adapter_of(trained)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    for name, expected in adapter.state_dict().items():
        torch.testing.assert_close(kept[f"adapter.{name}"], expected, rtol=1e-5, atol=1e-6)


def test_the_adapter_moves_and_is_no_part_of_the_student(tiny, teacher):
    trained, plain = train([tiny(method=Hint(teacher)), tiny()])
    kept, before = adapter_of(trained), first_adapter()
    assert not torch.equal(kept["adapter.weight"], before.weight)
    assert not torch.equal(kept["adapter.bias"], before.bias)
    assert trained.model().state_dict().keys() == plain.model().state_dict().keys()


def test_without_an_adapter_nothing_is_kept_beside_the_student(tiny):
    trained = train([tiny(method=Hint(tiny(model="resnet14-x0.25")))])[0]
    assert parts_of(trained) == {}


def test_teachers_are_bit_identical_after_their_students_trained(tiny, teacher, monkeypatch):
    before = train([teacher])[0]
    alive, enliven = [], Teachers.enliven

    def note(teachers, *arguments):
        enliven(teachers, *arguments)
        alive.append(teachers.live)

    monkeypatch.setattr(Teachers, "enliven", note)
    train([tiny(method=Hint(teacher))])
    assert fingerprint(before.model().state_dict()) == final_weights(before)
    assert {fingerprint(network.state_dict()) for network in alive} == {final_weights(before)}
    assert not any(module.training for module in alive[-1].modules())


def test_the_log_says_how_far_the_student_is_from_its_teachers_logits(tiny, teacher):
    trained = train([tiny(method=Hint(teacher))])[0]
    test = load_data("digits", "test")
    x = test.batch(torch.arange(len(test)))
    networks = trained.model(), store.find_record(teacher).model()
    logits, taught = (network(x).log_softmax(1) for network in networks)
    kl = F.kl_div(logits, taught, reduction="batchmean", log_target=True)
    assert trained.final["test_kl"] == pytest.approx(kl.item(), rel=1e-4)
    log = trained.log
    assert log.train_loss.tolist() == pytest.approx((log.train_ce + log.train_hint).tolist())


def test_a_resumed_run_equals_an_uninterrupted_one(tiny, teacher, assert_resumes):
    run = tiny(epochs=3, milestones=(1,), method=OneStage(Hint(teacher), gap=1))
    assert_resumes(run)


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, teacher, elsewhere):
    runs = [
        tiny(seed=seed, method=method)
        for seed, method in enumerate([Hint(teacher), OneStage(Hint(teacher), gap=1)])
    ]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=2)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))


# --- along a route --------------------------------------------------------------------------------


def test_one_anchor_for_all_epochs_is_the_plain_hint_to_the_bit(tiny, teacher):
    plain, one = train(
        [tiny(epochs=3, method=m) for m in (Hint(teacher), OneStage(Hint(teacher), gap=3))]
    )
    assert final_weights(one) == final_weights(plain)
    assert parts_fingerprint(one) == parts_fingerprint(plain)
    assert same_log(one, plain)


def test_each_epoch_learns_from_its_own_anchor(tiny, teacher, monkeypatch):
    live, begin = [], Trainer.begin_epoch

    def note(lane):
        begin(lane)
        if lane.teachers.live:
            weights = lane.teachers.live.state_dict()
            live.append((fingerprint(weights), weights["stem.0.weight"].data_ptr()))

    monkeypatch.setattr(Trainer, "begin_epoch", note)
    route, first = train(
        [
            tiny(epochs=3, method=OneStage(Hint(teacher), gap=1)),
            tiny(epochs=3, method=Hint(teacher, at=1)),
        ]
    )
    kept = store.find_record(teacher).summary["weights"]
    assert route.summary["teachers"] == {f"{teacher.id}@{k}": kept[str(k)] for k in (1, 2, 3)}
    assert [weights for weights, _ in live[:3]] == [kept["1"], kept["2"], kept["3"]]
    assert len({address for _, address in live[:3]}) == 1  # where a captured step reads
    columns = ["train_loss", "train_hint", "test_ce", "test_kl"]
    assert route.log[columns].iloc[0].equals(first.log[columns].iloc[0])
    assert (route.log[columns][1:] != first.log[columns][1:]).all(axis=None)


def test_later_stages_go_on_with_the_adapter_of_the_one_before(tiny, teacher):
    stages = multi_stage(tiny(method=Hint(teacher), seed=1), (1, 3))
    first, second = train(stages)
    lane = new_trainer(second.run)
    student = lane.state.networks["student"].state_dict()
    assert fingerprint(student) == fingerprint(store.find_record(first.run).model().state_dict())
    adapter = lane.state.networks["adapter"].state_dict()
    assert torch.equal(adapter["weight"], adapter_of(first)["adapter.weight"])
    assert not torch.equal(adapter["weight"], first_adapter(seed=1).weight)
    assert parts_fingerprint(second) != parts_fingerprint(first)


def test_a_stage_whose_start_lost_its_adapter_makes_it_again(tiny, teacher):
    first, second = multi_stage(tiny(method=Hint(teacher), seed=1), (1, 3))
    train([first])
    store.weights_path(first, 2).unlink()
    assert store.find_record(second) is None
    assert final_weights(train([second])[0])


@pytest.mark.parametrize("change", [{"hint_weight": 2.0}, {"ce_weight": 0.5}, {"at": 1}])
def test_every_part_of_a_hint_changes_the_id(tiny, teacher, change):
    method = Hint(teacher)
    assert tiny(method=replace(method, **change)).id != tiny(method=method).id
