"""Data sets by name: digits, MNIST, CIFAR, and folders of images.

A folder of images is decoded once into a cache file of the store. When the folder changes, it is
decoded again.
"""

import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kdlib import files
from kdlib.data.distortion import distort, halvings, split_name
from kdlib.data.images import Images
from kdlib.errors import DataError, UnknownName

SPLITS = ("train", "test")
FOLDER_SIZE = 32
FOLDER_TYPES = (".png", ".jpg", ".jpeg")


class Kind(NamedTuple):
    """Augmentation and normalisation of a data set, as the papers use them."""

    pad: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


KINDS = {
    "digits": Kind(1, False, (0.3059,), (0.3763,)),
    "mnist": Kind(0, False, (0.1307,), (0.3081,)),
    "cifar10": Kind(4, True, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Kind(4, True, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# A folder is normalised by the mean and the deviation of its own training images.
FOLDER_KIND = Kind(4, True, (), ())
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}

# For each canonical name that this process has computed, its image folder.
_folders: dict[str, Path] = {}


def load_data(name: str, split: str = "train", device: str | torch.device = "cpu") -> Images:
    """One split of a data set, in the memory of ``device``.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``mnist`` or ``folder:<path>`` with images in
            ``<path>/{train,test}/<class>/*.{png,jpg,jpeg}``; they are resized to 32x32.
            The suffix ``+half`` halves height and width, ``+noise<deviation>`` and
            ``+blur<deviation>`` distort every image. With ``+held`` every fifth training image is
            a test image, and the data set's own test images are not used. Several suffixes apply
            from left to right, ``+held`` before all others.
        split: ``train`` or ``test``.

    Raises:
        UnknownName: the data set or the split is unknown.
        DataError: a file is missing or damaged; the message says how to get it.
    """
    if split not in SPLITS:
        raise UnknownName("split", split, SPLITS)
    return _load(canonical_name(name), split, str(torch.device(device)))


def check_name(name: str) -> str:
    """The name; the path of a folder becomes absolute. Reads no file. Raises UnknownName."""
    base, distortion = split_name(name)
    if base.startswith("folder:"):
        base = "folder:" + os.path.abspath(os.path.expanduser(base.removeprefix("folder:")))
    elif base not in KINDS and "@" not in base:
        raise UnknownName("data set", name, [*KINDS, "folder:<path>"])
    return base + distortion


def canonical_name(name: str) -> str:
    """The data set's name, the same on every machine; for a folder, with a hash of its images.

    The ids of runs contain this name, so it does not contain the path. Reads the folder, and
    raises the errors of ``load_data``.
    """
    base, distortion = split_name(check_name(name))
    if base.startswith("folder:"):
        folder = Path(base.removeprefix("folder:")).resolve()
        base = f"{folder.name}@{_folder_cache(folder)['content'][:12]}"
        _folders[base] = folder
    return base + distortion


def count_views(name: str) -> int:
    """The number of views of a training image; no image is read. Raises UnknownName."""
    check_name(name)
    kind = _kind(name)
    return (2 * kind.pad + 1) ** 2 * (1 + kind.flip)


def _kind(name: str) -> Kind:
    """The kind of a data set; smaller images have a smaller margin."""
    kind = KINDS.get(split_name(name)[0], FOLDER_KIND)
    return kind._replace(pad=kind.pad >> halvings(name))


def display_name(name: str) -> str:
    """The name for tables and figures. A folder has neither path nor hash there."""
    base, distortion = split_name(name)
    folder = base.removeprefix("folder:").rstrip("/").rpartition("/")[2]
    return re.sub("@[0-9a-f]{12}$", "", folder) + distortion


def download(name: str) -> Path:
    """Download ``cifar10``, ``cifar100`` or ``mnist``; torchvision verifies the checksums.

    Returns the folder of the files. Raises UnknownName for another data set.
    """
    if name not in TORCHVISION:
        raise UnknownName("downloadable data set", name, TORCHVISION)
    for split in SPLITS:
        _torchvision(name, split, fetch=True)
    return files.data_root()


@lru_cache(maxsize=4)
def _load(name: str, split: str, device: str) -> Images:
    (base, suffixes), kind = split_name(name), _kind(name)
    held = "+held" in suffixes
    source = "train" if held else split
    if base == "digits":
        pixels, labels, class_names = _digits(source)
    elif base in TORCHVISION:
        pixels, labels, class_names = _torchvision(base, source)
    else:
        pixels, labels, class_names, mean, std = _folder(base, source)
        kind = kind._replace(mean=mean, std=std)
    if held:
        chosen = (np.arange(len(pixels)) % 5 == 4) == (split == "test")
        pixels, labels = pixels[chosen], np.asarray(labels)[chosen]
    try:
        pixels = distort(pixels, suffixes, split)
    except ValueError as error:
        raise DataError(f"{display_name(name)}: {error}") from error
    if split == "test":  # test images are not augmented
        kind = kind._replace(pad=0, flip=False)
    pixels = F.pad(torch.from_numpy(pixels), (0, 0, kind.pad, kind.pad, kind.pad, kind.pad))
    return Images(
        name=display_name(name),
        split=split,
        pixels=pixels.to(device),
        labels=torch.as_tensor(labels, dtype=torch.int64, device=device),
        class_names=tuple(class_names),
        **kind._asdict(),
    )


def _digits(split: str) -> tuple:
    """scikit-learn's 1,797 digits; every fifth image is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    chosen = (np.arange(len(pixels)) % 5 == 4) == (split == "test")
    return pixels[chosen], bunch.target[chosen], map(str, range(10))


def _torchvision(name: str, split: str, fetch: bool = False) -> tuple:
    import torchvision  # takes seconds

    root = files.data_root()
    advice = (
        f"Download it with `python -m kdlib.data {name}`, or copy torchvision's files to {root}, "
        f"or set KDLIB_DATA to their folder, or use `./run_all.sh --data {name}=folder:PATH`."
    )
    try:
        kind = getattr(torchvision.datasets, TORCHVISION[name])
        dataset = kind(root, train=split == "train", download=fetch)
        pixels = np.asarray(dataset.data)
    except RuntimeError as error:  # a file is missing, or its checksum is wrong
        raise DataError(f"{name} is missing or damaged under {root}. {advice}") from error
    except (OSError, ValueError, EOFError, AssertionError) as error:
        raise DataError(f"{name} under {root} cannot be read ({error}). {advice}") from error
    # [n, height, width] becomes [n, height, width, 1]
    return pixels.reshape(*pixels.shape[:3], -1), dataset.targets, dataset.classes


def _folder(name: str, split: str) -> tuple:
    content = name.rpartition("@")[2]
    if name not in _folders:
        raise DataError(
            f"The run needs the image folder {display_name(name)!r} (hash of images: {content}). "
            f"Its path is unknown: call `load_data('folder:PATH')` first."
        )
    cache = _folder_cache(_folders[name])
    if not cache["content"].startswith(content):
        raise DataError(f"{_folders[name]} has changed since {name}. Make the run again.")
    with safe_open(cache["file"], "np") as tensors:
        pixels, labels = (tensors.get_tensor(f"{split}_{part}") for part in ("pixels", "labels"))
    return pixels, labels, cache["classes"], tuple(cache["mean"]), tuple(cache["std"])


def _folder_cache(folder: Path) -> dict:
    """The description in a folder's cache file; a missing or old cache file is written anew."""
    found, digest = _list_images(folder), hashlib.sha256()
    for split, class_name, path in found:
        status = os.stat(path)
        line = f"{split}/{class_name}/{path}/{status.st_size}/{status.st_mtime_ns}\n"
        digest.update(line.encode())
    fingerprint = digest.hexdigest()
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    file = files.home() / "cache" / f"{folder.name}-{place}.safetensors"
    try:
        with safe_open(file, "np") as tensors:
            about = json.loads(tensors.metadata()["about"])
        if about["fingerprint"] == fingerprint:
            return about | {"file": file}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        pass  # the file is missing, damaged or from another version
    about, tensors = _decode_folder(found)
    about["fingerprint"] = fingerprint
    with files.replacing(file) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(about)})
    return about | {"file": file}


def _list_images(folder: Path) -> list[tuple[str, str, str]]:
    """(split, class, path) of every image, sorted by name.

    Own code: torchvision takes seconds to import, and it also takes images from subfolders.
    """
    classes = {}
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise DataError(f"{folder} has no folder {split}/: an image folder needs both splits.")
        classes[split] = {entry.name for entry in os.scandir(folder / split) if entry.is_dir()}
    if odd := classes["train"] ^ classes["test"]:
        raise DataError(f"{folder}: train/ and test/ differ in their classes: {sorted(odd)[:5]}.")
    if not classes["train"]:
        raise DataError(f"{folder}/train has no class folders.")
    found = []
    for split in SPLITS:
        for name in sorted(classes[split]):
            paths = sorted(entry.path for entry in os.scandir(folder / split / name))
            paths = [path for path in paths if path.lower().endswith(FOLDER_TYPES)]
            if not paths:
                raise DataError(f"{folder / split / name} has no .png, .jpg or .jpeg image.")
            found += [(split, name, path) for path in paths]
    return found


def _decode_folder(found: list[tuple[str, str, str]]) -> tuple[dict, dict[str, np.ndarray]]:
    """The description of a folder's images, and the images and labels of both splits."""
    classes = sorted({name for _, name, _ in found})
    content, tensors = hashlib.sha256(json.dumps(classes).encode()), {}
    for split in SPLITS:
        members = [(name, path) for which, name, path in found if which == split]
        pixels = np.empty((len(members), FOLDER_SIZE, FOLDER_SIZE, 3), dtype=np.uint8)
        for k, (_, path) in enumerate(members):
            pixels[k] = _decode(path)
        labels = np.array([classes.index(name) for name, _ in members], dtype=np.int64)
        content.update(pixels.data)
        content.update(labels.data)
        tensors |= {f"{split}_pixels": pixels, f"{split}_labels": labels}
    mean, std = _statistics(tensors["train_pixels"])
    about = {"content": content.hexdigest(), "classes": classes, "mean": mean, "std": std}
    return about, tensors


def _decode(path: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            size = (FOLDER_SIZE, FOLDER_SIZE)
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}).") from error


def _statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, from a histogram: exact, and small in memory."""
    value, mean, std = np.arange(256) / 255, [], []
    for channel in range(pixels.shape[3]):
        images = (image[..., channel].ravel() for image in pixels)
        count = sum(np.bincount(image, minlength=256) for image in images)
        centre = np.average(value, weights=count)
        mean.append(round(float(centre), 4))
        std.append(round(float(np.average((value - centre) ** 2, weights=count) ** 0.5), 4))
    return mean, std
