"""The field's usual code, which kdlib is measured beside: PIL pipeline and distillation loop."""

from itertools import islice

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
from kdlib.engine.plan import mix


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


class FieldLoop:
    """Distillation as the field's code bases train it: float32, contiguous, a live teacher."""

    def __init__(self, run: Run, images: Images, warm_up: int):
        self.device, self.temperature = images.device, run.method.temperature
        self.student = build_model(run.model, images.classes, seed=mix("weights", run.seed))
        self.student.to(self.device).train()
        self.teacher = store.load_checkpoint(*run.method.labeller(0))[0].to(self.device).eval()
        recipe = run.recipe
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        workers = 8 if self.device.type == "cuda" else 2
        self.loader = DataLoader(PilData(images), recipe.batch, shuffle=True, num_workers=workers)
        self.warm_up, self.count = warm_up, len(images) // recipe.batch - warm_up

    def step(self, x: Tensor, labels: Tensor) -> float:
        x, labels = x.to(self.device), labels.to(self.device)
        logits = self.student(x)
        with torch.no_grad():
            taught = self.teacher(x)
        student = F.log_softmax(logits / self.temperature, dim=1)
        teacher = F.softmax(taught / self.temperature, dim=1)
        kl = F.kl_div(student, teacher, reduction="batchmean")
        loss = F.cross_entropy(logits, labels) + self.temperature**2 * kl
        value, self.top1 = loss.item(), (logits.argmax(1) == labels).float().mean().item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def steps(self, batches) -> None:
        for x, labels in batches:
            self.step(x, labels)

    def turn(self) -> Turn:
        """An epoch, timed after its first steps; the workers' start is not in the time."""
        torch.backends.cudnn.benchmark = True  # as the field's scripts do
        batches = iter(self.loader)
        self.steps(islice(batches, self.warm_up))
        images = self.count * self.loader.batch_size
        turn = timed(lambda: self.steps(islice(batches, self.count)), images, self.device)
        torch.backends.cudnn.benchmark = False
        return turn
