"""Students found inside their teacher: the search as a run, what it finds, how that is trained."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from gated import gated_convolutions
from helpers import batches, final_weights, new_trainer, same_log
from kdbook.costs import channels_of, cost_of, latencies
from torch.nn import functional as F

from kdbook.exhibits import Exhibit
from kdbook.profiles import open_profile
from kdbook.search import drop_rates
from kdlib import (
    KD,
    CrossEntropy,
    FoundStudent,
    GateSearch,
    Recipe,
    Run,
    build_model,
    count_cost,
    load_data,
    measure,
    store,
    train,
)
from kdlib.chains.found import RandomStudent, architecture, extract, kept_channels
from kdlib.engine import pool as pool_module
from kdlib.engine.state import trained_networks
from kdlib.engine.trainer import Trainer
from kdlib.errors import NotFinite, NothingFound
from kdlib.files import home, results
from kdlib.methods.gates import _refuse_without_gates
from kdlib.methods.route import OneStage
from kdlib.models.architecture import (
    MARK,
    Architecture,
    file_of,
    load_architecture,
    random_architecture,
)
from kdlib.models.channels import Channels
from kdlib.store import fingerprint

MODEL = "densenet-bc-16-4"


TEACHER = Run("digits", MODEL, Recipe(2, 16, 0.05), images=128)


def search(epochs=6, seed=0, **settings):
    """A run that searches; as it is here it arrives within its third epoch of eight steps."""
    settings = {"budget": 0.5, "strength": 0.2, "weight": 10.0, **settings}
    method, recipe = GateSearch(TEACHER, **settings), Recipe(epochs, 16, 0.02)
    return replace(TEACHER, recipe=recipe, method=method, start=TEACHER, seed=seed)


PLAIN = CrossEntropy()


def chain(method=PLAIN, held=0.0, **settings):
    """A search and the training of what it finds."""
    student = replace(TEACHER, method=method, seed=5)
    return FoundStudent(search(**settings), student, held)


@pytest.fixture(scope="module")
def trained_before(tmp_path_factory):
    """A store in which the chain is trained, with and without KD."""
    folder = tmp_path_factory.mktemp("before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(folder))
        patch.setenv("KDLIB_RESULTS", str(folder / "no results"))
        train([chain(), chain(KD(TEACHER))])
    return folder


@pytest.fixture(autouse=True)
def teacher_is_trained(trained_before, own_folders):
    shutil.copytree(trained_before / TEACHER.id, home() / TEACHER.id)


@pytest.fixture
def all_is_trained(trained_before, teacher_is_trained):
    shutil.copytree(trained_before, home(), dirs_exist_ok=True)


def gates_after(trained, epoch=None):
    run = trained.run
    images = load_data(run.data).first(run.images)
    networks = trained_networks(run, run.recipe.epochs if epoch is None else epoch, images)
    return networks["gates"]


@pytest.fixture
def steps_taken(monkeypatch):
    """The list of (epoch, share of the cost that is open) after every step from now on."""
    taken, advance = [], Trainer.advance

    def note(lane):
        advance(lane)
        if "gates" in lane.state.networks:
            taken.append((lane.epoch + 1, lane.state.networks["gates"].share()))

    monkeypatch.setattr(Trainer, "advance", note)
    return taken


def ungated(trained):
    """The student's network by itself, as no user gets it."""
    images = load_data("digits").first(128)
    return trained_networks(trained.run, trained.run.recipe.epochs, images)["student"]


# --- the search as a run --------------------------------------------------------------------------


def test_a_search_begins_as_its_teacher_with_all_gates_open():
    weights = train([TEACHER])[0].model().state_dict()
    lane = new_trainer(search())
    student = lane.state.networks["student"].state_dict()
    assert fingerprint(student) == fingerprint(weights)
    assert lane.state.networks["gates"].values.unique().tolist() == [1]


def test_weights_and_gates_move():
    trained = train([search(budget=0.01)])[0]
    before = store.find_record(TEACHER).model().state_dict()
    after = ungated(trained).state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    values = gates_after(trained).values
    assert (values != 1).all()
    assert (values >= 0).all()
    assert (values > 0).any()


def test_the_teacher_stays_bit_identical(swept):
    before = train([TEACHER])[0]
    content = store.weights_path(TEACHER, 2).read_bytes()
    trained = train([search()])[0]
    assert store.weights_path(TEACHER, 2).read_bytes() == content
    assert {weights for weights, *_ in swept} == {final_weights(before)}
    assert trained.summary["teachers"] == {f"{TEACHER.id}@2": final_weights(before)}


def test_training_equals_a_plain_loop_of_both_optimizers():
    """While all gates are open, activations are multiplied, the penalty is a soft threshold."""
    run = search(epochs=2, budget=0.01, strength=0.02, temperature=3.0)
    trained = train([run])[0]
    images, taught_by = load_data("digits").first(128), store.find_record(TEACHER).model()
    model = store.find_record(TEACHER).model().train().requires_grad_(True)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    layers = [layer for _, layer in gated_convolutions(model)]
    gates = [torch.ones(layer.in_channels, requires_grad=True) for layer in layers]
    velocity = [torch.zeros_like(gate) for gate in gates]
    alpha = gates_after(trained).alpha.split(list(map(len, gates)))
    for layer, gate in zip(layers, gates, strict=True):
        layer.register_forward_pre_hook(
            lambda _, args, gate=gate: (args[0] * gate.view(1, -1, 1, 1),)
        )
    for _, index, view in batches(run, images):
        x = images.batch(index, view)
        p, q = ((z / 3).log_softmax(1) for z in (taught_by(x), model(x)))
        loss = 10 * 9 * (p.exp() * (p - q)).sum(1).mean()
        optimizer.zero_grad()
        slopes = torch.autograd.grad(loss, [*model.parameters(), *gates])
        for weight, slope in zip(model.parameters(), slopes, strict=False):
            weight.grad = slope
        optimizer.step()
        with torch.no_grad():
            for gate, slope, v, a in zip(
                gates, slopes[-len(gates) :], velocity, alpha, strict=True
            ):
                z = gate - 0.01 * slope
                shrunk = z.sign() * (z.abs() - 0.01 * 0.02 * a).clamp(min=0)
                v.copy_(shrunk - gate + 0.9 * v)
                gate.copy_((shrunk + 0.9 * v).clamp(min=0))
    got = ungated(trained).state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(got[name], expected, rtol=1e-3, atol=1e-4, msg=name)
    gates = torch.cat(gates).detach()
    torch.testing.assert_close(gates_after(trained).values.data, gates, rtol=1e-4, atol=1e-5)
    assert (gates > 0).all()
    assert (gates - 1).abs().max() > 0.05


def test_the_log_tells_of_the_gated_network():
    trained = train([search(epochs=2, budget=0.01)])[0]
    test = load_data("digits", "test")
    with torch.no_grad():
        x = test.batch(torch.arange(len(test)))
        whole = ungated(trained)(x)
        logits = extract(trained)(x)
    top1 = 100 * (logits.argmax(1) == test.labels).float().mean().item()
    assert trained.final["test_top1"] == pytest.approx(top1, abs=1e-3)
    assert trained.final["test_ce"] == pytest.approx(
        F.cross_entropy(logits, test.labels).item(), rel=1e-4
    )
    assert not torch.allclose(whole, logits, rtol=1e-2)
    gates = gates_after(trained)
    assert trained.final["open_gates"] == (gates.values > 0).sum()
    assert trained.final["macs"] == gates.macs()
    assert trained.final["macs_share"] == pytest.approx(gates.macs() / gates.channels.whole)
    expected = trained.log.train_loss / 10
    assert trained.log.train_kd.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_search_ends_with_the_step_that_reaches_its_budget(steps_taken):
    trained = train([search()])[0]
    shares = [share for _, share in steps_taken]
    assert all(share > 0.5 for share in shares[:-1])
    assert shares[-1] <= 0.5
    assert trained.final["macs_share"] == shares[-1]
    last = sum(epoch == trained.epochs for epoch, _ in steps_taken)
    assert 0 < last < 8
    assert trained.epochs < 6
    assert trained.summary["arrived"] == trained.epochs - 1 + last / 8


def test_terms_of_an_epoch_that_was_cut_short_are_means_of_its_steps(monkeypatch):
    seen, step = [], GateSearch.loss

    def note(method, given):
        logits, terms = step(method, given)
        seen.append(terms["kd"].item())
        return logits, terms

    monkeypatch.setattr(GateSearch, "loss", note)
    trained = train([search()])[0]
    rest = len(seen) - 8 * (trained.epochs - 1)
    assert rest < 8
    assert trained.final["train_kd"] == pytest.approx(np.mean(seen[-rest:]), rel=1e-5)


def test_where_nobody_watches_a_search_ends_with_its_epoch(steps_taken, monkeypatch):
    monkeypatch.setattr(GateSearch, "may_stop", lambda *_: False)
    trained = train([search()])[0]
    assert len(steps_taken) == 8 * trained.epochs
    assert trained.final["macs_share"] <= 0.5
    assert trained.epochs < 6
    assert (trained.log.macs_share[:-1] > 0.5).all()


def test_the_steps_before_an_arrival_do_not_depend_on_watching(elsewhere, monkeypatch):
    run = search()
    trained = train([run])[0]
    monkeypatch.setattr(GateSearch, "may_stop", lambda *_: True)
    (watched,) = elsewhere(run)
    assert final_weights(watched) == final_weights(trained)
    assert same_log(watched, trained)


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
    assert ungated(first).state_dict().keys() == build_model(MODEL, 10, 1).state_dict().keys()
    assert not (store.folder(run) / "state.safetensors").exists()


def test_epochs_to_keep_that_a_search_never_had_are_no_want(epochs_trained):
    run = replace(search(), keep=range(1, 7))
    trained = train([run])[0]
    had = {str(epoch) for epoch in range(1, trained.epochs + 1)}
    assert trained.summary["weights"].keys() == had | {"6"}
    assert trained.summary["weights"][str(trained.epochs)] == trained.summary["weights"]["6"]
    epochs_trained.clear()
    train([run], weights=True)
    assert not epochs_trained
    store.weights_path(run, 1).unlink()
    with pytest.warns(UserWarning, match="is trained again"):
        train([run])
    assert len(epochs_trained) == trained.epochs


@pytest.mark.usefixtures("all_is_trained")
def test_a_record_that_stops_early_without_a_reason_does_not_count(tiny):
    trained = train([search()])[0]
    summary = {k: v for k, v in trained.summary.items() if k != "arrived"}
    store.write_record(trained.run, trained.log.to_dict("records"), summary)
    with pytest.warns(UserWarning, match="epochs are missing"):
        assert store.find_record(trained.run) is None


def test_a_search_that_runs_its_recipe_out_did_not_arrive():
    trained = train([search(epochs=2, budget=0.01)])[0]
    assert trained.epochs == 2
    assert "arrived" not in trained.summary


@pytest.mark.parametrize(
    "settings",
    [{}, {"budget": 0.01, "held_at": 0.02, "weighted": False}],
    ids=["arriving", "held, not arriving"],
)
def test_a_resumed_search_equals_an_uninterrupted_one(assert_resumes, settings):
    assert_resumes(search(epochs=3, **{"strength": 0.15, **settings}))


def test_searches_side_by_side_end_when_each_is_there(tiny, elsewhere):
    runs = [search(), search(seed=1, strength=0.4), tiny(epochs=4, batch=16)]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=3)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))
    assert len({trained.epochs for trained in together}) > 1


@pytest.mark.usefixtures("all_is_trained")
def test_a_student_is_no_network_without_its_gates():
    with pytest.raises(ValueError, match="extract"):
        store.find_record(search()).model()
    with pytest.raises(ValueError, match="no route"):
        replace(search(), route=True)
    with pytest.raises(ValueError, match="no start"):
        replace(TEACHER, start=search())
    with pytest.raises(ValueError, match="no teacher"):
        KD(replace(search(), method=OneStage(search().method, gap=1)))


def test_a_search_inside_what_was_found_is_refused():
    name = Architecture(MODEL, ()).name
    with pytest.raises(ValueError, match="found by a search itself"):
        _refuse_without_gates(name)


@pytest.mark.parametrize("settings", [{}, {"epochs": 1, "budget": 0.01}])
def test_what_is_not_finite_in_the_end_has_no_record(monkeypatch, settings):
    evaluate, run = Trainer._evaluate, search(**settings)
    train([TEACHER])
    monkeypatch.setattr(Trainer, "_evaluate", lambda lane: evaluate(lane) | {"test_ce": math.nan})
    with pytest.raises(NotFinite):
        train([run])
    assert store.find_record(run) is None


# --- what it finds --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"target": "output", "weighted": False, "strength": 0.4}])
def test_what_is_extracted_is_the_gated_network_at_the_logged_cost(settings):
    trained = train([search(epochs=12, **settings)])[0]
    run = trained.run
    images = load_data(run.data).first(run.images)
    networks = trained_networks(run, run.recipe.epochs, images)
    x = load_data("digits", "test").batch(torch.arange(64))
    method = run.method
    found = extract(trained)
    with torch.no_grad():
        expected = torch.func.functional_call(
            networks["student"], networks["gates"](networks["student"]), (x,)
        )
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
    assert count_cost(found, 8).macs == trained.final["macs"]
    assert trained.final["macs"] <= method.budget * count_cost(networks["student"], 8).macs
    assert not found.training
    assert not any(module.training for module in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    built = build_model(architecture(trained).save(), 10, 1, seed=0)
    assert {k: t.shape for k, t in built.state_dict().items()} == {
        k: t.shape for k, t in found.state_dict().items()
    }
    assert 0 < trained.final["macs"] < count_cost(networks["student"], 8).macs


def test_what_was_open_can_be_told_of_every_epoch_that_was_kept():
    trained = train([replace(search(epochs=3, budget=0.01), keep=(1, 2))])[0]
    whole = Channels(build_model(MODEL, 10, 1, seed=0), 8)
    for epoch, macs in enumerate(trained.log.macs, start=1):
        table = measure(trained, kept_channels, epoch=epoch)
        assert table.layer.tolist() == [reader.name for reader in whole.gated]
        found = Architecture(MODEL, tuple(zip(table.layer, table.kept, strict=True)))
        assert whole.macs(whole.settle(found.is_open)) == macs
    assert len(set(trained.log.macs)) > 1


def test_a_search_above_its_budget_has_found_nothing_yet():
    trained = train([search(epochs=1, strength=1e-6)])[0]
    with pytest.raises(ValueError, match=r"ended at 100\.0%.*budget of 50\.0%.*more epochs or a l"):
        architecture(trained)
    with pytest.raises(ValueError, match="larger strength"):
        train([FoundStudent(trained.run, trained.run.start)])


def test_however_hard_a_search_pushes_a_network_is_left():
    trained = train([search(strength=1000.0)])[0]
    assert 0 < trained.final["macs_share"] < 0.02
    assert torch.isfinite(extract(trained)(torch.zeros(2, 1, 8, 8))).all()
    build_model(architecture(trained).save(), classes=10, channels=1)


def test_a_search_that_cut_its_network_has_found_nothing():
    trained = train([search()])[0]
    trained.log["macs_share"] = 0.0
    with pytest.raises(NothingFound, match=r"nothing is left\. Give it a smaller strength"):
        architecture(trained)


@pytest.mark.usefixtures("all_is_trained")
def test_drop_rates_tell_of_every_connection():
    found = architecture(train([search()])[0])
    table, is_open = drop_rates(found), found.is_open
    by_layer = table.groupby("layer", sort=False)
    assert list(by_layer.groups) == list(is_open)
    assert by_layer.removed.sum().tolist() == [(~kept).sum() for kept in is_open.values()]
    assert by_layer.channels.sum().tolist() == list(map(len, is_open.values()))
    assert (table.drop_rate == table.removed / table.channels).all()
    assert table.removed.sum() > 0
    transition = table[table.layer == "body.1.2"]
    assert transition.source.tolist() == ["stem.0", "body.0.0.conv2", "body.0.1.conv2"]
    assert transition.channels.tolist() == [8, 4, 4]
    kept = is_open["body.1.2"]
    expected = [1 - part.mean() for part in np.split(kept, [8, 12])]
    assert transition.drop_rate.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_random_architecture_costs_no_more_than_it_may(share):
    channels = channels_of(TEACHER)
    macs, costs, names = round(share * channels.whole), [], []
    for seed in range(5):
        found = random_architecture(MODEL, channels, macs, seed)
        assert found == random_architecture(MODEL, channels, macs, seed)
        network = build_model(found.save(), 10, 1, seed=0)
        costs.append(count_cost(network, 8).macs)
        names.append(found.name)
    assert max(costs) <= macs
    assert max(costs) > 0.8 * macs
    assert len(set(names)) == 5


def test_channels_are_those_of_the_images_that_a_network_sees():
    assert channels_of(TEACHER).whole == count_cost(build_model(MODEL, 10, 1), 8).macs
    assert channels_of(TEACHER).whole == cost_of(TEACHER).macs


@pytest.mark.parametrize("seed", range(12))
def test_a_random_chain_is_never_cut(seed):
    run = replace(TEACHER, model="vgg13-x0.03")
    channels = channels_of(run)
    found = random_architecture(run.model, channels, round(0.1 * channels.whole), seed)
    assert channels.macs(channels.settle(found.is_open)) > 0


def test_a_random_student_of_a_search_that_failed_is_refused_too():
    never = search(epochs=1, budget=0.01)
    student = replace(TEACHER, seed=5)
    both = [FoundStudent(never, student), RandomStudent(never, student), never, TEACHER]
    with pytest.raises(NothingFound, match="larger strength"):
        train(both)
    with pytest.warns(UserWarning, match="larger strength"):
        found, random, searched, teacher = train(both, partial=True)
    assert found is random is None
    assert (searched.run, teacher.run) == (never, TEACHER)


def test_latencies_are_of_every_network():
    table = latencies({"one": TEACHER, "two": replace(TEACHER, model="resnet8-x0.25")}, rounds=2)
    assert (table["ms a batch"] > 0).all()
    assert table["MACs, M"].tolist() == pytest.approx(
        [cost_of(replace(TEACHER, model=m)).macs / 1e6 for m in (MODEL, "resnet8-x0.25")], abs=1e-3
    )


# --- training it ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_is_trained")
def test_what_was_found_is_trained_from_scratch_with_and_without_kd():
    methods = CrossEntropy(), KD(TEACHER)
    plain, distilled = train([chain(method) for method in methods])
    searched = store.find_record(chain().search)
    name = architecture(searched).name
    assert plain.run.model == distilled.run.model == name
    assert plain.run.model.startswith(f"{MODEL}{MARK}")
    for trained, method in zip((plain, distilled), methods, strict=True):
        assert trained.run == replace(TEACHER, method=method, seed=5, model=name)
        assert trained.run.start is None
        assert cost_of(trained.run).macs == searched.final["macs"]
        shapes = {k: t.shape for k, t in trained.model().state_dict().items()}
        assert shapes == {k: t.shape for k, t in extract(searched).state_dict().items()}
    assert final_weights(plain) != final_weights(distilled)
    assert distilled.summary["teachers"].keys() == {f"{TEACHER.id}@2"}


@pytest.mark.usefixtures("all_is_trained")
def test_a_second_call_trains_nothing(monkeypatch):
    first = train([chain()])[0]
    monkeypatch.setattr(pool_module, "Trainer", None)
    second = train([chain()])[0]
    assert (second.run, second.summary) == (first.run, first.summary)


def test_a_divergence_can_be_held_in_a_second_search(epochs_trained):
    searched = chain(held=0.5)
    trained = train([searched])[0]
    first = store.find_record(searched.search)
    held = searched.held_search(first)
    assert held.method.held_at == 0.5 * first.log.train_kd.max()
    assert replace(held.method, held_at=0.0) == searched.search.method
    assert replace(held, method=searched.search.method) == searched.search
    second = store.find_record(held)
    assert trained.run.model == architecture(second).name
    order = list(dict.fromkeys(run for run, _ in epochs_trained))
    assert order == [first.run.id, held.id, trained.run.id]


def test_what_a_chain_may_cost_is_known_before():
    plain, held = chain(), chain(held=0.5)
    _, again, student = held.estimate()
    assert again.method.held_at == 0.5
    assert student.recipe == held.student.recipe
    everything = [run for c in (plain, held, chain(strength=0.4)) for run in c.estimate()]
    # three students that are not known yet, and that are not one
    assert len({run.id for run in everything}) == 3 + 3
    assert plain.student.id not in {run.id for run in everything}


def test_a_chain_begins_with_a_search():
    with pytest.raises(ValueError, match=r"is no search: give it GateSearch"):
        FoundStudent(TEACHER, TEACHER)


def test_a_search_that_only_targets_the_truth_cannot_be_held():
    with pytest.raises(ValueError, match="held"):
        chain(held=0.5, target="truth")


@pytest.mark.usefixtures("all_is_trained")
def test_a_clone_of_records_alone_tells_what_was_found(only_records, monkeypatch):
    trained = train([chain(KD(TEACHER))])[0]
    only_records(TEACHER, chain().search, trained.run)
    monkeypatch.setattr(pool_module, "Trainer", None)
    again = train([chain(KD(TEACHER))])[0]
    assert (again.run, again.summary) == (trained.run, trained.summary)
    assert home().name == "fresh"


@pytest.mark.usefixtures("all_is_trained")
def test_a_clone_of_records_trains_another_student_of_the_search(only_records, epochs_trained):
    trained = train([chain()])[0]
    only_records(chain().search)
    epochs_trained.clear()
    other = train([chain(KD(TEACHER))])[0]
    assert other.run.model == trained.run.model
    assert {run for run, _ in epochs_trained} == {TEACHER.id, other.run.id}


@pytest.mark.usefixtures("all_is_trained")
def test_a_clone_without_the_measurements_searches_again(only_records):
    trained = train([chain()])[0]
    for path in store.folder(chain().search).glob("measure-*.json"):
        path.unlink()
    only_records(TEACHER, chain().search)
    with pytest.warns(UserWarning, match="is trained again"):
        again = train([chain()])[0]
    assert again.run == trained.run
    assert final_weights(again) == final_weights(trained)


@pytest.mark.usefixtures("all_is_trained")
def test_the_record_of_a_found_student_comes_with_its_architecture(only_records):
    trained = train([chain()])[0]
    folder = results() / "course" / "records"
    only_records(trained.run)
    assert {path.name for path in folder.iterdir()} == {
        file_of(trained.run.model),
        f"{trained.run.id}.jsonl",
    }
    found = load_architecture(trained.run.model)
    assert found.base == MODEL
    assert found.name == trained.run.model
    store.copy_record(trained.run, results() / "paper" / "records")
    assert (results() / "paper" / "records" / file_of(found.name)).read_text() == found.text


@pytest.mark.usefixtures("all_is_trained")
def test_a_search_keeps_no_architecture_beside_its_record(only_records):
    run = train([search()])[0].run
    only_records(run)
    names = [path.name for path in (results() / "course" / "records").iterdir()]
    assert not [name for name in names if name.startswith("architecture")]


@pytest.mark.usefixtures("all_is_trained")
def test_an_exhibit_takes_along_what_its_students_are():
    trained = train([chain()])[0]
    profile = open_profile("smoke")
    exhibit = Exhibit("search/control", profile)
    exhibit.add("found", "error", [trained], "test_error")
    exhibit.record()
    records = results() / profile.folder / "records"
    assert (
        load_architecture(trained.run.model).text
        == (records / file_of(trained.run.model)).read_text()
    )
