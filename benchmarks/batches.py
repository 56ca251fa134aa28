"""Speed of augmented batches: ``Images.batch`` and torchvision's pipeline on one CPU core.

- pipeline: for each image a PIL image from the array, RandomCrop(32, padding=4),
  RandomHorizontalFlip, ToTensor and Normalize; a DataLoader without workers makes the batches.
- transforms: the same transforms alone, on PIL images that are already in memory.
- kdlib: the plan of an epoch and one gather per batch.

The images have random pixels, and CIFAR's size and channels. The work does not depend on the
pixels. With ``--device cuda`` the pipeline includes the copy to the GPU, and kdlib's gather runs on
the GPU, started by one core. "largest difference" compares one batch of ``Images.batch`` with
torchvision's operations for the same crops and flips, in normalised units.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import arguments, compare, row, selected, timed
from benchmarks.field import PilData, augmentation, by_torchvision, unpadded
from benchmarks.tables import report
from kdlib.data import Images
from kdlib.engine.plan import plan

COUNT = 10_000
CLASSES = 100
BATCHES = (64, 512)
KDLIB_EPOCHS = 20  # one epoch is too short to time
RATIOS = {("kdlib", "pipeline"): 40.0, ("kdlib", "transforms"): None}


def noise(count: int, device: torch.device, split: str = "train") -> Images:
    """Random pixels with the shape and the number of classes of CIFAR-100; classes take turns."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Images(
        name="noise",
        split=split,
        pixels=F.pad(pixels, (0, 0, 4, 4, 4, 4)).to(device),
        labels=torch.arange(count, device=device) % CLASSES,
        class_names=tuple(f"{k:02d}" for k in range(CLASSES)),
        mean=(0.5, 0.5, 0.5),
        std=(0.289, 0.289, 0.289),
        pad=4,
        flip=True,
    )


def contenders(images: Images, batch: int) -> dict:
    """By name, a function that makes batches of all images."""
    device, count = images.device, len(images)
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
            order, view = (t.to(device) for t in plan(0, epoch, count, images.views))
            for i, v in zip(order.split(batch), view.split(batch), strict=True):
                images.batch(i, v)

    return {
        "pipeline": lambda: timed(pipeline, count, device),
        "transforms": lambda: timed(transforms, count, device),
        "kdlib": lambda: timed(kdlib, KDLIB_EPOCHS * count, device),
    }


def run_batch(case: str, batch: int, options: argparse.Namespace) -> Iterator[dict]:
    images = noise(COUNT, options.device)
    index, view = (t[:batch].to(options.device) for t in plan(0, 0, COUNT, images.views))
    off = (images.batch(index, view) - by_torchvision(images, index, view)).abs().max().item()
    yield row(case, "largest difference", off)
    yield from compare(case, contenders(images, batch), RATIOS, options)


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    cases = selected({f"batch {batch}": batch for batch in BATCHES}, options)
    report("batches", (r for case in cases for r in run_batch(*case, options)), options)


if __name__ == "__main__":
    main()
