"""Give each process on a machine its own GPU."""

import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def gpu_slot(folder: Path | None = None) -> Iterator[str | None]:
    """Reserve one of the GPUs in ``$KDLIB_GPUS``, such as ``0,1``, and hide all others.

    Waits until a GPU is free and sets ``CUDA_VISIBLE_DEVICES``. The system releases the
    reservation when the process ends. Without ``$KDLIB_GPUS`` nothing changes: on a cluster the
    scheduler sets ``CUDA_VISIBLE_DEVICES``.

    Args:
        folder: of the lock files; None for one folder per user of the machine.
    """
    names = [name for name in os.environ.get("KDLIB_GPUS", "").split(",") if name]
    if not names:
        yield None
        return
    folder = folder or Path(tempfile.gettempdir()) / f"kdlib-gpus-{getpass.getuser()}"
    folder.mkdir(parents=True, exist_ok=True)
    locks = {name: FileLock(folder / f"{name.replace('/', '-')}.lock") for name in names}
    while (held := _first_free(locks)) is None:
        time.sleep(0.2)
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = held
    try:
        yield held
    finally:
        locks[held].release()
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _first_free(locks: dict[str, FileLock]) -> str | None:
    for name, lock in locks.items():
        try:
            lock.acquire(blocking=False)
            return name
        except Timeout:
            continue
    return None
