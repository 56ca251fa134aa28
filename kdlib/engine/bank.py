"""LabelBank: a frozen teacher's logits by image and view, each computed at most once."""

import os
from collections import OrderedDict

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
        # Rows that were never computed are never touched: they cost addresses, not memory.
        shape = (len(images), images.views, images.classes)
        self.logits = torch.empty(shape, dtype=self.dtype, device=images.device)
        self.known = torch.zeros(shape[:2], dtype=torch.bool, device=images.device)

    @property
    def bytes(self) -> int:
        return self.logits.nbytes

    def targets(self, index: Tensor, view: Tensor) -> Tensor:
        """Logits ``[b, classes]`` for int64 ``[b]`` images and views, missing ones swept first."""
        missing = (~self.known[index, view]).nonzero().squeeze(1)
        for rows in missing.split(self.chunk) if len(missing) else ():
            filled = rows.repeat(-(-self.chunk // len(rows)))[: self.chunk]
            i, v = index[filled], view[filled]
            self.logits[i, v] = self.live(i, v)
            self.known[i, v] = True
        return self.logits[index, view]

    @torch.no_grad()  # not inference_mode, whose tensors cannot enter a loss that is differentiated
    def live(self, index: Tensor, view: Tensor) -> Tensor:
        """The same logits from the teacher itself, one batch, nothing remembered."""
        with half_precision(self.images.device, torch.float16):
            return self.teacher(self.images.batch(index, view)).to(self.dtype)


class Shelf:
    """The banks of a process, by teacher checkpoint and images; the longest unused goes first."""

    def __init__(self):
        self.banks: OrderedDict[tuple, LabelBank] = OrderedDict()

    def get(self, key: tuple, make) -> LabelBank:
        if key not in self.banks:
            self.banks[key] = make()
            device = self.banks[key].images.device
            while len(self.banks) > 1 and self._bytes(device) > _budget(device):
                self.banks.popitem(last=False)
        self.banks.move_to_end(key)
        return self.banks[key]

    def clear(self) -> None:
        self.banks.clear()

    def _bytes(self, device: torch.device) -> int:
        return sum(bank.bytes for bank in self.banks.values() if bank.images.device == device)


def _budget(device: torch.device) -> int:
    """Bytes that banks may take: a third of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 3
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
