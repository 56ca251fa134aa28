"""CachePool: the logit caches of a process, within half of the memory."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from kdlib.engine.logit_cache import LogitCache

HOST = torch.device("cpu")
# The memory limit of a container or a batch job.
CGROUP = Path("/sys/fs/cgroup/memory.max")


class CachePool:
    """Logit caches by teacher checkpoint and images.

    A table that does not fit on a GPU beside its teacher lies in the host's memory. Where the host
    has no room either, the cache keeps nothing and computes every logit again: slower, the same
    numbers. A cache of a *short-lived* teacher, hardly any of whose training logits are used twice,
    keeps nothing either; only the last few of these teachers stay loaded. Caches that no student in
    training needs are removed first.
    """

    # Caches that may stay loaded although they keep nothing: at least this number, and 4 for each
    # student, that is 2 epochs times training and test images.
    LOADED = 16

    def __init__(self):
        self.caches: dict[tuple, LogitCache] = {}
        self.wanted: set[str] = set()
        self.short_lived: set[str] = set()
        self.loaded = self.LOADED
        # The CUDA stream on which teachers run beside the students.
        self.stream: torch.cuda.Stream | None = None
        self._leaving: list[tuple[LogitCache, torch.cuda.Event]] = []

    def get(self, key: tuple, make: Callable[[], LogitCache]) -> LogitCache:
        """The cache of ``key``, which begins with the teacher's fingerprint; made if it is new."""
        if key not in self.caches:
            cache = make()
            if cache.images.views > 1 and key[0] in self.short_lived:
                cache.place = None
            elif not self._settle(cache, [cache.device]):
                self._drop([k for k in self.caches if k[0] not in self.wanted])
                self._settle(cache, [cache.device, HOST])
            self._drop(self._dispensable()[: 1 - self.loaded])
            self.caches[key] = cache
        return self.caches[key]

    def _drop(self, keys: list[tuple]) -> None:
        """Remove caches. Their memory is free once the stream no longer reads it."""
        self._leaving = [(cache, read) for cache, read in self._leaving if not read.query()]
        for key in keys:
            cache = self.caches.pop(key)
            if self.stream:
                self._leaving.append((cache, self.stream.record_event()))

    def _settle(self, cache: LogitCache, places: list[torch.device]) -> bool:
        """Give a cache the first of these places that has room for its table, or none."""
        for cache.place in places:
            if self._fits(cache):
                return True
        cache.place = None
        return False

    def _dispensable(self) -> list[tuple]:
        """Caches that cost little to make again, the oldest first."""
        return [k for k, c in self.caches.items() if c.place is None or k[0] in self.short_lived]

    def expect(self, short_lived: set[str]) -> None:
        """Set the short-lived teachers, by fingerprint, while nothing runs on ``stream``."""
        self.caches = {k: c for k, c in self.caches.items() if k[0] not in self.short_lived}
        self.short_lived = short_lived

    def serve(self, students: int, teachers: set[str], short_lived: Iterable[str] = ()) -> None:
        """Set the number of students in training, and the teachers whose logits they need.

        ``short_lived`` are more short-lived teachers.
        """
        self.wanted, self.loaded = teachers, max(self.LOADED, 4 * students)
        self.short_lived.update(short_lived)

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[torch.cuda.Event]:
        """On a GPU: work that is launched inside runs beside the students, after all work that was
        launched on the current stream. The event marks its end."""
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        done = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            yield done
            done.record()

    def join(self) -> None:
        """Let the next work on the current stream wait for all work that runs beside it."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def teacher(self, fingerprint: str, device: torch.device) -> nn.Module | None:
        """The loaded teacher of another cache, which training and test images can share."""
        for key, cache in self.caches.items():
            if key[0] == fingerprint and cache.device == device:
                if cache.made:  # on another stream perhaps; the next work here waits for it
                    torch.cuda.current_stream(device).wait_event(cache.made)
                return cache.teacher
        return None

    def clear(self) -> None:
        """Remove all caches. Call it while nothing runs on the stream."""
        self.caches.clear()
        self._leaving.clear()

    def _fits(self, cache: LogitCache) -> bool:
        caches = [*self.caches.values(), cache]
        return sum(c.bytes(cache.place) for c in caches) <= _memory(cache.place) // 2


def _memory(device: torch.device) -> int:
    """Bytes for this process: all of a GPU; of the host an equal share for each of KDLIB_GPUS."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no limit, or one that cannot be read
        memory = min(memory, int(CGROUP.read_text()))
    return memory // max(1, len(os.environ.get("KDLIB_GPUS", "").split(",")))
