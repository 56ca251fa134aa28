"""LogitCache: a frozen teacher's logits by image and view, each computed at most once."""

import math

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from kdlib.data import Images
from kdlib.engine.deadline import check_time
from kdlib.models.precision import half_precision

# Images in one chunk of a teacher pass: as many as fit a CPU's cache, or fill a GPU.
CHUNK = {"cpu": 64, "cuda": 2048}


def folded(teacher: nn.Module) -> nn.Module:
    """A teacher in eval mode, each batch norm merged into the convolution before it.

    Some batch norms stay as they are in networks that normalise before they convolve, such as wide
    ResNets and DenseNets.
    """
    if isinstance(teacher, fx.GraphModule):  # folded for another cache already
        return teacher
    network = fuse(teacher)
    network.delete_all_unused_submodules()
    return network


class LogitCache:
    """A teacher's logits for (image, view), computed when they are first asked for.

    The teacher is frozen and in eval mode, so its logits depend only on the image and the view. A
    cached logit equals a newly computed one in every bit. Every pass computes chunks of one shape,
    and fills up the last chunk with repeated images. So a logit does not depend on when it was
    computed.

    On a GPU, passes can run beside training, because the host knows which logits are there. If the
    table is on the GPU, the host waits for nothing. If the table is in the host's memory, each
    look-up waits for the pass before it.

    Args:
        teacher: in eval mode; it is folded and moved to the images' device.
        images: the images of the logits.
        dtype: the precision in which the teacher computes, and in which the table is kept.

    Attributes:
        place: the device of the table; None where no logit is kept.
        made: on a GPU, the event after which the teacher's weights are there.
    """

    def __init__(self, teacher: nn.Module, images: Images, dtype: torch.dtype = torch.float32):
        if teacher.training:
            raise ValueError("The teacher of a LogitCache must be in eval mode.")
        self.images, self.device, self.dtype = images, images.device, dtype
        self.chunk = min(CHUNK[self.device.type], len(images))
        self.teacher = folded(teacher).to(self.device, memory_format=torch.channels_last)
        self.place: torch.device | None = self.device
        gpu = self.device.type == "cuda"
        self.made = torch.cuda.current_stream(self.device).record_event() if gpu else None
        self.shape = (len(images), images.views, images.classes)
        self.known: Tensor | None = None
        # Rows that are still being copied to a table in the host's memory.
        self._copying: list[tuple[Tensor, Tensor, Tensor, torch.cuda.Event | None]] = []

    def bytes(self, device: torch.device) -> int:
        """Memory on ``device`` of the full table and of the teacher."""
        table = math.prod(self.shape) * self.dtype.itemsize if device == self.place else 0
        network = sum(p.numel() * p.itemsize for p in self.teacher.parameters())
        return table + (network if device == self.device else 0)

    def logits(self, index: Tensor, view: Tensor) -> Tensor:
        """Logits ``[b, classes]`` for int64 ``[b]`` images and views; missing ones are computed.

        ``index`` and ``view`` should be on the host, where the cache looks them up.
        """
        if self.place is None:
            return self._pass(self._sent(index), self._sent(view))
        index, view = index.cpu(), view.cpu()
        if self.known is None:
            # Not initialised: on a CPU, a page takes no memory until a logit is written to it.
            self.table = torch.empty(self.shape, dtype=self.dtype, device=self.place)
            self.known = torch.zeros(self.shape[:2], dtype=torch.bool)
        missing = (~self.known[index, view]).nonzero().squeeze(1)
        rows = self._read(index, view)
        if len(missing):
            i, v = index[missing], view[missing]
            computed = self._pass(self._sent(i), self._sent(v))
            self._write(i, v, computed)
            rows[self._sent(missing)] = computed
        return rows

    def _read(self, index: Tensor, view: Tensor) -> Tensor:
        """Rows of the table. A row that is not computed yet has arbitrary content."""
        for i, v, rows, copied in self._copying:
            if copied:
                copied.synchronize()
            self.table[i, v] = rows
        self._copying.clear()
        if self.place == self.device:
            return self.table[self._sent(index), self._sent(view)]
        return self._sent(self.table[index, view])

    def _write(self, index: Tensor, view: Tensor, rows: Tensor) -> None:
        if self.place == self.device:
            self.table[self._sent(index), self._sent(view)] = rows
        else:  # written at the next read: the host does not wait for this pass
            rows, copied = rows.to(self.place, non_blocking=True), None
            if self.device.type == "cuda":
                copied = torch.cuda.current_stream(self.device).record_event()
            self._copying.append((index, view, rows, copied))
        self.known[index, view] = True  # last, since memory may have run out above

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor on the teacher's device, by pinned memory, so that the host does not wait."""
        if self.device.type == "cpu" or tensor.device == self.device:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _pass(self, index: Tensor, view: Tensor) -> Tensor:
        """The teacher's logits in chunks of one shape, the last filled up with repetitions."""
        if self.made:  # on another stream perhaps
            torch.cuda.current_stream(self.device).wait_event(self.made)
        rows = torch.arange(-(-len(index) // self.chunk) * self.chunk, device=index.device)
        parts = []
        for chunk in (rows % len(index)).split(self.chunk):
            check_time()
            parts.append(self.compute(index[chunk], view[chunk]))
        return torch.cat(parts)[: len(index)]

    @torch.no_grad()  # not inference_mode, whose tensors cannot enter a differentiated loss
    def compute(self, index: Tensor, view: Tensor) -> Tensor:
        """The same logits directly from the teacher, in one batch; none is kept."""
        with half_precision(self.device, self.dtype):
            return self.teacher(self.images.batch(index, view)).to(self.dtype)
