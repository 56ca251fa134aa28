"""The usual PyTorch loop: a PIL pipeline, and distillation with the teacher in every step."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
from torchvision.transforms import functional as TF

from benchmarks import Turn, timed
from kdlib import Run, build_model, store
from kdlib.data import Images
from kdlib.engine.device import keep_large_blocks
from kdlib.engine.plan import mix
from kdlib.engine.precision import label_dtype, training_dtype
from kdlib.models.precision import half_precision

# By default glibc returns a freed block to the system if it is larger than this.
GLIBC_LIMIT = 32 << 20


class PilData(Dataset):
    """Images as in torchvision's CIFAR10: an array, from which each item becomes a PIL image."""

    def __init__(self, images: Images):
        self.pixels, self.labels = unpadded(images), images.labels.tolist()
        self.transform = augmentation(images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(as_pil(self.pixels[index])), self.labels[index]


def augmentation(images: Images) -> Compose:
    """torchvision's random crop and flip, the same distribution as kdlib's views."""
    crop = RandomCrop(images.size, padding=images.pad)
    flip = [RandomHorizontalFlip()] if images.flip else []
    return Compose([crop, *flip, ToTensor(), Normalize(images.mean, images.std)])


def as_pil(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze())


def unpadded(images: Images) -> np.ndarray:
    inner = slice(images.pad, images.pad + images.size)
    return images.pixels[:, inner, inner].cpu().numpy().copy()


def by_torchvision(images: Images, index: Tensor, view: Tensor) -> Tensor:
    """The batch that ``images.batch(index, view)`` must equal, by torchvision, image by image."""
    pixels, batch = unpadded(images), []
    for i, v in zip(index.tolist(), view.tolist(), strict=True):
        dy, dx = v // images.offsets % images.offsets, v % images.offsets
        image = TF.pad(as_pil(pixels[i]), images.pad)
        image = TF.crop(image, dy, dx, images.size, images.size)
        image = TF.hflip(image) if v >= images.offsets**2 else image
        batch.append(TF.normalize(TF.to_tensor(image), images.mean, images.std))
    return torch.stack(batch).to(images.device)


class Style(NamedTuple):
    """Optimisations of a loop.

    Attributes:
        modern: half precision if the device has it, channels_last, no waiting for the device.
        resident: the images are on the device, which crops and flips them.
        compiled: ``torch.compile`` for student and teacher.
    """

    modern: bool = False
    resident: bool = False
    compiled: bool = False


class FieldLoop:
    """Distillation as public code trains it: the teacher computes its logits in every step.

    Args:
        run: student, recipe and teacher.
        warm_up: steps before the time of a turn starts.
        steps: steps of a turn.
    """

    def __init__(self, run: Run, images: Images, warm_up: int, steps: int, style: Style):
        self.device, self.style, self.recipe = images.device, style, run.recipe
        self.temperature, self.images = run.method.temperature, images
        self.student = build_model(
            run.model, images.classes, images.channels, seed=mix("weights", run.seed)
        )
        self.teacher = store.load_checkpoint(*run.method.teacher_at(0))[0].eval()
        layout = torch.channels_last if style.modern else torch.contiguous_format
        for network in (self.student.train(), self.teacher):
            network.to(self.device, memory_format=layout)
        self.networks = [self.student, self.teacher]
        if style.compiled:
            self.networks = [torch.compile(network, dynamic=False) for network in self.networks]
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            self.recipe.lr,
            self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )
        size, teacher = images.size, run.method.teacher_at(0).run.model
        dtype = training_dtype(self.device, run.model, size) if style.modern else torch.float32
        labels = label_dtype(self.device, teacher, size) if style.modern else torch.float32
        self.half = partial(half_precision, self.device, dtype)
        self.teacher_half = partial(half_precision, self.device, labels)
        self.scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        self.loader = None if style.resident else self._pil_loader()
        self.warm_up, self.count = warm_up, steps
        self.meter = torch.zeros(2, device=self.device)

    def _pil_loader(self) -> DataLoader:
        gpu = self.device.type == "cuda"
        return DataLoader(
            PilData(self.images),
            self.recipe.batch,
            shuffle=True,
            drop_last=True,
            num_workers=8 if gpu else 2,
            pin_memory=self.style.modern and gpu,
        )

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch."""
        if self.loader:
            yield from self.loader
            return
        order = torch.randperm(len(self.images), device=self.device)
        view = torch.randint(self.images.views, order.shape, device=self.device)
        for index, v in zip(*(t.split(self.recipe.batch) for t in (order, view)), strict=True):
            if len(index) == self.recipe.batch:
                yield self.images.batch(index, v), self.images.labels[index]

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch; return its loss and accuracy before the update."""
        layout = torch.channels_last if self.style.modern else torch.contiguous_format
        x = x.to(self.device, non_blocking=self.style.modern, memory_format=layout)
        labels = labels.to(self.device, non_blocking=self.style.modern)
        student, teacher = self.networks
        with self.half():
            logits = student(x)
        with self.teacher_half(), torch.no_grad():
            teacher_logits = teacher(x)
        logits, teacher_logits = logits.float(), teacher_logits.float()
        kl = F.kl_div(
            F.log_softmax(logits / self.temperature, dim=1),
            F.softmax(teacher_logits / self.temperature, dim=1),
            reduction="batchmean",
        )
        loss = F.cross_entropy(logits, labels) + self.temperature**2 * kl
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        metrics = torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
        if self.style.modern:
            self.meter += metrics
        else:
            metrics.tolist()  # like ``loss.item()``: the host waits for every step
        return metrics

    def steps(self, count: int) -> None:
        while count:
            for x, labels in islice(self.batches, count):
                self.step(x, labels)
                count -= 1
            if count:
                self.batches = self.epoch()

    def turn(self, kept: int = GLIBC_LIMIT) -> Turn:
        """Time some steps after the warm-up; the start of the workers is not in the time.

        On a CPU, glibc keeps freed blocks of up to ``kept`` bytes.
        """
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # usual in public scripts
        keep_large_blocks(kept)
        self.batches = self.epoch()
        self.steps(self.warm_up)
        images = self.count * self.recipe.batch
        turn = timed(lambda: self.steps(self.count), images, self.device)
        torch.backends.cudnn.benchmark = before
        keep_large_blocks()
        return turn

    def train(self, epochs: int) -> None:
        """Train whole epochs with the learning rates of the recipe."""
        for epoch in range(epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(epoch)
            self.student.train()
            for x, labels in self.epoch():
                self.step(x, labels)
