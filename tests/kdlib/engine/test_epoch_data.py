"""EpochData: the input of an epoch's steps, at fixed addresses."""

import pytest
import torch
from helpers import batches, new_trainer

from kdlib import KD, KDGAN, AttentionTransfer, OneStage, store, train


@pytest.fixture
def teacher(tiny):
    teacher = tiny(epochs=2, model="resnet14-x0.25", keep=(1,))
    train([teacher])
    return teacher


def data_of(run):
    return new_trainer(run).data


def all_batches(data, epochs):
    for epoch in range(epochs):
        for step in range(data.begin(epoch)):
            data.cursor.fill_(step)
            yield epoch, data.batch()


def test_batches_are_those_of_the_plan_with_the_logits_of_the_epochs_teacher(tiny, teacher):
    run = tiny(epochs=3, seed=1, method=OneStage(KD(teacher), gap=1))
    data = data_of(run)
    trained = store.find_record(teacher)
    teachers = [trained.model(epoch) for epoch in (1, 2, 2)]
    expected = list(batches(run, data.images))
    for (epoch, batch), (k, index, view) in zip(all_batches(data, 3), expected, strict=True):
        x = data.images.batch(index, view)
        assert epoch == k
        assert torch.equal(batch["x"], x)
        assert torch.equal(batch["labels"], data.images.labels[index])
        torch.testing.assert_close(
            batch["teacher_logits"], teachers[epoch](x), rtol=1e-4, atol=1e-4
        )


def test_a_later_stage_continues_the_order_of_images(tiny):
    first = tiny(epochs=2, seed=1)
    train([first])
    staged, long = (data_of(tiny(epochs=4, seed=1, **start)) for start in ({"start": first}, {}))
    for epoch in (0, 1):
        steps = staged.begin(epoch)
        assert steps == long.begin(epoch + 2)
        assert torch.equal(staged.index[:steps], long.index[:steps])
        assert torch.equal(staged.view[:steps], long.view[:steps])


@pytest.mark.parametrize("make", [lambda t: None, AttentionTransfer], ids=["CE", "AT"])
def test_without_need_no_logits_are_given(tiny, teacher, make):
    method = make(teacher)
    data = data_of(tiny(**({"method": method} if method else {})))
    data.begin(0)
    assert not data.needs_logits
    assert data.batch()["teacher_logits"] is None


def test_inputs_depend_on_seed_and_epoch_alone_and_stay_in_place(tiny, teacher):
    method = KDGAN(teacher, discriminator=teacher.recipe, copy=teacher.recipe)
    data, same, other = (data_of(tiny(seed=seed, method=method)) for seed in (1, 1, 2))
    addresses = {name: values.data_ptr() for name, values in data.inputs.items()}
    assert addresses.keys() == {"uniform"}
    drawn = []
    for epoch in (0, 1, 0):
        for d in (data, other):
            torch.manual_seed(epoch)
            d.begin(epoch)
        drawn.append(data.inputs["uniform"].clone())
        assert not torch.equal(data.inputs["uniform"], other.inputs["uniform"])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    same.begin(0)
    assert torch.equal(same.inputs["uniform"], drawn[0])
    assert {name: values.data_ptr() for name, values in data.inputs.items()} == addresses
    data.cursor.fill_(2)
    assert torch.equal(data.batch()["inputs"]["uniform"], drawn[0][2])
