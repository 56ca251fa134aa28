"""LogitCache: a frozen teacher's logits by image and view, each computed at most once."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from kdlib.data import Images
from kdlib.models.precision import half_precision

# Images that a teacher labels at a time: what fits a CPU's cache, what fills a GPU.
CHUNK = {"cpu": 64, "cuda": 2048}
HOST = torch.device("cpu")
# Where a container's or a batch job's limit of memory stands.
CGROUP = Path("/sys/fs/cgroup/memory.max")


def folded(teacher: nn.Module) -> nn.Module:
    """A teacher in eval mode with its batch norms folded into the convolutions before them.

    Of networks that normalise first, such as wide ResNets and DenseNets, some stay as they are.
    """
    if isinstance(teacher, fx.GraphModule):  # another bank's, folded already
        return teacher
    network = fuse(teacher)
    network.delete_all_unused_submodules()
    return network


class LogitCache:
    """A teacher's logits for (image, view), computed when first asked for.

    The teacher is frozen and in eval mode, so its logits depend on the image and the view alone:
    a bank gives what the teacher would at once, to the bit. Every sweep runs chunks of one shape,
    the last filled up, so that a logit does not depend on when it was computed.

    On a GPU sweeps can run beside training: the host knows itself which labels are there, and waits
    for nothing, but for the last sweep of a table that lies in its own memory.

    Args:
        teacher: in eval mode; folded, moved to the images' device, half precision on a GPU.
        images: those it labels.
    """

    def __init__(self, teacher: nn.Module, images: Images):
        if teacher.training:
            raise ValueError("A teacher that labels must be in eval mode.")
        self.images, self.device = images, images.device
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.chunk = min(CHUNK[self.device.type], len(images))
        self.teacher = folded(teacher).to(self.device, memory_format=torch.channels_last)
        # Where the table lies: beside the teacher, or None, where nothing is remembered.
        self.place: torch.device | None = self.device
        self.shape = (len(images), images.views, images.classes)
        self.known: Tensor | None = None
        # Of a table in the host's memory: rows on their way to it.
        self.arriving: list[tuple[Tensor, Tensor, Tensor, torch.cuda.Event | None]] = []

    def bytes(self, device: torch.device) -> int:
        """What the table takes there when it is full, and the teacher."""
        table = math.prod(self.shape) * self.dtype.itemsize if device == self.place else 0
        network = sum(p.numel() * p.itemsize for p in self.teacher.parameters())
        return table + (network if device == self.device else 0)

    def targets(self, index: Tensor, view: Tensor) -> Tensor:
        """Logits ``[b, classes]`` for int64 ``[b]`` images and views, missing ones swept first.

        ``index`` and ``view`` best come from the host, where they are looked up.
        """
        if self.place is None:
            return self._sweep(self._sent(index), self._sent(view))
        index, view = index.cpu(), view.cpu()
        if self.known is None:
            # Left uninitialised: on a CPU, pages that no label is written to cost no memory.
            self.logits = torch.empty(self.shape, dtype=self.dtype, device=self.place)
            self.known = torch.zeros(self.shape[:2], dtype=torch.bool)
        missing = (~self.known[index, view]).nonzero().squeeze(1)
        rows = self._recall(index, view)
        if len(missing):
            i, v = index[missing], view[missing]
            swept = self._sweep(self._sent(i), self._sent(v))
            self._remember(i, v, swept)
            rows[self._sent(missing)] = swept
        return rows

    def _recall(self, index: Tensor, view: Tensor) -> Tensor:
        """Rows of the table, anything where it has none."""
        for i, v, rows, arrived in self.arriving:
            if arrived:
                arrived.synchronize()
            self.logits[i, v] = rows
        self.arriving.clear()
        if self.place == self.device:
            return self.logits[self._sent(index), self._sent(view)]
        return self._sent(self.logits[index, view])

    def _remember(self, index: Tensor, view: Tensor, rows: Tensor) -> None:
        if self.place == self.device:
            self.logits[self._sent(index), self._sent(view)] = rows
        else:  # written when the table is read again: the host does not wait for this sweep
            rows, arrived = rows.to(self.place, non_blocking=True), None
            if self.device.type == "cuda":
                arrived = torch.cuda.current_stream(self.device).record_event()
            self.arriving.append((index, view, rows, arrived))
        self.known[index, view] = True  # last: memory may have run out before

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the teacher's device; from pinned memory, since the host would wait otherwise."""
        if self.device.type == "cpu" or tensor.device == self.device:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _sweep(self, index: Tensor, view: Tensor) -> Tensor:
        """The teacher's logits in chunks of one shape, the last filled up with repetitions."""
        rows = torch.arange(-(-len(index) // self.chunk) * self.chunk, device=index.device)
        chunks = (rows % len(index)).split(self.chunk)
        return torch.cat([self.live(index[c], view[c]) for c in chunks])[: len(index)]

    @torch.no_grad()  # not inference_mode, whose tensors cannot enter a loss that is differentiated
    def live(self, index: Tensor, view: Tensor) -> Tensor:
        """The same logits from the teacher itself, one batch, nothing remembered."""
        with half_precision(self.device, torch.float16):
            return self.teacher(self.images.batch(index, view)).to(self.dtype)


class CachePool:
    """The banks of a process, by teacher checkpoint and images, within half of the memory.

    A table that does not fit beside its teacher on a GPU lies in the host's memory. A bank without
    room there either asks its teacher every time instead: slower, the same numbers. So does one of
    a ``passing`` teacher, hardly any of whose labels for training are asked for twice; of these
    teachers only the last few are at hand. Banks that no lane in training wants make room first.
    """

    # Banks at hand that remember nothing or are passing: at least, and for each lane those of two
    # epochs' teachers, for training and test images.
    AT_HAND = 16

    def __init__(self):
        self.banks: dict[tuple, LogitCache] = {}
        self.wanted: set[str] = set()
        self.passing: set[str] = set()
        self.at_hand = self.AT_HAND
        self.stream: torch.cuda.Stream | None = None
        self.leaving: list[tuple[LogitCache, torch.cuda.Event]] = []

    def get(self, key: tuple, make: Callable[[], LogitCache]) -> LogitCache:
        """The bank of ``key``, which begins with the teacher's fingerprint; ``make`` it if new."""
        if key not in self.banks:
            self.join()  # the teacher that it shares with another may just be made aside
            bank = make()
            if bank.images.views > 1 and key[0] in self.passing:
                bank.place = None
            elif not self._settle(bank, [bank.device]):
                self._drop([k for k in self.banks if k[0] not in self.wanted])
                self._settle(bank, [bank.device, HOST])
            self._drop(self._dispensable()[: 1 - self.at_hand])
            self.banks[key] = bank
        return self.banks[key]

    def _drop(self, keys: list[tuple]) -> None:
        """Forget banks; their memory is handed on when what runs aside no longer reads it."""
        self.leaving = [(bank, read) for bank, read in self.leaving if not read.query()]
        for key in keys:
            bank = self.banks.pop(key)
            if self.stream:
                self.leaving.append((bank, self.stream.record_event()))

    def _settle(self, bank: LogitCache, places: list[torch.device]) -> bool:
        """Give a bank the first of these places that has room for its table, or none."""
        for bank.place in places:
            if self._fits(bank):
                return True
        bank.place = None
        return False

    def _dispensable(self) -> list[tuple]:
        """Banks that are as soon made again, the oldest first."""
        return [k for k, b in self.banks.items() if b.place is None or k[0] in self.passing]

    def expect(self, passing: set[str]) -> None:
        """Tell which teachers are passing from now on; those that were may remember anew.

        When nothing runs aside.
        """
        self.banks = {k: b for k, b in self.banks.items() if k[0] not in self.passing}
        self.passing = passing

    def serve(self, lanes: int, teachers: set[str]) -> None:
        """Tell how many lanes train from now on, and whose labels they want."""
        self.wanted, self.at_hand = teachers, max(self.AT_HAND, 4 * lanes)

    @contextmanager
    def aside(self, device: torch.device) -> Iterator[torch.cuda.Event]:
        """On a GPU, what is launched inside runs beside the lanes, after all that was launched on
        the current stream. The event tells that it is done."""
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            yield done
            done.record()

    def join(self) -> None:
        """Let what is launched next wait for all that runs aside."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def teacher(self, fingerprint: str, device: torch.device) -> nn.Module | None:
        """The teacher of a bank that is there, so that training and test images share it."""
        for key, bank in self.banks.items():
            if key[0] == fingerprint and bank.device == device:
                return bank.teacher
        return None

    def clear(self) -> None:
        """Forget all banks, when nothing runs aside."""
        self.banks.clear()
        self.leaving.clear()

    def _fits(self, bank: LogitCache) -> bool:
        banks = [*self.banks.values(), bank]
        return sum(b.bytes(bank.place) for b in banks) <= _memory(bank.place) // 2


def _memory(device: torch.device) -> int:
    """Bytes there are for this process; of the host's, a part for each GPU's notebook."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no limit, or none that can be read
        memory = min(memory, int(CGROUP.read_text()))
    return memory // max(1, len(os.environ.get("KDLIB_GPUS", "").split(",")))
