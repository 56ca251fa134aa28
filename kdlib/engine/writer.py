"""Writer: writes files in a thread of its own, so that no student waits for a disk."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

# Saving resume states may take at most this share of the time of training, over all students.
# Where epochs are short, a state is saved every few epochs.
SAVING_SHARE = 0.05
# Pieces of work that may wait, each with its copies on the host.
MOST_PENDING = 64


class Writer:
    """Does pieces of work one after the other, in order, while training goes on.

    Attributes:
        students: the number of students that share the time of saving.
    """

    def __init__(self):
        self.students = 1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdlib-writer")
        self._pending: deque[Future] = deque()

    def write(self, work: Callable[[], None]) -> Future:
        """Do ``work`` soon. Raises the error of earlier work, such as StoreError for a full disk.

        ``work`` must not use the device, and not read what training changes: see ``on_host``. Waits
        where too much is left to do, whose copies fill the memory.
        """
        future = self._thread.submit(work)
        self._pending.append(future)
        while self._pending and (self._pending[0].done() or len(self._pending) > MOST_PENDING):
            self._pending.popleft().result()
        return future

    def wait(self) -> None:
        """Wait until all work is done. Raises the first error of it, after all was tried."""
        pending, self._pending = self._pending, deque()
        errors = [error for work in pending if (error := work.exception())]
        if errors:
            raise errors[0]

    def may_save(self, since: float, cost: float) -> bool:
        """Whether a student may save its state again, ``since`` seconds after the last time.

        Args:
            cost: seconds that it took the last time.
        """
        return since >= self.students * cost / SAVING_SHARE


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
