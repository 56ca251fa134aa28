"""Images against padding, cropping, flipping and normalising by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from kdlib import load_data
from kdlib.data import Images

SIZE = 6


def make_images(pad, flip, channels, count=3):
    pixels = torch.zeros(count, SIZE + 2 * pad, SIZE + 2 * pad, channels, dtype=torch.uint8)
    inner = torch.randint(256, (count, SIZE, SIZE, channels), generator=torch.manual_seed(0))
    pixels[:, pad : pad + SIZE, pad : pad + SIZE] = inner.byte()
    images = Images(
        name="noise",
        split="train",
        pixels=pixels,
        labels=torch.arange(count) % 2,
        class_names=("a", "b"),
        mean=(0.5, 0.4, 0.3)[:channels],
        std=(0.2, 0.3, 0.4)[:channels],
        pad=pad,
        flip=flip,
    )
    return images, inner.numpy()


def by_hand(image, pad, flip, dy, dx, mean, std):
    """Zero padding, cropping, flipping, scaling and normalising of one ``[h, w, c]`` image."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crop = padded[dy : dy + SIZE, dx : dx + SIZE]
    crop = crop[:, ::-1] if flip else crop
    return ((crop / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("pad", "flip", "channels", "views"),
    [(4, True, 3, 162), (4, True, 1, 162), (1, False, 1, 9), (1, True, 3, 18), (0, False, 1, 1)],
)
def test_every_view_equals_pad_crop_flip_normalise(pad, flip, channels, views):
    images, inner = make_images(pad, flip, channels)
    assert images.views == views
    outcomes = itertools.product((False, True)[: 1 + flip], *2 * [range(2 * pad + 1)])
    for view, (flipped, dy, dx) in enumerate(outcomes):
        batch = images.batch(torch.arange(3), torch.full((3,), view))
        for image, got in zip(inner, batch.numpy(), strict=True):
            expected = by_hand(image, pad, flipped, dy, dx, images.mean, images.std)
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_mixed_batch_is_its_images_one_by_one():
    images, _ = make_images(pad=4, flip=True, channels=3)
    index, view = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([161, 0, 81, 40, 161])
    single = [images.batch(index[k : k + 1], view[k : k + 1]) for k in range(5)]
    assert torch.equal(images.batch(index, view), torch.cat(single))


def test_without_views_a_batch_is_the_images_themselves():
    images, inner = make_images(pad=4, flip=True, channels=3)
    before, index = images.pixels.clone(), torch.tensor([1, 2])
    pixels = torch.from_numpy(inner[1:]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (images.mean, images.std))
    batch = images.batch(index)
    torch.testing.assert_close(batch, (pixels - mean) / std)  # float32, too
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, images.batch(index, torch.full_like(index, images.centre)))
    assert torch.equal(images.pixels, before)


def test_a_part_gives_the_batches_of_the_whole():
    images, _ = make_images(pad=4, flip=True, channels=3)
    two = images.first(2)
    index, view = torch.tensor([1, 0]), torch.tensor([161, 7])
    assert len(two) == len(two.pixels) == 2
    assert torch.equal(two.labels, images.labels[:2])
    assert torch.equal(two.batch(index, view), images.batch(index, view))
    assert all(images.first(count) is images for count in (None, 3, 99))


def test_first_takes_the_classes_in_turn():
    images, _ = make_images(pad=1, flip=False, channels=1, count=6)
    by_class = replace(images, labels=torch.tensor([0, 0, 0, 1, 1, 2]), class_names=("a", "b", "c"))
    assert by_class.first(3).labels.tolist() == [0, 1, 2]
    assert by_class.first(5).labels.tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(by_class.first(3).pixels, images.pixels[[0, 3, 5]])


def test_every_fifth_digit_is_a_test_image():
    bunch = load_digits()
    scaled = torch.tensor(np.round(bunch.images * (255 / 16)), dtype=torch.uint8)
    is_test = torch.arange(len(scaled)) % 5 == 4
    for split, chosen, views in (("train", ~is_test, 9), ("test", is_test, 1)):
        digits = load_data("digits", split)
        assert torch.equal(digits.labels, torch.from_numpy(bunch.target)[chosen])
        pad = digits.pad
        assert torch.equal(F.pad(scaled[chosen], (pad,) * 4)[..., None], digits.pixels)
        assert (len(digits), digits.views) == (1438 if split == "train" else 359, views)
        assert (digits.size, digits.channels, digits.classes) == (8, 1, 10)


def test_digits_are_normalised():
    batch = load_data("digits").batch(torch.arange(1438))
    assert abs(batch.mean()) < 0.01
    assert abs(batch.std() - 1) < 0.01
