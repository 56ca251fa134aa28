"""Making batches: ``Images.batch`` beside the field's pipeline, in images/s of one CPU core.

- pipeline: PIL image from the array, RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor,
  Normalize for every item, collated by a DataLoader without workers;
- transforms: the same transforms alone, on PIL images that lie ready in memory;
- kdlib: an epoch's plan and one gather per batch.

The random pixels are CIFAR's size and number of channels; the work does not depend on what they
show. With ``--device cuda`` the pipeline ends with the copy to the GPU, and kdlib's gather runs
there, driven by one core. "largest difference" compares one batch of ``Images.batch`` with
torchvision's own operations at the same crops and flips, in normalised units.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms import functional as TF

from benchmarks import arguments, compare, report, row, seconds
from kdlib.data import Images
from kdlib.engine import plan

COUNT = 10_000
BATCHES = (64, 512)
KDLIB_EPOCHS = 10  # one would be over too soon to time
RATIOS = {("kdlib", "pipeline"): 40.0, ("kdlib", "transforms"): None}


class PilData(Dataset):
    """Images held as torchvision's CIFAR10 holds them: an array, and a PIL image per item."""

    def __init__(self, images: Images):
        self.pixels, self.labels = unpadded(images), images.labels.tolist()
        self.transform = augmentation(images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def augmentation(images: Images) -> Compose:
    """The transforms that draw what a view stands for."""
    crop = RandomCrop(images.size, padding=images.pad)
    return Compose([crop, RandomHorizontalFlip(), ToTensor(), Normalize(images.mean, images.std)])


def unpadded(images: Images) -> np.ndarray:
    inner = slice(images.pad, images.pad + images.size)
    return images.pixels[:, inner, inner].cpu().numpy().copy()


def by_torchvision(images: Images, index: Tensor, view: Tensor) -> Tensor:
    """What ``images.batch(index, view)`` must be: torchvision's operations, image by image."""
    pixels, batch = unpadded(images), []
    for i, v in zip(index.tolist(), view.tolist(), strict=True):
        dy, dx = v // images.offsets % images.offsets, v % images.offsets
        image = TF.pad(Image.fromarray(pixels[i]), images.pad)
        image = TF.crop(image, dy, dx, images.size, images.size)
        image = TF.hflip(image) if v >= images.offsets**2 else image
        batch.append(TF.normalize(TF.to_tensor(image), images.mean, images.std))
    return torch.stack(batch).to(images.device)


def noise(count: int, device: torch.device) -> Images:
    """Random pixels as a data set of CIFAR's shape."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    pixels = torch.nn.functional.pad(pixels, (0, 0, 4, 4, 4, 4))
    names = tuple(map(str, range(10)))
    labels = torch.arange(count, device=device) % len(names)
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.289, 0.289, 0.289)}
    return Images(
        "noise", "train", pixels.to(device), labels, names, pad=4, flip=True, **statistics
    )


def contenders(images: Images, batch: int) -> dict:
    """By name a function that makes batches of all images and returns images/s."""
    device = images.device
    loader = DataLoader(PilData(images), batch, shuffle=True)
    ready = [Image.fromarray(pixels) for pixels in unpadded(images)]
    transform = augmentation(images)

    def pipeline():
        for x, labels in loader:
            x.to(device), labels.to(device)

    def transforms():
        for image in ready:
            transform(image)

    def kdlib():
        for epoch in range(KDLIB_EPOCHS):
            order, view = (t.to(device) for t in plan(0, epoch, len(images), images.views))
            for i, v in zip(order.split(batch), view.split(batch), strict=True):
                images.batch(i, v)

    return {
        "pipeline": lambda: len(images) / seconds(pipeline, device),
        "transforms": lambda: len(images) / seconds(transforms, device),
        "kdlib": lambda: KDLIB_EPOCHS * len(images) / seconds(kdlib, device),
    }


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    images, rows = noise(COUNT, options.device), []
    index, view = (t[:512].to(options.device) for t in plan(0, 0, COUNT, images.views))
    off = (images.batch(index, view) - by_torchvision(images, index, view)).abs().max().item()
    for batch in BATCHES:
        rows += compare(f"batch {batch}", contenders(images, batch), RATIOS, options.rounds)
    rows.append(row("any", "largest difference", off))
    report("batches", rows, options)


if __name__ == "__main__":
    main()
