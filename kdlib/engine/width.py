"""How many students train in parallel."""

import math
import os
import time

import torch

# The part of the free memory that trainers may use: libraries and the driver need memory as well.
USABLE = 0.9


def asked_parallel(parallel: int | None) -> int | None:
    """The number that an argument or ``$KDLIB_PARALLEL`` asks for; None where neither does.

    Raises ValueError for less than one.
    """
    asked = (os.environ.get("KDLIB_PARALLEL") or None) if parallel is None else parallel
    if asked is not None and not (str(asked).isdecimal() and int(asked)):
        raise ValueError(
            f"{asked} students in parallel: give a whole number of at least 1 "
            f"(argument parallel, or KDLIB_PARALLEL)."
        )
    return None if asked is None else int(asked)


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU; the memory that torch only holds in reserve is released first."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


class Width:
    """The number of students that train in parallel, for runs of one data set.

    On a CPU one, since it keeps the CPU busy. One small network leaves most of a GPU idle: there
    the number is doubled while memory lasts and all students together become faster.

    Args:
        asked: a number for every device; None chooses as above.

    Attributes:
        now: the number at present.
    """

    FIRST, MOST = 4, 64
    # An epoch takes longer beside more students. A doubling must raise the total speed this much.
    GAIN = 1.15

    def __init__(self, device: torch.device, asked: int | None):
        self.device = device
        self.growing = asked is None and device.type == "cuda"
        self.most = asked or (self.MOST if self.growing else 1)
        self.now = self.before = min(self.FIRST, self.most) if self.growing else self.most
        # Seconds of an epoch by run, at this width and at the one before.
        self.seconds: dict[str, float] = {}
        self.seconds_before: dict[str, float] = {}
        self.trainer_bytes = math.inf  # of the smallest trainer
        self.restart()

    def restart(self) -> None:
        """Begin to measure again, because other students train now."""
        self.seconds, self.since = {}, time.perf_counter()

    def opened(self, taken: int) -> None:
        """Note that a trainer was opened, and the bytes that it uses."""
        if taken > 0:
            self.trainer_bytes = min(self.trainer_bytes, taken)
        self.restart()

    def limit(self, parallel: int) -> None:
        """Memory is enough for this number and no more, from now on."""
        self.now, self.growing = min(self.now, parallel), False

    def epoch_over(self, run: str, started: float, parallel: int) -> None:
        """Note the end of one epoch beside this many students; decide when each has had one."""
        if not self.growing or started < self.since:
            return
        self.seconds[run] = time.perf_counter() - started
        if parallel < self.now or len(self.seconds) < parallel:
            return
        gain = self._gain()
        if gain < self.GAIN:
            self.growing, self.now = False, self.now if gain > 1 else self.before
            return
        room = int(USABLE * free_memory(self.device) // self.trainer_bytes)
        self.before, self.seconds_before = self.now, self.seconds
        self.now = min(2 * self.now, self.now + room, self.most)
        self.growing = self.now > self.before

    def _gain(self) -> float:
        """The total speed now over the total speed before.

        Measured by the students that were there before as well: the others may have larger or
        smaller networks.
        """
        if not self.seconds_before:
            return math.inf
        slower = [
            now / self.seconds_before[run]
            for run, now in self.seconds.items()
            if run in self.seconds_before
        ]
        return self.now / self.before / (sum(slower) / len(slower)) if slower else 0.0
