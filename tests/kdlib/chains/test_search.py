"""GateSearch as a run: both optimizers, the log of the gated network, and an early end."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from found_students import MODEL, TEACHER, modules_of, search
from gated import gated_convolutions
from helpers import batches, final_weights, new_trainer, same_log
from torch.nn import functional as F

from kdlib import KD, GateSearch, load_data, store, train
from kdlib.chains.found import extract
from kdlib.engine.trainer import Trainer
from kdlib.errors import NotFinite
from kdlib.methods.route import OneStage
from kdlib.models.architecture import Architecture
from kdlib.store import fingerprint

pytestmark = pytest.mark.usefixtures("teacher_is_trained")


@pytest.fixture
def steps_taken(monkeypatch):
    """The list of (epoch, share of the cost that is open) after every step from now on."""
    taken, advance = [], Trainer.advance

    def note(trainer):
        advance(trainer)
        if "gates" in trainer.state.modules:
            taken.append((trainer.epoch + 1, trainer.state.modules["gates"].share()))

    monkeypatch.setattr(Trainer, "advance", note)
    return taken


def test_a_search_begins_as_its_teacher_with_all_gates_open():
    modules = new_trainer(search()).state.modules
    weights = store.find_record(TEACHER).model().state_dict()
    assert fingerprint(modules["student"].state_dict()) == fingerprint(weights)
    assert modules["gates"].values.unique().tolist() == [1]


def test_training_equals_a_plain_loop_of_both_optimizers():
    """While all gates are open, activations are multiplied; the penalty is a soft threshold."""
    run = search(epochs=2, budget=0.01, strength=0.02, temperature=3.0)
    modules = modules_of(train([run])[0])
    images, teacher = load_data("digits").first(128), store.find_record(TEACHER).model()
    model = store.find_record(TEACHER).model().train().requires_grad_(True)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    layers = [layer for _, layer in gated_convolutions(model)]
    gates = [torch.ones(layer.in_channels, requires_grad=True) for layer in layers]
    velocity = [torch.zeros_like(gate) for gate in gates]
    alpha = modules["gates"].alpha.split(list(map(len, gates)))
    for layer, gate in zip(layers, gates, strict=True):
        layer.register_forward_pre_hook(
            lambda _, args, gate=gate: (args[0] * gate.view(1, -1, 1, 1),)
        )
    for _, index, view in batches(run, images):
        x = images.batch(index, view)
        p, q = ((z / 3).log_softmax(1) for z in (teacher(x), model(x)))
        loss = 10 * 9 * (p.exp() * (p - q)).sum(1).mean()
        optimizer.zero_grad()
        slopes = torch.autograd.grad(loss, [*model.parameters(), *gates])
        for weight, slope in zip(model.parameters(), slopes, strict=False):
            weight.grad = slope
        optimizer.step()
        with torch.no_grad():
            last = slopes[-len(gates) :]
            for gate, slope, v, a in zip(gates, last, velocity, alpha, strict=True):
                z = gate - 0.01 * slope
                shrunk = z.sign() * (z.abs() - 0.01 * 0.02 * a).clamp(min=0)
                v.copy_(shrunk - gate + 0.9 * v)
                gate.copy_((shrunk + 0.9 * v).clamp(min=0))
    got = modules["student"].state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-4, msg=name)
    gates = torch.cat(gates).detach()
    torch.testing.assert_close(modules["gates"].values.data, gates, rtol=1e-4, atol=1e-5)
    assert (gates > 0).all()
    assert (gates - 1).abs().max() > 0.05


def test_the_log_is_that_of_the_gated_network():
    trained = train([search(epochs=2, budget=0.01)])[0]
    assert trained.epochs == trained.epochs_used == 2
    assert "stopped_after" not in trained.summary
    test, modules = load_data("digits", "test"), modules_of(trained)
    gates = modules["gates"]
    with torch.no_grad():
        x = test.batch(torch.arange(len(test)))
        without_gates, logits = modules["student"](x), extract(trained)(x)
    assert not torch.allclose(without_gates, logits, rtol=1e-2)
    top1 = 100 * (logits.argmax(1) == test.labels).float().mean().item()
    ce = F.cross_entropy(logits, test.labels).item()
    row = trained.final
    assert row["test_top1"] == pytest.approx(top1, abs=1e-3)
    assert row["test_ce"] == pytest.approx(ce, rel=1e-4)
    assert row["open_gates"] == (gates.values > 0).sum()
    assert row["macs"] == gates.macs()
    assert row["macs_share"] == pytest.approx(gates.macs() / gates.channels.total_macs)
    assert row["train_kd"] == pytest.approx(row["train_loss"] / 10, rel=1e-5)


# --- the end --------------------------------------------------------------------------------------


def test_a_search_ends_with_the_step_that_reaches_its_budget(steps_taken, monkeypatch):
    seen, loss = [], GateSearch.loss

    def note(method, step):
        logits, terms = loss(method, step)
        seen.append(terms["kd"].item())
        return logits, terms

    monkeypatch.setattr(GateSearch, "loss", note)
    trained = train([search()])[0]
    shares = [share for _, share in steps_taken]
    assert all(share > 0.5 for share in shares[:-1])
    assert shares[-1] <= 0.5
    assert trained.final["macs_share"] == shares[-1]
    last = sum(epoch == trained.epochs for epoch, _ in steps_taken)
    assert 0 < last < 8
    assert trained.epochs < 6
    assert trained.summary["stopped_after"] == trained.epochs_used == trained.epochs - 1 + last / 8
    assert trained.final["train_kd"] == pytest.approx(np.mean(seen[-last:]), rel=1e-5)


@pytest.mark.parametrize("within", [False, True])
def test_the_answer_before_an_epoch_changes_only_when_the_search_ends(
    steps_taken, elsewhere, monkeypatch, within
):
    """False: it ends with its epoch. True: the steps before the end stay the same."""
    run, stop = search(), GateSearch.should_stop
    trained = train([run])[0]
    steps_taken.clear()
    monkeypatch.setattr(
        GateSearch,
        "should_stop",
        lambda method, modules, within_=0, **k: (
            within if (within_ or k.get("within")) else stop(method, modules)
        ),
    )
    (other,) = elsewhere(run)
    assert other.final["macs_share"] <= 0.5
    if within:
        assert final_weights(other) == final_weights(trained)
        assert same_log(other, trained)
    else:
        assert len(steps_taken) == 8 * other.epochs
        assert other.epochs < 6
        assert (other.log.macs_share[:-1] > 0.5).all()


@pytest.mark.usefixtures("all_is_trained")
def test_a_search_that_ended_early_is_complete(epochs_trained):
    run = search()
    first = store.find_record(run)
    assert first.epochs < run.recipe.epochs
    assert first.summary["weights"].keys() == {"6"}
    for options in ({}, {"weights": True}):
        again = train([run], **options)[0]
        assert (again.summary, again.epochs) == (first.summary, first.epochs)
    assert not epochs_trained
    assert not (store.folder(run) / "state.safetensors").exists()


def test_epochs_to_keep_after_the_end_of_a_search_are_not_missed(epochs_trained):
    run = replace(search(), keep=range(1, 7))
    trained = train([run])[0]
    weights = trained.summary["weights"]
    assert weights.keys() == {str(epoch) for epoch in range(1, trained.epochs + 1)} | {"6"}
    assert weights[str(trained.epochs)] == weights["6"]
    epochs_trained.clear()
    train([run], weights=True)
    assert not epochs_trained
    store.weights_path(run, 1).unlink()
    with pytest.warns(UserWarning, match="is trained again"):
        train([run])
    assert len(epochs_trained) == trained.epochs


@pytest.mark.usefixtures("all_is_trained")
def test_a_short_record_without_an_early_end_is_ignored():
    trained = store.find_record(search())
    summary = {k: v for k, v in trained.summary.items() if k != "stopped_after"}
    store.write_record(trained.run, trained.rows, summary)
    with pytest.warns(UserWarning, match="epochs are missing"):
        assert store.find_record(trained.run) is None


@pytest.mark.parametrize(
    "settings",
    [{}, {"budget": 0.01, "held_at": 0.02, "weighted": False}],
    ids=["reaches its budget", "held, above its budget"],
)
def test_a_resumed_search_equals_an_uninterrupted_one(assert_resumes, settings):
    assert_resumes(search(epochs=3, **{"strength": 0.15, **settings}))


def test_parallel_searches_end_independently(tiny, elsewhere):
    runs = [search(), search(seed=1, strength=0.4), tiny(epochs=4, batch=16)]
    alone = elsewhere(*runs, parallel=1)
    together = train(runs, parallel=3)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))
    assert len({trained.epochs for trained in together}) > 1


@pytest.mark.parametrize("settings", [{}, {"epochs": 1, "budget": 0.01}])
def test_weights_that_are_not_finite_in_the_end_have_no_record(monkeypatch, settings):
    evaluate, run = Trainer._evaluate, search(**settings)
    monkeypatch.setattr(Trainer, "_evaluate", lambda *to: evaluate(*to) | {"test_ce": math.nan})
    with pytest.raises(NotFinite):
        train([run])
    assert store.find_record(run) is None


# --- a student that needs its gates ---------------------------------------------------------------


@pytest.mark.usefixtures("all_is_trained")
def test_the_student_of_a_search_does_not_work_alone():
    with pytest.raises(ValueError, match="extract"):
        store.find_record(search()).model()
    with pytest.raises(ValueError, match="saves no logits"):
        replace(search(), save_logits=True)
    with pytest.raises(ValueError, match="start cannot be"):
        replace(TEACHER, start=search())
    with pytest.raises(ValueError, match="cannot be a teacher"):
        KD(replace(search(), method=OneStage(search().method, gap=1)))


def test_a_search_inside_a_found_network_is_refused():
    name = Architecture(MODEL, ()).name
    with pytest.raises(ValueError, match="search"):
        replace(search(), model=name, start=replace(TEACHER, model=name))
