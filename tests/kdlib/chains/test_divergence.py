"""The divergence of a student from the checkpoints of its teacher, RCO's Eq. 6."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from kdlib import KD, Checkpoint, Run, load_data, measure, store, train
from kdlib.chains import divergence as divergence_module
from kdlib.chains.divergence import divergence_from_route, logits_of, teacher_of
from kdlib.engine.plan import validation
from kdlib.errors import StoreError


def with_route(teacher):
    """The same run, which keeps all of its checkpoints and logits."""
    return replace(teacher, keep=range(1, teacher.recipe.epochs + 1), save_logits=True)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_the_divergence_is_that_of_eq_6(tiny, options):
    teacher = with_route(tiny(epochs=3, model="resnet14-x0.25"))
    student = train([tiny(method=KD(teacher, at=2), seed=1)])[0]
    tau, index = options.get("temperature", 5.0), validation(128)
    own = student.model()(load_data("digits").first(128).batch(index))
    own = softmax(own.double().numpy() / tau, axis=1)
    expected = []
    for epoch in (1, 2, 3):
        logits = store.load_logits(store.find_record(teacher), epoch)
        taught = softmax(logits.double().numpy() / tau, axis=1)
        expected.append(np.mean([rel_entr(t, s).sum() for t, s in zip(taught, own, strict=True)]))
    table = measure(student, divergence_from_route, **options)
    assert table.epoch.tolist() == [1, 2, 3]
    assert table.kl.tolist() == pytest.approx(expected, rel=1e-6)
    assert min(expected) > 1e-6


def test_other_images_than_the_teachers_are_refused(tiny):
    teacher = with_route(tiny())
    student = replace(tiny(method=KD(teacher)), images=96)
    with pytest.raises(ValueError, match="do not learn from the same images"):
        divergence_from_route(train([student])[0])


@dataclass(frozen=True, kw_only=True)
class TwoTeachers(KD):
    """The first epoch learns from ``teacher``, all others from ``second``."""

    second: Run

    def teacher_at(self, epoch):
        return Checkpoint(self.second if epoch else self.teacher, 1)


def test_the_teacher_is_that_of_the_last_epoch(tiny):
    first, second = tiny(), tiny(seed=1)
    assert teacher_of(first) is None
    assert teacher_of(tiny(method=KD(first, at=1))) == first
    assert teacher_of(tiny(method=TwoTeachers(first, second=second))) == second


def test_logits_are_those_of_the_last_network_without_augmentation(tiny, monkeypatch):
    trained = train([tiny()])[0]
    images = load_data("digits").first(128)
    model = store.require_record(trained.run).model()
    monkeypatch.setattr(divergence_module, "CHUNK", 50)
    expected = model(images.batch(torch.arange(128)))
    torch.testing.assert_close(logits_of(model, images), expected)
    some = torch.tensor([3, 100])
    torch.testing.assert_close(logits_of(model, images, some), expected[some])
    with pytest.raises(StoreError, match="no record"):
        store.require_record(tiny(seed=1))
