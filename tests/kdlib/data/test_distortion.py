"""Distorted copies of data sets."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from kdlib import load_data
from kdlib.data import canonical_name, count_views, display_name, distortion, split_name
from kdlib.data.distortion import distort, is_distorted
from kdlib.errors import DataError


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
        ("cifar100+half+noise0.04", ("cifar100", "+half+noise0.04")),
        ("cifar10+held+half", ("cifar10", "+held+half")),
        ("folder:/half+half/c+halfway", ("folder:/half+half/c+halfway", "")),
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


# --- half the size, and held-out images -----------------------------------------------------------


def test_half_the_size_averages_squares_of_four_pixels():
    pixels = np.array([[1, 2, 10, 20], [3, 5, 30, 41]], dtype=np.uint8)[None, ..., None]
    # means 2.75 and 25.25
    assert distort(pixels, "+half", "train")[0, ..., 0].tolist() == [[3, 25]]


def test_half_a_folder_keeps_colours_and_order_and_halves_the_margin(photos):
    folder = f"folder:{photos()}"
    whole, half = load_data(folder), load_data(folder + "+half")
    assert (half.size, half.pad) == (whole.size // 2, whole.pad // 2)
    assert count_views(folder + "+half") == half.views
    assert torch.equal(half.labels, whole.labels)
    expected = torch.nn.functional.avg_pool2d(core(whole).permute(0, 3, 1, 2).double(), 2)
    assert (core(half).permute(0, 3, 1, 2) - expected).abs().max() <= 0.5


def test_suffixes_apply_from_left_to_right():
    first = core(load_data("digits+half+noise0.1"))
    assert first.shape[1] == 4
    assert not torch.equal(first, core(load_data("digits+noise0.1+half")))
    assert is_distorted("digits+half+noise0.1")
    assert not is_distorted("digits+held+half")


def test_an_odd_size_cannot_be_halved():
    with pytest.raises(DataError, match=r"digits\+half\+half\+half\+half.*even height"):
        load_data("digits+half+half+half+half")


def test_held_out_images_are_training_images_that_nothing_learns_from():
    whole = load_data("digits")
    train_, test = (load_data("digits+held", split) for split in ("train", "test"))
    assert len(train_) + len(test) == len(whole)
    everything = {core(whole)[k].numpy().tobytes() for k in range(len(whole))}
    parts = [{image.numpy().tobytes() for image in core(part)} for part in (train_, test)]
    assert parts[0] | parts[1] == everything
    assert torch.equal(core(test), core(whole)[4::5])
    assert (test.pad, test.classes) == (0, whole.classes)
