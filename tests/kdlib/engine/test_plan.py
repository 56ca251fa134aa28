"""The order and the views of the images: a pure function of seed and epoch."""

import hashlib
import itertools

import pytest
import torch

from kdlib.engine.plan import epoch_batches, mix, plan, validation


@pytest.mark.parametrize(
    "draw", [lambda: plan(3, 5, n=1000, views=162), lambda: (validation(1000),)]
)
def test_plans_and_validation_images_do_not_use_the_global_random_state(draw):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(map(torch.equal, draw(), first))


def test_a_plan_is_a_permutation_with_views_of_the_whole_range():
    order, view = plan(0, 0, n=5000, views=162)
    assert torch.equal(order.sort().values, torch.arange(5000))
    assert torch.equal(view.unique(), torch.arange(162))
    assert not torch.equal(order, torch.arange(5000))


def test_seeds_and_epochs_do_not_collide():
    pairs = itertools.product(range(40), repeat=2)
    assert len({mix("plan", seed, epoch) for seed, epoch in pairs}) == 1600
    assert mix("plan", 1, 11) != mix("plan", 11, 1)
    first, second = plan(0, 1, 100, 9), plan(1, 0, 100, 9)
    assert not any(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("n", "batch"), [(128, 24), (10, 7), (10, 10), (50, 1), (9, 4), (1438, 64)]
)
def test_batches_of_several_epochs_are_one_stream_of_plans(n, batch):
    epochs = 5
    plans = [
        torch.cat(part) for part in zip(*(plan(7, e, n, 162) for e in range(epochs)), strict=True)
    ]
    steps = epochs * n // batch
    batched = [epoch_batches(7, epoch, n, 162, batch) for epoch in range(epochs)]
    for parts, expected in zip(zip(*batched, strict=True), plans, strict=True):
        got = torch.cat(parts)
        assert got.shape == (steps, batch)
        assert torch.equal(got.flatten(), expected[: steps * batch])


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ValueError, match="batch of 129 is larger than the data set of 128"):
        epoch_batches(0, 0, 128, 9, 129)


# --- the validation images ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 128, 1438, 50_000])
def test_validation_is_a_sorted_fifth_of_the_training_images(n):
    chosen = validation(n)
    assert chosen.dtype == torch.int64
    assert len(chosen) == n // 5
    assert (chosen.diff() > 0).all()
    assert ((chosen >= 0) & (chosen < n)).all()


def test_validation_images_come_from_all_parts_of_the_data_set():
    quarters = torch.bincount(validation(50_000) // 12_500, minlength=4)
    assert ((quarters - 2500).abs() < 200).all()


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (
            lambda: plan(0, 0, n=50_000, views=162),
            "90cba3f869c7053b3976eb69c0562779c342bea0f6d0b923d475c75dc109bbe2",
        ),
        (lambda: (validation(50_000),), "b277d4d7cffefc31"),
    ],
    ids=["plan", "validation"],
)
def test_the_numbers_are_those_of_the_published_results(draw, expected):
    """Where torch draws other numbers, raise ENGINE_VERSION."""
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in draw())).hexdigest()
    assert digest.startswith(expected)
