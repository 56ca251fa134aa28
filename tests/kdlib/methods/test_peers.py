"""Peers that learn beside the student: RocketLaunching and MutualLearning."""

from dataclasses import replace

import pytest
import torch
from by_hand import (
    SECOND_RECIPE,
    assert_same_weights,
    evaluation,
    first_student,
    kl,
    train_by_hand,
)
from helpers import aux_fingerprint, final_weights, new_trainer, peer_of, truncate
from torch.nn import functional as F

from kdlib import build_model, load_data, store, train
from kdlib.engine.plan import mix
from kdlib.engine.train import CACHES
from kdlib.errors import StoreError
from kdlib.methods import MutualLearning, RocketLaunching
from kdlib.store import fingerprint

PEER = ("resnet14-x0.25", SECOND_RECIPE)
METHODS = [
    RocketLaunching(*PEER, temperature=4.0, kd_weight=0.7),
    MutualLearning(*PEER),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


@every_method
def test_a_pair_equals_two_networks_in_a_plain_pytorch_loop(tiny, method):
    run = tiny(milestones=(1,), decay=0.3, method=method, seed=2)
    trained = train([run])[0]
    student = first_student(run)
    peer = build_model(method.peer, 10, 1, seed=mix("parts", run.seed)).train()
    peer = peer.to(memory_format=torch.channels_last)

    def losses(x, labels):
        ours, theirs = student(x), peer(x)
        ce, peer_ce = (F.cross_entropy(logits, labels) for logits in (ours, theirs))
        if isinstance(method, MutualLearning):
            peer_ce = peer_ce + kl(ours, theirs)
            yield ce + kl(theirs, ours)
        else:
            yield ce + 0.7 * kl(theirs, ours, 4)
        yield peer_ce

    train_by_hand(run, losses, (run.recipe, [student]), (method.recipe, [peer]))
    assert_same_weights(trained.model().state_dict(), student)
    assert_same_weights(peer_of(trained).state_dict(), peer)


def test_the_student_does_not_influence_the_peer_of_rocket_launching(tiny):
    runs = [
        tiny(method=RocketLaunching(*PEER, kd_weight=0.0)),
        tiny(method=RocketLaunching(*PEER, kd_weight=1.0)),
        tiny(method=RocketLaunching(*PEER), model="resnet8-x0.5"),
    ]
    alone, *results = train([tiny(), *runs])
    assert len({aux_fingerprint(trained) for trained in results}) == 1
    assert len({final_weights(trained) for trained in results}) == 3
    assert_same_weights(results[0].model().state_dict(), alone.model())


def test_the_student_influences_the_peer_of_mutual_learning(tiny):
    small, large = train([tiny(method=METHODS[1], model=f"resnet8-x{w}") for w in (0.25, 0.5)])
    assert aux_fingerprint(small) != aux_fingerprint(large)


@every_method
def test_a_peer_has_its_own_learning_rate_and_schedule(tiny, method):
    still = replace(method, recipe=replace(SECOND_RECIPE, lr=0.0))
    stops = replace(method, recipe=replace(SECOND_RECIPE, decay=0.0))
    runs = [tiny(method=still), tiny(method=stops, keep=(1,))]
    first = new_trainer(runs[0]).state.modules
    stood, stopped = train(runs)
    at_start, after_1 = dict(first["peer"].named_parameters()), peer_of(stopped, epoch=1)
    for name, parameter in peer_of(stood).named_parameters():
        assert torch.equal(parameter, at_start[name]), name
    after_1 = dict(after_1.named_parameters())
    for name, parameter in peer_of(stopped).named_parameters():
        assert torch.equal(parameter, after_1[name]), name
    assert not torch.equal(after_1["head.2.weight"], at_start["head.2.weight"])
    assert not torch.equal(stood.model().head[2].weight, first["student"].head[2].weight)
    assert final_weights(stopped) != stopped.summary["weights"]["1"]
    assert stood.log.lr.tolist() == [0.05, 0.05]


@every_method
def test_the_seed_of_the_run_determines_the_peer(tiny, method):
    trainers = [new_trainer(tiny(method=method, seed=seed)) for seed in (0, 0, 1)]
    first, same, other = (fingerprint(t.state.modules["peer"].state_dict()) for t in trainers)
    assert first == same != other


@every_method
def test_the_log_has_the_terms_and_the_peers_accuracy(tiny, method):
    trained = train([tiny(method=method)])[0]
    test = load_data("digits", "test")
    for prefix, network in (("test", trained.model()), ("test_peer", peer_of(trained))):
        logits = network(test.batch(torch.arange(len(test))))
        for name, value in evaluation(logits, test.labels).items():
            assert trained.final[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-5)
    log = trained.log
    assert (log.test_ce != log.test_peer_ce).all()
    if isinstance(method, MutualLearning):
        total = log.train_ce + log.train_kd + log.train_peer_ce + log.train_peer_kd
    else:
        total = log.train_ce + 0.7 * log.train_kd + log.train_peer_ce
    assert log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)
    assert (log.train_kd > 0).all()
    assert CACHES.caches == {}  # no teacher computes logits


def test_a_peer_is_kept_with_each_checkpoint_frozen_and_in_eval_mode(tiny):
    method = METHODS[0]
    long, short = train([tiny(epochs=3, keep=(1,), method=method), tiny(epochs=1, method=method)])
    assert aux_fingerprint(long, 1) == aux_fingerprint(short, 1) != aux_fingerprint(long, 3)
    peer = peer_of(long)
    assert not any(module.training for module in peer.modules())
    assert not any(parameter.requires_grad for parameter in peer.parameters())


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()])
def test_training_again_repairs_a_damaged_or_absent_peer(tiny, damage):
    trained = train([tiny(method=METHODS[0])])[0]
    before, path = aux_fingerprint(trained), store.weights_path(trained.run, 2)
    damage(path)
    with pytest.raises(StoreError, match=f"{path} is damaged" if damage == truncate else str(path)):
        peer_of(trained)
    again = train([trained.run], weights=True)[0]
    assert aux_fingerprint(again) == before
