"""Distorted copies of a data set: ``cifar100+noise0.04``, ``cifar100+blur1``."""

import re
from collections.abc import Iterator

import numpy as np

BLOCK = 1000
SEEDS = {"train": 20191, "test": 10534}  # arbitrary; other seeds make other data sets


def split_name(name: str) -> tuple[str, str]:
    """The name without its distortion, and the distortion: ``+noise0.04``, ``+blur1`` or ``""``."""
    match = re.fullmatch(r"(.+)\+(noise|blur)(\d*\.?\d+)", name)
    # 0.10 and 0.1 are one data set, so they get one name
    return (match[1], f"+{match[2]}{float(match[3]):g}") if match else (name, "")


def distort(pixels: np.ndarray, distortion: str, split: str) -> np.ndarray:
    """Distorted copies of the images; an image has the same distortion in every epoch.

    Args:
        pixels: uint8 ``[n, height, width, channels]``.
        distortion: ``+noise<s>`` adds normal noise of deviation s to pixels in [0, 1] and clips the
            sum; ``+blur<s>`` is a Gaussian blur of deviation s in pixels.
        split: ``train`` or ``test``; the two have different noise.
    """
    kind, strength = re.fullmatch(r"\+([a-z]+)(.+)", distortion).groups()
    blocks = np.array_split(pixels, max(1, -(-len(pixels) // BLOCK)))
    distorted = {"noise": _with_noise, "blur": _blurred}[kind](blocks, float(strength), split)
    return np.concatenate([np.clip(np.rint(block), 0, 255).astype(np.uint8) for block in distorted])


def _with_noise(blocks: list[np.ndarray], deviation: float, split: str) -> Iterator[np.ndarray]:
    """One random stream per split: the noise of an image depends on its index alone."""
    random = np.random.default_rng(SEEDS[split])
    for block in blocks:
        yield block + 255 * deviation * random.standard_normal(block.shape, dtype=np.float32)


def _blurred(blocks: list[np.ndarray], deviation: float, split: str) -> Iterator[np.ndarray]:
    from scipy.ndimage import gaussian_filter  # slow to import

    for block in blocks:
        sigma = (0, deviation, deviation, 0)
        yield gaussian_filter(block.astype(np.float32), sigma, mode="nearest")
