"""LabelBank: a frozen teacher's logits by image and view, each computed at most once."""

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdlib.data import Images
from kdlib.engine.device import half_precision


class LabelBank:
    """A teacher's logits for (image, view), computed when first asked for.

    The teacher is frozen and in eval mode, so its logits depend on the image and the view alone:
    a bank gives what the live teacher would, to the bit. Every sweep runs chunks of one shape,
    the last filled up, so that a logit does not depend on when it was computed.

    Args:
        teacher: in eval mode; moved to the images' device, half precision on a GPU.
        images: those it labels.
    """

    def __init__(self, teacher: nn.Module, images: Images):
        if teacher.training:
            raise ValueError("A teacher that labels must be in eval mode.")
        self.images = images
        self.dtype = torch.float16 if images.device.type == "cuda" else torch.float32
        self.chunk = min(2048 if images.device.type == "cuda" else 64, len(images))
        self.teacher = teacher.to(images.device, memory_format=torch.channels_last)
        self.remembers = True
        self.shape = (len(images), images.views, images.classes)
        self.known: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What the table takes when it is full, and the teacher."""
        table = math.prod(self.shape) * self.dtype.itemsize if self.remembers else 0
        return table + sum(p.numel() * p.itemsize for p in self.teacher.parameters())

    def targets(self, index: Tensor, view: Tensor) -> Tensor:
        """Logits ``[b, classes]`` for int64 ``[b]`` images and views, missing ones swept first."""
        if not self.remembers:
            return self._sweep(index, view)
        if self.known is None:
            # Left uninitialised: on a CPU, pages that no label is written to cost no memory.
            self.logits = torch.empty(self.shape, dtype=self.dtype, device=index.device)
            self.known = torch.zeros(self.shape[:2], dtype=torch.bool, device=index.device)
        missing = (~self.known[index, view]).nonzero().squeeze(1)
        if len(missing):
            i, v = index[missing], view[missing]
            self.logits[i, v] = self._sweep(i, v)
            self.known[i, v] = True
        return self.logits[index, view]

    def _sweep(self, index: Tensor, view: Tensor) -> Tensor:
        """The teacher's logits in chunks of one shape, the last filled up with repetitions."""
        rows = torch.arange(-(-len(index) // self.chunk) * self.chunk, device=index.device)
        chunks = (rows % len(index)).split(self.chunk)
        return torch.cat([self.live(index[c], view[c]) for c in chunks])[: len(index)]

    @torch.no_grad()  # not inference_mode, whose tensors cannot enter a loss that is differentiated
    def live(self, index: Tensor, view: Tensor) -> Tensor:
        """The same logits from the teacher itself, one batch, nothing remembered."""
        with half_precision(self.images.device, torch.float16):
            return self.teacher(self.images.batch(index, view)).to(self.dtype)


class Shelf:
    """The banks of a process, by teacher checkpoint and images, within half of the memory.

    A bank that would not fit asks its teacher every time instead: slower, the same numbers. So does
    one of a ``passing`` teacher, hardly any of whose labels for training are asked for twice; of
    these teachers only the last few are at hand. Banks that no lane in training wants make room
    first.
    """

    # Banks at hand that remember nothing or are passing: two for each lane that runs side by side.
    AT_HAND = 16

    def __init__(self):
        self.banks: dict[tuple, LabelBank] = {}
        self.wanted: set[str] = set()
        self.passing: set[str] = set()

    def get(self, key: tuple, make: Callable[[], LabelBank]) -> LabelBank:
        """The bank of ``key``, which begins with the teacher's fingerprint; ``make`` it if new."""
        if key not in self.banks:
            bank = make()
            bank.remembers = bank.images.views == 1 or key[0] not in self.passing
            if not self._fits(bank):
                self.banks = {k: b for k, b in self.banks.items() if k[0] in self.wanted}
                bank.remembers = bank.remembers and self._fits(bank)
            for surplus in self._dispensable()[: 1 - self.AT_HAND]:
                del self.banks[surplus]
            self.banks[key] = bank
        return self.banks[key]

    def _dispensable(self) -> list[tuple]:
        """Banks that are as soon made again, the oldest first."""
        return [k for k, b in self.banks.items() if not b.remembers or k[0] in self.passing]

    def expect(self, passing: set[str]) -> None:
        """Tell which teachers are passing from now on; those that were may remember anew."""
        self.banks = {k: b for k, b in self.banks.items() if k[0] not in self.passing}
        self.passing = passing

    def teacher(self, fingerprint: str, device: torch.device) -> nn.Module | None:
        """The teacher of a bank that is there, so that training and test images share it."""
        for key, bank in self.banks.items():
            if key[0] == fingerprint and bank.images.device == device:
                return bank.teacher
        return None

    def clear(self) -> None:
        self.banks.clear()

    def _fits(self, bank: LabelBank) -> bool:
        device = bank.images.device
        beside = [b.bytes for b in self.banks.values() if b.images.device == device]
        return sum(beside) + bank.bytes <= _memory(device) // 2


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
