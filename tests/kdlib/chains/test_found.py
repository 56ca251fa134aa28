"""Students found inside their teacher: architectures, extraction, and the chain of runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from found_students import MODEL, TEACHER, chain, search
from helpers import final_weights
from torch.func import functional_call

from kdbook.search import extraction
from kdlib import (
    KD,
    AlphaStudent,
    CrossEntropy,
    FoundStudent,
    RandomStudent,
    build_model,
    count_cost,
    load_data,
    measure,
    store,
    train,
)
from kdlib.chains.found import (
    architecture,
    channels_of,
    extract,
    kept_channels,
    searched_modules,
)
from kdlib.engine import pool as pool_module
from kdlib.errors import NothingFound
from kdlib.files import home, results
from kdlib.models.architecture import (
    MARK,
    Architecture,
    file_of,
    load_architecture,
    unsearched_architecture,
)
from kdlib.models.channels import Channels

pytestmark = pytest.mark.usefixtures("teacher_is_trained")


def macs_of(name):
    return count_cost(build_model(name, 10, 1, seed=0), 8).macs


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"target": "output", "weighted": False, "strength": 0.4}])
def test_the_extracted_network_equals_the_gated_one_within_the_budget(settings):
    trained = train([search(epochs=12, **settings)])[0]
    student, gates = (searched_modules(trained)[name] for name in ("student", "gates"))
    x, found = load_data("digits", "test").batch(torch.arange(64)), extract(trained)
    with torch.no_grad():
        expected = functional_call(student, gates(student), (x,))
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
    macs = count_cost(found, 8).macs
    assert 0 < trained.final["macs"] <= macs
    assert macs <= trained.run.method.budget * count_cost(student, 8).macs
    assert not any(module.training for module in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    built = build_model(architecture(trained).save(), 10, 1, seed=0)
    shapes = [{k: t.shape for k, t in n.state_dict().items()} for n in (built, found)]
    assert shapes[0] == shapes[1]
    (row,) = extraction(trained).to_dict("records")
    assert row["macs"] == macs
    test = load_data("digits", "test")
    hits = found(test.batch(torch.arange(len(test)))).argmax(1) == test.labels
    assert row["test_top1"] == pytest.approx(100 * hits.float().mean().item(), abs=1e-3)
    assert row["difference"] < 1e-3 * row["logit"]


def test_the_open_channels_of_every_kept_epoch_can_be_measured():
    trained = train([replace(search(epochs=3, budget=0.01), keep=(1, 2))])[0]
    whole = Channels(build_model(MODEL, 10, 1, seed=0), 8)
    for epoch, macs in enumerate(trained.log.macs, start=1):
        table = measure(trained, kept_channels, epoch=epoch)
        assert table.layer.tolist() == [reader.name for reader in whole.gated]
        found = Architecture(MODEL, tuple(zip(table.layer, table.kept, strict=True)))
        assert found == architecture(trained, epoch=epoch) or epoch == 3
        assert whole.macs(whole.remaining(found.masks)) == macs
    assert len(set(trained.log.macs)) > 1


def test_a_search_above_its_budget_has_found_nothing():
    never = search(epochs=1, strength=1e-6)
    trained = train([never])[0]
    with pytest.raises(NothingFound, match=r"ended at 100\.0%.*budget of 50\.0%.*more epochs or"):
        architecture(trained)
    student = replace(TEACHER, seed=5)
    both = [FoundStudent(never, student), RandomStudent(never, student), never, TEACHER]
    with pytest.raises(NothingFound, match="larger strength"):
        train(both)
    with pytest.warns(UserWarning, match="larger strength"):
        found, random, searched, teacher = train(both, partial=True)
    assert found is random is None
    assert (searched.run, teacher.run) == (never, TEACHER)


def test_a_network_is_left_however_large_the_strength():
    trained = train([search(strength=1000.0)])[0]
    assert 0 < trained.final["macs_share"] < 0.02
    assert torch.isfinite(extract(trained)(torch.zeros(2, 1, 8, 8))).all()
    build_model(architecture(trained).save(), classes=10, channels=1)


@pytest.mark.usefixtures("all_is_trained")
def test_a_search_has_found_nothing_after_its_end_and_where_it_closed_a_whole_layer():
    trained = store.find_record(search())
    with pytest.raises(ValueError, match=rf"ended in epoch {trained.epochs}, before epoch 5"):
        architecture(trained, epoch=5)
    trained.rows[-1]["macs_share"] = 0.0
    with pytest.raises(NothingFound, match=r"nothing is left.*smaller strength"):
        architecture(trained)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_unsearched_architecture_costs_no_more_than_allowed(share):
    channels = channels_of(TEACHER)
    macs = round(share * channels.total_macs)
    found = [unsearched_architecture(MODEL, channels, macs, seed) for seed in range(5)]
    assert found == [unsearched_architecture(MODEL, channels, macs, seed) for seed in range(5)]
    costs = [macs_of(architecture.save()) for architecture in found]
    assert 0.8 * macs < max(costs) <= macs
    assert len({architecture.name for architecture in found}) == 5


@pytest.mark.parametrize("seed", range(4))
def test_a_unsearched_architecture_without_shortcuts_is_never_cut(seed):
    run = replace(TEACHER, model="vgg13-x0.03")
    channels = channels_of(run)
    found = unsearched_architecture(run.model, channels, round(0.1 * channels.total_macs), seed)
    assert channels.macs(channels.remaining(found.masks)) > 0


def test_the_cost_of_channels_is_that_for_the_images_of_the_run():
    assert channels_of(TEACHER).total_macs == macs_of(MODEL)


# --- the chain ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_is_trained")
def test_the_found_network_is_trained_from_random_weights(epochs_trained):
    methods = CrossEntropy(), KD(TEACHER)
    plain, distilled = train([chain(method) for method in methods])
    assert not epochs_trained  # a second call trains nothing
    searched = store.find_record(search())
    name = architecture(searched).name
    assert name.startswith(f"{MODEL}{MARK}")
    for trained, method in zip((plain, distilled), methods, strict=True):
        assert trained.run == replace(TEACHER, method=method, seed=5, model=name)
        assert trained.run.start is None
        shapes = {k: t.shape for k, t in trained.model().state_dict().items()}
        assert shapes == {k: t.shape for k, t in extract(searched).state_dict().items()}
    assert macs_of(name) >= searched.final["macs"]
    assert final_weights(plain) != final_weights(distilled)
    assert distilled.summary["teachers"].keys() == {f"{TEACHER.id}@2"}


@pytest.mark.usefixtures("all_is_trained")
def test_a_random_student_has_another_architecture_of_no_higher_cost():
    searched, random = store.find_record(search()), RandomStudent(search(), chain().student)
    model, found = random.next_run(searched).model, chain().next_run(searched).model
    assert model != found
    assert model == random.next_run(searched).model
    assert 0.5 * macs_of(found) < macs_of(model) <= macs_of(found)


@pytest.mark.usefixtures("all_is_trained")
def test_a_search_that_overshot_is_opened_again_up_to_its_budget():
    searched = store.find_record(search())
    budget = searched.run.method.budget * channels_of(TEACHER).total_macs
    ended, settled = (searched_modules(searched, epoch)["gates"] for epoch in (6, None))
    again = (ended.values == 0) & (settled.values > 0)
    assert ended.share() < 0.4 < 0.45 < settled.share() <= 0.5
    assert torch.equal(settled.values[again], ended.before[again])
    assert torch.equal(settled.values[~again], ended.values[~again])
    # every gate that stays closed though it was open before the step was smaller, or costs too much
    smaller = (settled.values == 0) & (ended.before > 0)
    assert ended.before[again].min() >= ended.before[smaller].max()
    largest = torch.where(smaller, ended.before, 0).argmax()
    settled.values[largest] = 1.0
    assert settled.macs() > budget or ended.before[again].min() == ended.before[largest]


@pytest.mark.usefixtures("all_is_trained")
def test_without_a_loss_the_gates_that_save_most_close_first():
    searched, channels = store.find_record(search()), channels_of(TEACHER)
    alone = AlphaStudent(search(), chain().student)
    assert alone.next_run(None) == search()
    found = alone.choose(searched)
    assert macs_of(found.save()) <= macs_of(architecture(searched).save())
    savings = channels.savings()
    one = unsearched_architecture(MODEL, channels, channels.total_macs - 1, 0, by_savings=True)
    (closed,) = (np.concatenate([*one.masks.values()]) == 0).nonzero()[0]
    assert savings[closed] == savings.max()
    some = unsearched_architecture(MODEL, channels, channels.total_macs - 200, 0, by_savings=True)
    several = (np.concatenate([*some.masks.values()]) == 0).nonzero()[0]
    assert len(several) > 1 or savings.max() > 200
    assert savings[several].min() == savings.max()
    random = unsearched_architecture(MODEL, channels, channels.total_macs - 1, 0)
    assert random != one


def test_a_divergence_can_be_held_in_a_second_search(epochs_trained):
    searched = chain(held=0.5)
    trained = train([searched])[0]
    first = store.find_record(searched.search)
    held = searched.held_search(first)
    assert held.method.held_at == 0.5 * first.log.train_kd.max()
    assert replace(held.method, held_at=0.0) == searched.search.method
    assert replace(held, method=searched.search.method) == searched.search
    assert trained.run.model == architecture(store.find_record(held)).name
    order = list(dict.fromkeys(run for run, _ in epochs_trained))
    assert order == [first.run.id, held.id, trained.run.id]


@pytest.mark.usefixtures("all_is_trained")
def test_the_second_search_holds_by_the_distance_or_by_a_hinge():
    first = store.find_record(search())
    chains = [FoundStudent(search(), TEACHER, 0.5, how) for how in ("distance", "hinge")]
    one, other = (chain.held_search(first).method for chain in chains)
    assert (one.held_by, other.held_by) == ("distance", "hinge")
    assert replace(one, held_by="hinge") == other
    assert chains[0].next_run(None) == chains[1].next_run(None)  # they share the first search


def test_the_estimate_of_a_chain_needs_no_training():
    plain, held = chain(), chain(held=0.5)
    _, again, student = held.estimate()
    assert again.method.held_at == 0.5
    assert student.recipe == held.student.recipe
    everything = [run for c in (plain, held, chain(strength=0.4)) for run in c.estimate()]
    # three searches, and three students whose architectures are not known yet
    assert len({run.id for run in everything}) == 3 + 3
    assert plain.student.id not in {run.id for run in everything}


def test_a_chain_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"is no search: give it GateSearch"):
        FoundStudent(TEACHER, TEACHER)
    with pytest.raises(ValueError, match="only the soft target can be held"):
        chain(held=0.5, target="truth")
    with pytest.raises(ValueError, match="share from 0 to 1"):
        chain(held=1.5)


# --- clones ---------------------------------------------------------------------------------------


@pytest.fixture
def committed(all_is_trained, only_records):
    """Keep only the records of the teacher, the search and its student, and the architecture."""
    trained = train([chain()])[0]
    only_records(store.find_record(TEACHER), store.find_record(search()), trained)
    return trained


def test_a_clone_of_records_knows_the_found_student(committed, monkeypatch):
    monkeypatch.setattr(pool_module, "Trainer", None)
    again = train([chain()])[0]
    assert (again.run, again.summary) == (committed.run, committed.summary)
    assert home().name == "fresh"


def test_a_clone_without_the_measurements_searches_again(committed):
    for path in results().glob("*/records/*measure-*.json"):
        path.unlink()
    with pytest.warns(UserWarning, match="is trained again"):
        again = train([chain()])[0]
    assert again.run == committed.run
    assert final_weights(again) == final_weights(committed)


@pytest.mark.usefixtures("all_is_trained")
def test_the_architecture_is_copied_with_the_record_of_its_student_alone(only_records):
    trained, searched = train([chain()])[0], store.find_record(search())
    only_records(trained)
    folder, name = results() / "course" / "records", file_of(trained.run.model)
    assert {path.name for path in folder.iterdir()} == {name, f"{trained.run.id}.jsonl"}
    found = load_architecture(trained.run.model)
    assert (found.base, found.name) == (MODEL, trained.run.model)
    store.copy_record(searched, results() / "paper" / "records")
    assert not (results() / "paper" / "records" / name).exists()
    store.copy_record(trained, results() / "paper" / "records")
    assert (results() / "paper" / "records" / name).read_text() == found.text
