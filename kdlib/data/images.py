"""Images: one split of a data set, resident on the device as uint8, cropped and flipped by view."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Images:
    """One split of a data set on one device.

    A *view* is one outcome of the augmentation "pad by ``pad`` zeros, crop back, perhaps flip":
    ``view = (flip * offsets + dy) * offsets + dx`` with ``offsets = 2 * pad + 1``. Drawing views
    instead of applying random transforms makes an epoch a pure function of its seed, and a frozen
    teacher's answers a finite table.

    Attributes:
        name: label of the data set, as it stands beside every number made from it.
        pixels: uint8 ``[n, size + 2 * pad, size + 2 * pad, channels]``, zero-padded.
        labels: int64 ``[n]``.
        mean, std: per channel, in units of [0, 1] pixel values.
    """

    name: str
    split: str
    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.pixels.shape[3]

    @property
    def size(self) -> int:
        """Height and width of a batch's images."""
        return self.pixels.shape[1] - 2 * self.pad

    @property
    def offsets(self) -> int:
        return 2 * self.pad + 1

    @property
    def views(self) -> int:
        """Number of distinct views of one image."""
        return self.offsets**2 * (2 if self.flip else 1)

    @property
    def centre(self) -> int:
        """The view that is the image itself: no shift, no flip."""
        return self.pad * self.offsets + self.pad

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def first(self, count: int | None) -> "Images":
        """The first ``count`` images taking the classes in turn; all of them for None.

        In turn, since folders list their images class by class.
        """
        if count is None or count >= len(self):
            return self
        turn = F.one_hot(self.labels, self.classes).cumsum(0).gather(1, self.labels[:, None])
        chosen = turn.squeeze(1).argsort(stable=True)[:count].sort().values
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen])

    def batch(self, index: Tensor, view: Tensor | None = None) -> Tensor:
        """Normalised float32 images ``[b, channels, size, size]`` in channels_last layout.

        ``index`` and ``view`` are int64 ``[b]`` on the images' device; without views, the images
        themselves. Equal to zero padding, cropping, flipping and normalising one by one.
        """
        size, channels = self.size, self.channels
        view = torch.full_like(index, self.centre) if view is None else view
        first = index * self.pixels.shape[1] ** 2 + self._corners[view]
        rows = first[:, None] + self._row_starts
        crop = self._runs.index_select(0, rows.flatten()).view(-1, size, size, channels)
        if self.flip:
            crop = _mirror(crop, view >= self.offsets**2)
        scale, shift = self._normalisation
        flat = crop.view(-1, size, size * channels).float()
        torch.addcmul(shift, flat, scale, out=flat)  # in place: memory is the bottleneck here
        return flat.view(crop.shape).permute(0, 3, 1, 2)

    @cached_property
    def _runs(self) -> Tensor:
        """Every run of ``size`` pixels in the storage as a row of one overlapping table.

        A crop is ``size`` of these rows, so that a batch is one gather.
        """
        pixels = self.pixels.numel() // self.channels
        shape = (pixels - self.size + 1, self.size * self.channels)
        return self.pixels.as_strided(shape, (self.channels, 1))

    @cached_property
    def _corners(self) -> Tensor:
        """Where each view's crop begins, in pixels from the image's first."""
        offset = torch.arange(self.views, device=self.device) % self.offsets**2
        return offset // self.offsets * self.pixels.shape[1] + offset % self.offsets

    @cached_property
    def _row_starts(self) -> Tensor:
        """Where a crop's rows begin, in pixels from its first."""
        return torch.arange(self.size, device=self.device) * self.pixels.shape[1]

    @cached_property
    def _normalisation(self) -> Tensor:
        """Scale and shift of ``(pixel / 255 - mean) / std``, repeated along one row of pixels."""
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        pair = torch.stack([1 / (255 * std), -mean / std])
        return pair.float().repeat(1, self.size).to(self.device)


def _mirror(crop: Tensor, flipped: Tensor) -> Tensor:
    """Mirror those images ``[b, size, size, channels]`` that ``flipped`` ``[b]`` marks."""
    if crop.is_cuda:  # finding the marked ones would wait for the device
        return torch.where(flipped[:, None, None, None], crop.flip(2), crop)
    # On a CPU: selecting whole images is a plain copy, five times as fast as `where` or index_copy.
    mirrored = crop.index_select(0, flipped.nonzero().squeeze(1)).flip(2)
    behind = len(crop) - 1 + flipped.cumsum(0)
    source = torch.where(flipped, behind, torch.arange(len(crop)))
    return torch.cat([crop, mirrored]).index_select(0, source)
