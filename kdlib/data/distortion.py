"""Changed copies of a data set: ``cifar100+half``, ``+noise0.04``, ``+blur1``, ``+held``."""

import re
from collections.abc import Iterator

import numpy as np

BLOCK = 1000
SEEDS = {"train": 20191, "test": 10534}  # arbitrary; other seeds make other data sets


SUFFIXES = re.compile(r"\+(held|half|noise|blur)(\d*\.?\d+)?")
NAME = re.compile(r"(?s)(.*?)((?:\+held|\+half|\+(?:noise|blur)\d*\.?\d+)*)")


def split_name(name: str) -> tuple[str, str]:
    """The name without its suffixes, and the suffixes: ``+half+noise0.04`` or ``""``."""
    base, suffixes = NAME.fullmatch(name).groups()
    # 0.10 and 0.1 are one data set, so they get one name
    return base, "".join(
        f"+{kind}" + (f"{float(strength):g}" if strength else "")
        for kind, strength in SUFFIXES.findall(suffixes)
    )


def is_distorted(name: str) -> bool:
    """Whether a data set has noise or blur."""
    return any(kind in ("noise", "blur") for kind, _ in SUFFIXES.findall(split_name(name)[1]))


def halvings(name: str) -> int:
    """How often the data set's images are halved."""
    return split_name(name)[1].count("+half")


def distort(pixels: np.ndarray, suffixes: str, split: str) -> np.ndarray:
    """Changed copies of the images; an image is changed in the same way in every epoch.

    Args:
        pixels: uint8 ``[n, height, width, channels]``.
        suffixes: applied from left to right. ``+held`` changes no image, and ``+half`` averages
            squares of 2x2 pixels.
            ``+noise<s>`` adds normal noise of deviation s to pixels in [0, 1] and clips the sum.
            ``+blur<s>`` is a Gaussian blur of deviation s in pixels.
        split: ``train`` or ``test``; the two have different noise.

    Raises ValueError for ``+half`` where height or width is odd.
    """
    for kind, strength in SUFFIXES.findall(suffixes):
        if kind == "held":
            continue
        blocks = np.array_split(pixels, max(1, -(-len(pixels) // BLOCK)))
        if kind == "half":
            changed = _halved(blocks)
        elif kind == "noise":
            changed = _with_noise(blocks, float(strength), split)
        else:
            changed = _blurred(blocks, float(strength))
        pixels = np.concatenate(
            [np.clip(np.rint(block), 0, 255).astype(np.uint8) for block in changed]
        )
    return pixels


def _halved(blocks: list[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        n, height, width, channels = block.shape
        if height % 2 or width % 2:
            raise ValueError(f"+half needs an even height and width, not {height}x{width}.")
        squares = block.reshape(n, height // 2, 2, width // 2, 2, channels)
        yield squares.mean((2, 4), dtype=np.float32)


def _with_noise(blocks: list[np.ndarray], deviation: float, split: str) -> Iterator[np.ndarray]:
    """One random stream per split: the noise of an image depends on its index alone."""
    random = np.random.default_rng(SEEDS[split])
    for block in blocks:
        yield block + 255 * deviation * random.standard_normal(block.shape, dtype=np.float32)


def _blurred(blocks: list[np.ndarray], deviation: float) -> Iterator[np.ndarray]:
    from scipy.ndimage import gaussian_filter  # slow to import

    for block in blocks:
        sigma = (0, deviation, deviation, 0)
        yield gaussian_filter(block.astype(np.float32), sigma, mode="nearest")
