"""Peers that learn beside the student: RocketLaunching and MutualLearning."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    batches,
    final_weights,
    new_trainer,
    parts_fingerprint,
    parts_of,
    peer_of,
    same_log,
    truncate,
)
from torch.nn import functional as F

from kdlib import Recipe, build_model, load_data, store, train
from kdlib.engine.plan import mix
from kdlib.engine.train import CACHES
from kdlib.errors import StoreError
from kdlib.methods import MutualLearning, RocketLaunching
from kdlib.store import fingerprint

PEER = "resnet14-x0.25"
# Its epochs and batch are the student's, whatever it says.
PEERS_RECIPE = Recipe(9, 9, lr=0.02, milestones=(1,), decay=0.5, momentum=0.8, weight_decay=1e-4)
METHODS = [
    RocketLaunching(PEER, PEERS_RECIPE, temperature=4.0, kd_weight=0.7),
    MutualLearning(PEER, PEERS_RECIPE),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def kl(of, by, temperature=1.0):
    """KL(of ‖ by), ``of`` without gradient."""
    p = F.softmax(of.detach() / temperature, 1)
    return (p * (p.log() - F.log_softmax(by / temperature, 1))).sum(1).mean()


def two_loops(run):
    """Two networks in turn, each with an optimizer of its own, as anybody would write it."""
    images, method = load_data("digits").first(run.images), run.method
    networks, optimizers = [], []
    for name, recipe, seed in (
        (run.model, run.recipe, mix("weights", run.seed)),
        (method.peer, method.recipe, mix("parts", run.seed)),
    ):
        network = build_model(name, classes=10, channels=1, seed=seed).train()
        networks.append(network.to(memory_format=torch.channels_last))
        optimizers.append(
            torch.optim.SGD(
                network.parameters(),
                lr=recipe.lr,
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
            )
        )
    for epoch, index, view in batches(run, images):
        for optimizer, recipe in zip(optimizers, (run.recipe, method.recipe), strict=True):
            falls = sum(epoch >= milestone for milestone in recipe.milestones)
            optimizer.param_groups[0]["lr"] = recipe.lr * recipe.decay**falls
        x, labels = images.batch(index, view), images.labels[index]
        student, peer = (network(x) for network in networks)
        losses = [F.cross_entropy(logits, labels) for logits in (student, peer)]
        if isinstance(method, MutualLearning):
            losses[0] = losses[0] + kl(peer, student)
            losses[1] = losses[1] + kl(student, peer)
        else:
            t = method.temperature
            losses[0] = losses[0] + method.kd_weight * t**2 * kl(peer, student, t)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return networks


@every_method
def test_a_pair_equals_two_plain_pytorch_loops(tiny, method):
    run = tiny(milestones=(1,), decay=0.3, method=method, seed=2)
    trained = train([run])[0]
    for got, expected in zip((trained.model(), peer_of(trained)), two_loops(run), strict=True):
        weights = got.state_dict()
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_rocket_launching_peer_is_not_influenced_by_its_student(tiny):
    runs = [
        tiny(method=RocketLaunching(PEER, PEERS_RECIPE, kd_weight=0.0)),
        tiny(method=RocketLaunching(PEER, PEERS_RECIPE, kd_weight=1.0)),
        tiny(method=RocketLaunching(PEER, PEERS_RECIPE), model="resnet8-x0.5"),
    ]
    results = train(runs)
    assert len({parts_fingerprint(trained) for trained in results}) == 1
    assert len({final_weights(trained) for trained in results}) == 3


def test_without_its_weight_a_rocket_launching_student_learns_from_labels_alone(tiny):
    alone, beside = train([tiny(), tiny(method=RocketLaunching(PEER, PEERS_RECIPE, kd_weight=0.0))])
    ours, theirs = beside.model().state_dict(), alone.model().state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_mutual_learning_peers_are_influenced_by_their_students(tiny):
    method = MutualLearning(PEER, PEERS_RECIPE)
    small, large = train([tiny(method=method), tiny(method=method, model="resnet8-x0.5")])
    assert parts_fingerprint(small) != parts_fingerprint(large)


@every_method
def test_a_peer_has_a_rate_of_its_own(tiny, method):
    """Of zero it stands still, while the student moves; from its milestone on, too."""
    still = replace(method, recipe=replace(PEERS_RECIPE, lr=0.0))
    stops = replace(method, recipe=replace(PEERS_RECIPE, decay=0.0))
    runs = [tiny(method=still), tiny(method=stops, keep=(1,))]
    first = {
        name: tensor.clone()
        for name, tensor in new_trainer(runs[0]).state.networks.named_parameters()
    }
    stood, stopped = train(runs)
    for name, parameter in peer_of(stood).named_parameters():
        assert torch.equal(parameter, first[f"peer.{name}"]), name
    assert any(
        not torch.equal(p, first[f"student.{name}"]) for name, p in stood.model().named_parameters()
    )
    after = dict(peer_of(stopped, epoch=1).named_parameters())
    for name, parameter in peer_of(stopped).named_parameters():
        assert torch.equal(parameter, after[name]), name
    assert not torch.equal(after["head.2.weight"], first["peer.head.2.weight"])
    assert final_weights(stopped) != stopped.summary["weights"]["1"]
    assert stood.log.lr.tolist() == [0.05, 0.05]


@every_method
def test_peers_start_from_their_seed(tiny, method):
    lanes = [new_trainer(tiny(method=method, seed=seed)) for seed in (0, 0, 1)]
    first, same, other = (fingerprint(lane.state.networks["peer"].state_dict()) for lane in lanes)
    assert first == same != other


@every_method
def test_the_log_says_how_good_the_peer_is(tiny, method):
    trained = train([tiny(method=method)])[0]
    test = load_data("digits", "test")
    for prefix, network in (("test", trained.model()), ("test_peer", peer_of(trained))):
        logits = network(test.batch(torch.arange(len(test))))
        hits = (logits.argmax(1) == test.labels).float().mean()
        assert trained.final[f"{prefix}_top1"] == pytest.approx(100 * hits.item())
        ce = F.cross_entropy(logits, test.labels)
        assert trained.final[f"{prefix}_ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert (trained.log.test_ce != trained.log.test_peer_ce).all()


def test_the_log_holds_the_terms_of_both(tiny):
    rocket, mutual = train([tiny(method=method) for method in METHODS])
    log = rocket.log
    total = log.train_ce + 0.7 * log.train_kd + log.train_peer_ce
    assert log.train_loss.tolist() == pytest.approx(total.tolist(), rel=1e-5)
    terms = mutual.log[["train_ce", "train_kd", "train_peer_ce", "train_peer_kd"]]
    assert mutual.log.train_loss.tolist() == pytest.approx(terms.sum(axis=1).tolist(), rel=1e-5)
    assert (terms > 0).all(axis=None)


@every_method
def test_no_teacher_is_needed(tiny, method):
    trained = train([tiny(method=method)])[0]
    assert trained.summary["teachers"] == {}
    assert CACHES.banks == {}


@every_method
def test_a_resumed_pair_equals_an_uninterrupted_one(tiny, method, assert_resumes):
    run = tiny(epochs=3, milestones=(2,), method=method)
    assert_resumes(run)


def test_pairs_side_by_side_equal_pairs_one_by_one(tiny, elsewhere):
    runs = [tiny(method=method, seed=seed) for seed, method in enumerate(METHODS)]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=2)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))


def test_a_peer_is_kept_with_every_checkpoint(tiny):
    method = RocketLaunching(PEER, PEERS_RECIPE)
    long, short = train([tiny(epochs=3, keep=(1,), method=method), tiny(epochs=1, method=method)])
    assert parts_fingerprint(long, 1) == parts_fingerprint(short, 1) != parts_fingerprint(long, 3)


def test_a_loaded_peer_is_frozen_and_in_eval_mode(tiny):
    peer = peer_of(train([tiny(method=METHODS[0])])[0])
    assert not any(module.training for module in peer.modules())
    assert not any(parameter.requires_grad for parameter in peer.parameters())


def test_a_student_has_nothing_of_its_peer(tiny):
    trained, plain = train([tiny(method=METHODS[1]), tiny()])
    assert trained.model().state_dict().keys() == plain.model().state_dict().keys()
    assert parts_of(plain) == {}


def test_a_damaged_peer_is_named(tiny):
    trained = train([tiny(method=METHODS[0])])[0]
    path = store.weights_path(trained.run, 2)
    truncate(path)
    with pytest.raises(StoreError, match=f"{path} is damaged"):
        peer_of(trained)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()])
def test_training_again_mends_a_damaged_peer(tiny, damage):
    """As the message promises."""
    trained = train([tiny(method=METHODS[0])])[0]
    before = parts_fingerprint(trained)
    damage(store.weights_path(trained.run, 2))
    with pytest.raises(StoreError):
        peer_of(trained)
    again = train([trained.run], weights=True)[0]
    assert parts_fingerprint(again) == before


def test_every_part_of_a_pair_changes_the_id(tiny):
    rocket = METHODS[0]
    methods = [
        *METHODS,
        replace(rocket, peer="resnet14-x0.5"),
        replace(rocket, temperature=5.0),
        replace(rocket, kd_weight=1.0),
        replace(rocket, recipe=replace(PEERS_RECIPE, lr=0.1)),
        replace(rocket, recipe=replace(PEERS_RECIPE, milestones=())),
    ]
    assert len({tiny(method=method).id for method in methods}) == len(methods)
