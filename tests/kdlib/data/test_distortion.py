"""Distorted copies of data sets."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from kdlib import load_data
from kdlib.data import canonical_name, display_name, distortion, split_name
from kdlib.data.distortion import distort


def core(images):
    """Pixels without their padding."""
    pad = images.pad
    return images.pixels[:, pad : images.pixels.shape[1] - pad, pad : images.pixels.shape[2] - pad]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifar100", ("cifar100", "")),
        ("cifar100+noise0.04", ("cifar100", "+noise0.04")),
        ("digits+blur1", ("digits", "+blur1")),
        ("folder:/a+b/c", ("folder:/a+b/c", "")),
        ("folder:/a+b/c+blur.5", ("folder:/a+b/c", "+blur0.5")),
        ("photos@0123456789ab+noise1", ("photos@0123456789ab", "+noise1")),
        ("digits+noise0.10", ("digits", "+noise0.1")),
    ],
)
def test_a_name_says_what_is_distorted_and_how(name, parts):
    assert split_name(name) == parts


def test_noise_has_its_deviation_and_is_another_in_every_image_and_split():
    grey = np.full((200, 16, 16, 3), 128, dtype=np.uint8)
    train_, test = (distort(grey, "+noise0.05", s).astype(float) - 128 for s in ("train", "test"))
    assert train_.std() / 255 == pytest.approx(0.05, rel=0.02)
    assert abs(train_.mean()) < 0.2
    assert abs(np.corrcoef(train_.ravel(), test.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(train_[0].ravel(), train_[1].ravel())[0, 1]) < 0.2


def test_the_noise_of_an_image_does_not_depend_on_how_many_follow(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)
    whole = distort(pixels, "+noise0.1", "train")
    assert (distort(pixels[:7], "+noise0.1", "train") == whole[:7]).all()
    monkeypatch.setattr(distortion, "BLOCK", 11)
    assert (distort(pixels, "+noise0.1", "train") == whole).all()


def test_distorted_images_are_the_same_on_every_machine():
    """A run's id names them, so that other noise under the same name would be a wrong number."""
    pixels = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    sums = [int(distort(pixels, d, "train").astype(int).sum()) for d in ("+noise0.1", "+blur1")]
    assert sums == [8006, 8128]


def test_a_blur_equals_one_along_each_axis_of_each_image_and_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 2), dtype=np.uint8)
    blurred = distort(pixels, "+blur1", "train")
    for image, result in zip(pixels, blurred, strict=True):
        for channel in range(2):
            expected = image[..., channel].astype(float)
            for axis in (0, 1):
                expected = gaussian_filter1d(expected, 1, axis=axis, mode="nearest")
            assert np.abs(result[..., channel] - expected).max() <= 0.51


def test_a_distorted_data_set_is_its_original_but_for_the_pixels():
    clean, noisy = load_data("digits"), load_data("digits+noise0.1")
    assert noisy.name == "digits+noise0.1"
    assert torch.equal(clean.labels, noisy.labels)
    assert (clean.mean, clean.std, clean.views) == (noisy.mean, noisy.std, noisy.views)
    assert torch.equal(
        core(noisy), torch.from_numpy(distort(core(clean).numpy(), "+noise0.1", "train"))
    )
    border = noisy.pixels.clone()
    border[:, 1:-1, 1:-1] = 0
    assert not border.any()  # zeros are padded, not noise


def test_a_folder_can_be_distorted(photos):
    folder = f"folder:{photos()}"
    clean, blurred = (canonical_name(folder + d) for d in ("", "+blur1"))
    assert blurred == clean + "+blur1"
    assert display_name(folder + "+blur1") == display_name(blurred) == "photos+blur1"
    expected = distort(core(load_data(folder)).numpy(), "+blur1", "train")
    assert torch.equal(core(load_data(blurred)), torch.from_numpy(expected))
