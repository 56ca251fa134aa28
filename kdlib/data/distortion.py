"""Distorted copies of a data set: ``cifar100+noise0.04``, ``cifar100+blur1``."""

import re
from collections.abc import Iterator

import numpy as np

BLOCK = 1000
SEEDS = {"train": 20191, "test": 10534}  # any two; other ones make another data set


def split_name(name: str) -> tuple[str, str]:
    """A data set's name and, from a ``+`` on, its distortion; nothing where there is none."""
    match = re.fullmatch(r"(.+)\+(noise|blur)(\d*\.?\d+)", name)
    # one name for one data set: 0.10 is 0.1
    return (match[1], f"+{match[2]}{float(match[3]):g}") if match else (name, "")


def distort(pixels: np.ndarray, distortion: str, split: str) -> np.ndarray:
    """Distort every image once: what is seen of it, in training too, is always the same.

    Args:
        pixels: uint8 ``[n, height, width, channels]``.
        distortion: ``+noise<s>``, normal noise of deviation s for pixels in [0, 1], cut off where
            they end; ``+blur<s>``, a Gaussian blur of deviation s in pixels.
        split: train and test have noise of their own.
    """
    kind, strength = re.fullmatch(r"\+([a-z]+)(.+)", distortion).groups()
    blocks = np.array_split(pixels, max(1, -(-len(pixels) // BLOCK)))
    distorted = {"noise": _with_noise, "blur": _blurred}[kind](blocks, float(strength), split)
    return np.concatenate([np.clip(np.rint(block), 0, 255).astype(np.uint8) for block in distorted])


def _with_noise(blocks: list[np.ndarray], deviation: float, split: str) -> Iterator[np.ndarray]:
    """One stream for a split, so that an image's noise is told by its place."""
    random = np.random.default_rng(SEEDS[split])
    for block in blocks:
        yield block + 255 * deviation * random.standard_normal(block.shape, dtype=np.float32)


def _blurred(blocks: list[np.ndarray], deviation: float, split: str) -> Iterator[np.ndarray]:
    from scipy.ndimage import gaussian_filter  # much to import for one kind of data set

    for block in blocks:
        sigma = (0, deviation, deviation, 0)
        yield gaussian_filter(block.astype(np.float32), sigma, mode="nearest")
