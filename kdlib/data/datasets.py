"""Data sets by name: digits, torchvision's own files, folders of images.

Folders are decoded once into one uint8 file of the store; the file is made anew when the folder
changes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kdlib import files
from kdlib.data.distortion import distort, split_name
from kdlib.data.images import Images
from kdlib.errors import DataError, UnknownName

SPLITS = ("train", "test")
FOLDER_SIZE = 32
FOLDER_TYPES = {".png", ".jpg", ".jpeg"}


class Kind(NamedTuple):
    """What is fixed about a data set: augmentation and normalisation as the papers use them."""

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

FOLDER_KIND = Kind(4, True, (0.5,), (0.5,))  # of which mean and deviation are its images' own


def load_data(name: str, split: str = "train", device: str | torch.device = "cpu") -> Images:
    """One split of a data set, resident on ``device``.

    Args:
        name: ``digits``, ``cifar10``, ``cifar100``, ``mnist`` or ``folder:<path>`` with
            ``<path>/{train,test}/<class>/*.{png,jpg,jpeg}``, resized to 32x32 where they are not;
            ``+noise<deviation>`` or ``+blur<deviation>`` behind it distorts every image.
        split: ``train`` or ``test``.

    Raises:
        UnknownName: no such data set or split.
        DataError: files that are missing or damaged, and how to get them.
    """
    if split not in SPLITS:
        raise UnknownName("split", split, SPLITS)
    return _load(canonical_name(name), split, str(torch.device(device)))


def canonical_name(name: str) -> str:
    """The name under which runs know a data set: for a folder its own name and content hash.

    Free of the machine it is read on, so that a run's id is, too. Raises as ``load_data``.
    """
    base, distortion = split_name(name)
    if base.startswith("folder:"):
        folder = Path(base.removeprefix("folder:")).expanduser().resolve()
        canonical = f"{folder.name}@{_folder_cache(folder)['content'][:12]}"
        _folders[canonical] = folder
        return canonical + distortion
    if base not in KINDS and "@" not in base:
        raise UnknownName("data set", name, [*KINDS, "folder:<path>"])
    return base + distortion


def check_name(name: str) -> None:
    base, _ = split_name(name)
    if base not in KINDS and not base.startswith("folder:") and "@" not in base:
        raise UnknownName("data set", name, [*KINDS, "folder:<path>"])


def count_views(name: str) -> int:
    """Distinct views of a training image, known without loading one."""
    base, _ = split_name(canonical_name(name))
    kind = KINDS.get(base, FOLDER_KIND)
    return (2 * kind.pad + 1) ** 2 * (1 + kind.flip)


def display_name(name: str) -> str:
    """The name to print beside a number: a folder's without its hash."""
    base, distortion = split_name(name)
    folder = base.removeprefix("folder:").rstrip("/").rpartition("/")[2]
    return re.sub("@[0-9a-f]{12}$", "", folder) + distortion


def download(name: str) -> Path:
    """Fetch ``cifar10``, ``cifar100`` or ``mnist`` with torchvision, which checks their sums."""
    if name not in _torchvision_names:
        raise UnknownName("downloadable data set", name, _torchvision_names)
    for split in SPLITS:
        _torchvision(name, split, fetch=True)
    return files.data_root()


_folders: dict[str, Path] = {}
_torchvision_names = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}


@lru_cache(maxsize=4)
def _load(name: str, split: str, device: str) -> Images:
    base, distortion = split_name(name)
    if base == "digits":
        pixels, labels, class_names = _digits(split)
    elif base in _torchvision_names:
        pixels, labels, class_names = _torchvision(base, split)
    else:
        pixels, labels, class_names, kind = _folder(base, split)
    kind = KINDS.get(base) or kind
    if distortion:
        pixels = distort(pixels, distortion, split)
    if split == "test":  # seen as it is: one view
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
    return pixels[chosen], bunch.target[chosen], [str(digit) for digit in range(10)]


def _torchvision(name: str, split: str, fetch: bool = False) -> tuple:
    import torchvision

    root = files.data_root()
    advice = (
        f"Fetch it with `python -m kdlib.data {name}`, put torchvision's files there, set "
        f"KDLIB_DATA, or let another data set stand in: `./run_all.sh --data {name}=folder:PATH`."
    )
    try:
        dataset = getattr(torchvision.datasets, _torchvision_names[name])(
            root, train=split == "train", download=fetch
        )
        return _pixels(dataset.data), dataset.targets, dataset.classes
    except RuntimeError as error:  # torchvision's word for both "missing" and "wrong checksum"
        raise DataError(f"{name} is missing or damaged under {root}. {advice}") from error
    except (OSError, ValueError, EOFError, AssertionError) as error:
        raise DataError(f"{name} under {root} cannot be read ({error}). {advice}") from error


def _pixels(data) -> np.ndarray:
    """torchvision's images as ``[n, height, width, channels]``."""
    data = np.asarray(data)
    return data[..., None] if data.ndim == 3 else data


def _folder(name: str, split: str) -> tuple:
    if name not in _folders:
        raise DataError(
            f"The run names the image folder {display_name(name)!r} (content {name.rpartition('@')[2]}), "
            f"and no such folder was named: pass it as `folder:PATH`."
        )
    cache = _folder_cache(_folders[name])
    if not cache["content"].startswith(name.rpartition("@")[2]):
        raise DataError(f"{_folders[name]} has changed since this run was described as {name}.")
    with safe_open(cache["file"], "np") as tensors:
        pixels, labels = (tensors.get_tensor(f"{split}_{part}") for part in ("pixels", "labels"))
    mean, std = tuple(cache["mean"]), tuple(cache["std"])
    return pixels, labels, cache["classes"], FOLDER_KIND._replace(mean=mean, std=std)


def _folder_cache(folder: Path) -> dict:
    """What the cache file of an image folder says of itself; the file is made where it is stale."""
    found = list(_list_images(folder))
    digest = hashlib.sha256()
    for split, label_, path in found:
        status = os.stat(path)
        digest.update(f"{split}/{label_}/{path}/{status.st_size}/{status.st_mtime_ns}\n".encode())
    fingerprint = digest.hexdigest()
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    file = files.home() / "cache" / f"{folder.name}-{place}.safetensors"
    try:
        with safe_open(file, "np") as tensors:
            about = json.loads(tensors.metadata()["about"])
        if about["fingerprint"] == fingerprint:
            return about | {"file": file}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        pass  # absent, damaged or of another make: decode again
    about = _decode_folder(found, file, fingerprint)
    return about | {"file": file}


def _list_images(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(split, class, path) of every image, in a fixed order."""
    classes = None
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise DataError(f"{folder} has no folder {split}/: an image folder needs both splits.")
        names = sorted(entry.name for entry in os.scandir(folder / split) if entry.is_dir())
        if classes is not None and names != classes:
            odd = sorted(set(names) ^ set(classes))[:5]
            raise DataError(f"{folder}: train/ and test/ differ in their classes: {odd}.")
        classes = names
        for name in names:
            entries = sorted(os.scandir(folder / split / name), key=lambda entry: entry.name)
            paths = [e.path for e in entries if Path(e.name).suffix.lower() in FOLDER_TYPES]
            if not paths:
                raise DataError(f"{folder / split / name} has no .png, .jpg or .jpeg image.")
            yield from ((split, name, path) for path in paths)
    if not classes:
        raise DataError(f"{folder}/train has no class folders.")


def _decode_folder(found: list[tuple[str, str, str]], file: Path, fingerprint: str) -> dict:
    from PIL import Image

    classes = sorted({name for _, name, _ in found})
    number = {name: k for k, name in enumerate(classes)}
    content, tensors = hashlib.sha256(json.dumps(classes).encode()), {}
    for split in SPLITS:
        members = [(number[name], path) for which, name, path in found if which == split]
        pixels = np.empty((len(members), FOLDER_SIZE, FOLDER_SIZE, 3), dtype=np.uint8)
        for k, (_, path) in enumerate(members):
            try:
                with Image.open(path) as image:
                    image = image.convert("RGB")
                    if image.size != (FOLDER_SIZE, FOLDER_SIZE):
                        image = image.resize((FOLDER_SIZE, FOLDER_SIZE), Image.Resampling.BICUBIC)
                    pixels[k] = np.asarray(image)
            except (OSError, SyntaxError, ValueError) as error:
                raise DataError(f"{path} cannot be read as an image ({error}).") from error
        labels = np.array([label_ for label_, _ in members], dtype=np.int64)
        content.update(pixels.data)
        content.update(labels.data)
        tensors |= {f"{split}_pixels": pixels, f"{split}_labels": labels}
    mean, std = _statistics(tensors["train_pixels"])
    about = {
        "fingerprint": fingerprint,
        "content": content.hexdigest(),
        "classes": classes,
        "mean": mean,
        "std": std,
    }
    with files.replacing(file) as temporary:
        save_file(tensors, temporary, {"about": json.dumps(about)})
    return about


def _statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, from a histogram: exact, and small in memory."""
    value = np.arange(256) / 255
    mean, std = [], []
    for channel in range(pixels.shape[3]):
        count = np.zeros(256, dtype=np.int64)
        for block in np.array_split(pixels[..., channel], len(pixels) // 1000 + 1):
            count += np.bincount(block.ravel(), minlength=256)
        centre = float((count * value).sum() / count.sum())
        mean.append(round(centre, 4))
        std.append(round(float((count * (value - centre) ** 2).sum() / count.sum()) ** 0.5, 4))
    return mean, std
