"""Properties of training that every method has: resuming, parallel training, teachers, aux modules.

The gates' search trains in tests/kdlib/chains.
"""

from dataclasses import replace

import pytest
import torch
from by_hand import SECOND_RECIPE, WITH_KD
from helpers import aux_fingerprint, aux_of, final_weights, new_trainer, same_log, watch_teachers

from kdlib import Recipe, store, train
from kdlib.methods import (
    FSP,
    KD,
    KDGAN,
    KR,
    NST,
    STC,
    AggregateKR,
    AttentionTransfer,
    FactorTransfer,
    FreshBack,
    Hint,
    MutualLearning,
    OneStage,
    Penalised,
    RocketLaunching,
    multi_stage,
    paraphrase,
)
from kdlib.store import fingerprint

PARAPHRASING = Recipe(2, 24, lr=0.1, milestones=(1,))
PEER = ("resnet14-x0.25", SECOND_RECIPE)


def kdgan(teacher):
    return KDGAN(teacher, discriminator=SECOND_RECIPE, copy=SECOND_RECIPE)


def kr(teacher, **settings):
    return KR(teacher, prior=SECOND_RECIPE, **settings)


# Methods that learn from a teacher; "equal" ones need a teacher as wide as the student.
FROM_TEACHER = {
    "Hint": lambda t: Hint(t, **WITH_KD),
    "Hint alone, equal": lambda t: Hint(t, stage=2, ce_weight=0.0),
    "AT": lambda t: AttentionTransfer(t, **WITH_KD),
    "FT": lambda t: FactorTransfer(t, paraphraser=paraphrase(t, PARAPHRASING), **WITH_KD),
    "FSP": lambda t: FSP(t, kd_weight=0.5),
    "FSP, equal": lambda t: FSP(t, ce_weight=0.5, kd_weight=0.5),
    "FSP alone, equal": lambda t: FSP(t, ce_weight=0.0),
    "NST": lambda t: NST(t, nst_weight=5.0),
    "STC": lambda t: STC(t, target="soft", **WITH_KD),
    "STC, equal": lambda t: STC(t, cut=1),
    "STC to the truth": lambda t: STC(t, target="truth"),
    "STC, another back": lambda t: STC(t, back=replace(t, seed=7)),
    "STC, fresh back": FreshBack,
    "KDGAN": kdgan,
    "KR": kr,
    "KR-Dense, equal": lambda t: kr(t, gain=1.0, threshold="none"),
    "KR + KD": lambda t: kr(t, posterior=KD(t), gamma=0.1),
    "KR + NST": lambda t: kr(t, posterior=NST(t, nst_weight=5.0)),
    "KR + KDGAN": lambda t: kr(t, posterior=kdgan(t), threshold="fixed"),
    "KR, second reading": lambda t: AggregateKR(t, prior=SECOND_RECIPE),
}
ROUTES = {
    f"{name} in one stage": lambda t, name=name: OneStage(FROM_TEACHER[name](t), gap=1)
    for name in ("Hint", "AT", "STC", "KDGAN", "KR + KD")
}
WITHOUT_TEACHER = {
    "Rocket Launching": lambda _: RocketLaunching(*PEER, kd_weight=0.7),
    "DML": lambda _: MutualLearning(*PEER),
    **{
        f"penalty {penalty}": lambda _, penalty=penalty: Penalised(penalty=penalty, bins=4, every=3)
        for penalty in ("none", "l1", "l2", "sparse")
    },
}
METHODS = FROM_TEACHER | ROUTES | WITHOUT_TEACHER
every_method = pytest.mark.parametrize("name", METHODS)
every_teacher = pytest.mark.parametrize("name", FROM_TEACHER | ROUTES)
# The auxiliary modules of a method where the teacher is twice as wide as the student.
AUX = {
    "Hint": {"adapter"},
    "FT": {"translator"},
    "FSP": {f"adapter{k}" for k in range(4)},  # of the stem and of three stages
    "STC": {"adapter"},
    "STC to the truth": {"adapter"},
    "STC, another back": {"adapter"},
    "STC, fresh back": {"adapter", "back"},
    "KDGAN": {"teacher", "discriminator"},
    "KR": {"prior"},
    "KR + KD": {"prior"},
    "KR + NST": {"prior"},
    "KR + KDGAN": {"prior", "teacher", "discriminator"},
    "KR, second reading": {"prior", "aggregate"},
    "Rocket Launching": {"peer"},
    "DML": {"peer"},
    "penalty sparse": {"thresholds"},
}
AUX |= {f"{name} in one stage": AUX[name] for name in ("Hint", "STC", "KDGAN", "KR + KD")}


@pytest.fixture
def teacher_of(tiny):
    """The teacher of a method."""

    def make(name):
        model = "resnet14-x0.25" if "equal" in name else "resnet14-x0.5"
        return tiny(model=model, keep=(1,))

    return make


@pytest.fixture
def run_of(tiny, teacher_of):
    def make(name, epochs=2, **others):
        return tiny(epochs=epochs, method=METHODS[name](teacher_of(name)), **others)

    return make


@every_method
def test_a_resumed_run_equals_an_uninterrupted_one(run_of, assert_resumes, name):
    assert_resumes(run_of(name, epochs=3, milestones=(1,)))


def test_a_resumed_paraphraser_equals_an_uninterrupted_one(teacher_of, assert_resumes):
    assert_resumes(paraphrase(teacher_of("FT"), replace(PARAPHRASING, epochs=3)))


def test_runs_trained_in_parallel_equal_runs_trained_one_by_one(run_of, elsewhere):
    runs = [run_of(name, seed=seed) for seed, name in enumerate(METHODS)]
    alone = elsewhere(*runs, parallel=1)
    together = train(runs, parallel=4)
    for ours, expected in zip(together, alone, strict=True):
        assert final_weights(ours) == final_weights(expected)
        assert aux_fingerprint(ours) == aux_fingerprint(expected)
        assert ours.summary["teachers"] == expected.summary["teachers"]
        assert same_log(ours, expected)


@every_teacher
def test_teachers_do_not_change(run_of, teacher_of, monkeypatch, name):
    """Neither the teacher's network nor what is pretrained, in memory or in the store."""
    parents = [teacher_of(name)]
    if name == "FT":
        parents.append(paraphrase(parents[0], PARAPHRASING))
    if name == "STC, another back":
        parents.append(replace(parents[0], seed=7))
    before = train(parents)
    watched, run = watch_teachers(monkeypatch), run_of(name)
    trained = train([run])[0]
    kept = before[0].summary["weights"]
    expected = {kept["1"], kept["2"]} if name in ROUTES else {kept["2"]}
    named = {f"{parents[0].id}@{k}": kept[k] for k in kept if kept[k] in expected}
    if name == "FT":
        expected |= {fingerprint(store.select(aux_of(before[1]), "encoder."))}
        named[f"{parents[1].id}@2"] = final_weights(before[1])
    if name == "STC, another back":
        expected |= {final_weights(before[1])}
        named[f"{parents[1].id}@2"] = final_weights(before[1])
    assert trained.summary["teachers"] == named
    # one network gets the weights of each checkpoint in turn; the last remain
    seen = {fingerprint(network.state_dict()) for network in watched}
    assert seen == ({kept["2"]} if name in ROUTES else expected)
    for network in watched:
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    for parent, record in zip(parents, before, strict=True):
        assert store.find_record(parent).summary == record.summary
        store.load_modules(parent, parent.recipe.epochs, expected=final_weights(record))


@every_method
def test_aux_modules_are_trained_and_kept_beside_the_student(run_of, tiny, name):
    run = run_of(name, keep=(1,))
    trained, plain = train([run, tiny(epochs=1)])
    assert trained.model().state_dict().keys() == plain.model().state_dict().keys()
    start = new_trainer(run).state.modules
    first, last = (aux_of(trained, epoch) for epoch in (1, 2))
    assert {key.partition(".")[0] for key in last} == AUX.get(name, set())
    assert first.keys() == last.keys()
    for key, weights in start.named_parameters():
        if not key.startswith("student."):
            assert not torch.equal(first[key], weights), key
            assert not torch.equal(last[key], first[key]), key


@pytest.mark.parametrize("name", FROM_TEACHER)
def test_one_stage_with_one_checkpoint_is_the_method_itself(tiny, teacher_of, name):
    method = FROM_TEACHER[name](teacher_of(name))
    plain, one = train([tiny(method=m) for m in (method, OneStage(method, gap=2))])
    assert final_weights(one) == final_weights(plain)
    assert aux_fingerprint(one) == aux_fingerprint(plain)
    assert one.summary["teachers"] == plain.summary["teachers"]
    assert same_log(one, plain)


@pytest.mark.parametrize("name", ["Hint", "STC", "KDGAN", "KR + KD"])
def test_a_later_stage_continues_with_all_modules_of_the_one_before(tiny, teacher_of, name):
    method = FROM_TEACHER[name](teacher_of(name))
    stages = multi_stage(tiny(epochs=1, method=method, seed=1), (1, 2))
    first, second = train(stages)
    saved = store.load_modules(first.run, 1)
    start = new_trainer(second.run).state.modules.state_dict()
    assert start.keys() >= saved.keys()
    assert all(torch.equal(start[key], tensor) for key, tensor in saved.items())
    assert aux_fingerprint(second) != aux_fingerprint(first)


def test_runs_without_a_teacher_can_be_starts_and_teachers(tiny, run_of):
    firsts = [run_of(name, epochs=1) for name in WITHOUT_TEACHER]
    assert all(trained.summary["teachers"] == {} for trained in train(firsts))
    children = [[tiny(epochs=1, start=run), tiny(epochs=1, method=KD(run))] for run in firsts]
    for parent, both in zip(firsts, children, strict=True):
        known = {f"{parent.id}@1": store.saved_fingerprint(parent, 1)}
        assert [trained.summary["teachers"] for trained in train(both)] == [known, known]


def test_state_of_another_training_makes_a_run_start_from_the_beginning(
    run_of, train_until, epochs_trained
):
    """Momentum must name an optimizer of the method."""
    run = run_of("KR", epochs=3)
    train_until(run, 1)
    path = store.folder(run) / "state.safetensors"
    tensors, about = store.load_tensors(path)
    old = {name.replace("momentum.student.", "momentum."): t for name, t in tensors.items()}
    store.save_tensors(path, old, about)
    epochs_trained.clear()
    with pytest.warns(UserWarning, match="starts from the beginning"):
        train([run])
    assert epochs_trained[0] == (run.id, 1)
