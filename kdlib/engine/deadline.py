"""Deadline: when training has to stop."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kdlib.errors import OutOfTime


class Deadline:
    """The end of the time for training, ``seconds`` from now."""

    def __init__(self, seconds: float = math.inf):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - time.monotonic()

    def stop_now(self) -> None:
        """Move the end to this moment. A signal handler may call it."""
        self.end = min(self.end, time.monotonic())


_deadline = Deadline()


@contextmanager
def until(deadline: Deadline | None) -> Iterator[None]:
    """Let everything inside stop at ``deadline``."""
    global _deadline
    before, _deadline = _deadline, deadline or Deadline()
    try:
        yield
    finally:
        _deadline = before


def check_time() -> None:
    """Raise OutOfTime after the deadline. Called only where the state of a training is whole."""
    if _deadline.left <= 0:
        raise OutOfTime("The time for training is over. The same call continues it.")
