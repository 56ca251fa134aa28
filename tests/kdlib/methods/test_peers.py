"""Peers that learn beside the student: RocketLaunching and MutualLearning."""

import pytest
import torch
from by_hand import SECOND_RECIPE, assert_same_weights, evaluation, first_student, kl, train_by_hand
from helpers import peer_of
from torch.nn import functional as F

from kdlib import build_model, load_data, train
from kdlib.engine.plan import mix
from kdlib.engine.train import CACHES
from kdlib.methods import MutualLearning, RocketLaunching

PEER = ("resnet14-x0.25", SECOND_RECIPE)
METHODS = [
    RocketLaunching(*PEER, temperature=4.0, kd_weight=0.7),
    MutualLearning(*PEER),
    MutualLearning(*PEER, kd_weight=0.5),
]
every_method = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.kd_weight}"
)


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
            peer_ce = peer_ce + method.kd_weight * kl(ours, theirs)
            yield ce + method.kd_weight * kl(theirs, ours)
        else:
            yield ce + 0.7 * kl(theirs, ours, 4)
        yield peer_ce

    train_by_hand(run, losses, (run.recipe, [student]), (method.recipe, [peer]))
    assert_same_weights(trained.model().state_dict(), student)
    assert_same_weights(peer_of(trained).state_dict(), peer)


@every_method
def test_the_log_has_the_terms_and_the_peers_accuracy(tiny, method):
    trained = train([tiny(method=method)])[0]
    test, peer = load_data("digits", "test"), peer_of(trained)
    assert not any(module.training for module in peer.modules())
    assert not any(parameter.requires_grad for parameter in peer.parameters())
    for prefix, network in (("test", trained.model()), ("test_peer", peer)):
        logits = network(test.batch(torch.arange(len(test))))
        for name, value in evaluation(logits, test.labels).items():
            assert trained.final[f"{prefix}_{name}"] == pytest.approx(value, rel=1e-5)
    log = trained.log
    assert (log.test_ce != log.test_peer_ce).all()
    if isinstance(method, MutualLearning):
        mutual = log.train_kd + log.train_peer_kd
        total = log.train_ce + log.train_peer_ce + method.kd_weight * mutual
    else:
        total = log.train_ce + 0.7 * log.train_kd + log.train_peer_ce
    assert log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)
    assert (log.train_kd > 0).all()
    assert CACHES.caches == {}  # no teacher computes logits
