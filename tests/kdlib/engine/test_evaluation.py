"""Evaluation on test images, and logits of the validation images."""

import pytest
import torch
from gated import lively
from helpers import final_weights
from torch.nn import functional as F

from kdlib import load_data, store, train
from kdlib.engine import LogitCache
from kdlib.engine import evaluation as evaluation_module
from kdlib.engine import trainer as trainer_module
from kdlib.engine.evaluation import evaluate, validation_logits
from kdlib.engine.plan import validation
from kdlib.errors import StoreError


@pytest.mark.parametrize("taught", [False, True])
def test_every_classifier_is_evaluated_on_all_test_images(taught):
    images = load_data("digits", "test")
    student, peer, teacher = (lively("resnet8-x0.25", seed, classes=10) for seed in range(3))
    cache = LogitCache(teacher, images) if taught else None
    got = evaluate({"student": student, "peer": peer}, images, cache)
    x = images.batch(torch.arange(len(images)))
    expected = {}
    with torch.no_grad():
        for prefix, network in (("test", student), ("test_peer", peer)):
            logits = network(x)
            hits = (logits.argmax(1) == images.labels).double().mean()
            expected[f"{prefix}_top1"] = 100 * hits.item()
            expected[f"{prefix}_ce"] = F.cross_entropy(logits, images.labels).item()
            if taught:
                q, p = logits.log_softmax(1), teacher(x).log_softmax(1)
                kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
                expected[f"{prefix}_kl"] = kl.item()
    assert got == pytest.approx(expected, rel=1e-4)
    assert [*got] == [*expected]


@pytest.mark.parametrize("taught", [False, True])
def test_a_part_of_the_test_images_has_all_classes(taught):
    images, student = load_data("digits", "test"), lively("resnet8-x0.25", classes=10)
    cache = LogitCache(lively("resnet8-x0.25", 1, classes=10), images) if taught else None
    index = images.first_index(20)
    assert torch.bincount(images.labels[index], minlength=10).tolist() == [2] * 10
    part = evaluate({"student": student}, images, cache, count=20)
    logits = student(images.batch(index)).detach()
    expected = F.cross_entropy(logits, images.labels[index]).item()
    assert part["test_ce"] == pytest.approx(expected, rel=1e-4)
    whole = evaluate({"student": student}, images, cache)
    assert evaluate({"student": student}, images, cache, count=10**6) == whole


def test_a_run_on_a_part_of_the_images_is_tested_on_all_in_the_end(tiny, monkeypatch):
    counts = []

    def counting(classifiers, images, cache, count=None):
        counts.append(count)
        return evaluate(classifiers, images, cache, count)

    monkeypatch.setattr(trainer_module, "evaluate", counting)
    trained = train([tiny(epochs=4, keep=(2,))])[0]  # 128 training images
    assert counts == [12, 12, 12, None]
    test = load_data("digits", "test")
    last = evaluate({"student": trained.model()}, test, None)
    assert trained.final["test_top1"] == pytest.approx(last["test_top1"])
    counts.clear()
    train([tiny(epochs=2, seed=1, save_logits=True)])  # a route: its earlier epochs are teachers
    assert counts == [None, None]


def test_the_size_of_chunks_changes_no_validation_logit(monkeypatch):
    images, network = load_data("digits").first(128), lively("resnet8-x0.25", classes=10)
    expected = network(images.batch(validation(128))).detach()
    for chunk in (3, 1000):
        monkeypatch.setattr(evaluation_module, "CHUNK", {"cpu": chunk})
        torch.testing.assert_close(validation_logits(network, images), expected)


# --- saved logits ---------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny):
    return train([tiny(save_logits=True)])[0]


def test_logits_of_every_epoch_are_saved_in_half_precision(tiny):
    trained = train([tiny(epochs=3, keep=(1, 2), save_logits=True)])[0]
    x = load_data("digits").first(128).batch(validation(128))
    assert trained.summary["logits"].keys() == {"1", "2", "3"}
    for epoch in (1, 2, 3):
        logits, exact = store.load_logits(trained, epoch), trained.model(epoch)(x)
        assert (logits.dtype, logits.shape) == (torch.float32, (25, 10))
        torch.testing.assert_close(logits, exact, rtol=2**-10, atol=1e-4)
        assert not torch.equal(logits, exact)


@pytest.mark.parametrize("damaged", [True, False])
def test_logits_that_are_damaged_or_not_those_of_the_record_are_made_again(trained, damaged):
    before = store.load_logits(trained, 1)
    path = store.folder(trained.run) / "logits-0001.safetensors"
    if damaged:
        path.write_bytes(b"damaged")
    else:
        store.save_logits(trained.run, 1, torch.zeros(25, 10))
    message = f"{path} is damaged" if damaged else "does not hold the logits that the record"
    with pytest.raises(StoreError, match=message):
        store.load_logits(trained, 1)
    assert path.with_suffix(".damaged").exists() == damaged != path.exists()
    again = train([trained.run], weights=not damaged)[0]
    assert torch.equal(store.load_logits(again, 1), before)
    assert final_weights(again) == final_weights(trained)
