"""TrainerPool: students that train side by side, as many as a device has memory and time for."""

import math
import os
import time
import warnings
from collections import deque
from contextlib import ExitStack
from dataclasses import replace

import torch
from filelock import Timeout

from kdlib import store
from kdlib.data import load_data
from kdlib.engine.graph import incomplete, refuse_to_go_round
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.passes import teacher_passes
from kdlib.engine.progress import Progress
from kdlib.engine.trainer import Trainer
from kdlib.errors import NotFinite
from kdlib.runs import Run

# What errors say that tell of memory, besides torch.OutOfMemoryError.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
# Free memory that lanes may take: libraries and the driver want some as well.
LENT = 0.9


def asked_parallel(lanes: int | None) -> int | None:
    """How many lanes are asked for, by an argument or by ``$KDLIB_PARALLEL``; None leaves it open.

    Raises ValueError for less than one.
    """
    asked = (os.environ.get("KDLIB_PARALLEL") or None) if lanes is None else lanes
    if asked is not None and not (str(asked).isdecimal() and int(asked)):
        raise ValueError(f"{asked} lanes: it takes a whole number from 1 (KDLIB_PARALLEL).")
    return None if asked is None else int(asked)


class Width:
    """How many lanes run side by side, of runs of one data set.

    On a CPU one, since it keeps the CPU busy. A step of one small network leaves most of a GPU
    idle: there the lanes are doubled while memory lasts and all of them together get faster.

    Args:
        asked: a number for every device; for None what is said above.

    Attributes:
        now: lanes that may run.
    """

    FIRST, MOST = 4, 64
    # Each epoch takes longer beside more lanes: they have to bring at least so much.
    GAIN = 1.15

    def __init__(self, device: torch.device, asked: int | None):
        self.device = device
        self.growing = asked is None and device.type == "cuda"
        self.most = asked or (self.MOST if self.growing else 1)
        self.now = self.before = min(self.FIRST, self.most) if self.growing else self.most
        # Seconds of an epoch by run, at this width and at the one before.
        self.seconds: dict[str, float] = {}
        self.seconds_before: dict[str, float] = {}
        self.lane_bytes = math.inf  # of the smallest
        self.measure()

    def measure(self) -> None:
        """Measure from here on: the lanes are not those of before."""
        self.seconds, self.since = {}, time.perf_counter()

    def opened(self, taken: int) -> None:
        """Tell that a lane was opened, and the bytes it took."""
        if taken > 0:
            self.lane_bytes = min(self.lane_bytes, taken)
        self.measure()

    def limit(self, lanes: int) -> None:
        """Memory lasts for so many, and that will not change."""
        self.now, self.growing = min(self.now, lanes), False

    def epoch_over(self, run: str, started: float, lanes: int) -> None:
        """Tell that one of so many lanes ended an epoch; when each has, decide."""
        if not self.growing or started < self.since:
            return
        self.seconds[run] = time.perf_counter() - started
        if lanes < self.now or len(self.seconds) < lanes:
            return
        gain = self._gain()
        if gain < self.GAIN:
            self.growing, self.now = False, self.now if gain > 1 else self.before
            return
        room = int(LENT * _free_memory(self.device) // self.lane_bytes)
        self.before, self.seconds_before = self.now, self.seconds
        self.now = min(2 * self.now, self.now + room, self.most)
        self.growing = self.now > self.before

    def _gain(self) -> float:
        """Speed of all lanes over what it was before, by those that were there before as well.

        By these, since the others may be of larger or smaller networks.
        """
        if not self.seconds_before:
            return math.inf
        slower = [
            now / self.seconds_before[r]
            for r, now in self.seconds.items()
            if r in self.seconds_before
        ]
        return self.now / self.before / (sum(slower) / len(slower)) if slower else 0.0


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses; what torch only keeps in reserve is given back for it."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in NO_MEMORY)


class TrainerPool:
    """Trains those of some runs, all of one data set, that no other process is training.

    The lanes' steps take turns. Where a run is done, the next one takes its place at once.

    Args:
        weights: train also runs of which only a record is there.
    """

    def __init__(
        self,
        runs: list[Run],
        device: torch.device,
        width: Width,
        banks: CachePool,
        progress: Progress,
        weights: bool,
    ):
        self.waiting, self.device, self.width = deque(runs), device, width
        self.banks, self.progress, self.weights = banks, progress, weights
        self.active: list[Trainer] = []
        self.locks: dict[str, ExitStack] = {}
        self.failures: dict[str, NotFinite] = {}

    def train(self) -> dict[str, NotFinite]:
        """Train until none is left; where others train all of them, wait a little.

        Nothing waits while it holds a lock, so that processes cannot block each other. Out of
        memory, fewer lanes go on: in a step that left all of them undone, those that are taken up
        again do so from their last saved epoch. Returns by id why a run stopped whose loss left
        the finite numbers.
        """
        idle, too_many = True, 0
        try:
            while self._fill():
                idle = False
                self._step()
        except RuntimeError as error:
            too_many = len(self.active)
            if too_many < 2 or not _out_of_memory(error):
                raise
        finally:
            self._stop()
        if too_many:  # out of the except block, whose traceback keeps the lanes alive
            self.banks.clear()
            self._shrink(too_many, too_many // 2)
        if idle:
            time.sleep(0.2)
        return self.failures

    def _fill(self) -> bool:
        """Put waiting runs on free lanes; whether any is in training."""
        while len(self.active) < self.width.now and (run := self._claim()):
            try:
                self._open(run)
                continue
            except RuntimeError as error:
                if not (self.active and _out_of_memory(error)):
                    raise
                self._wait()  # its first steps may still run
            self._release(run)
            self.waiting.appendleft(run)
            self._shrink(len(self.active) + 1, len(self.active))
        return bool(self.active)

    def _shrink(self, lanes: int, fewer: int) -> None:
        warnings.warn(f"Out of memory with {lanes} lanes: {fewer} from now.", stacklevel=2)
        self.width.limit(fewer)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _claim(self) -> Run | None:
        """The next run that is still missing and that nobody else trains; its lock is held."""
        while self.waiting:
            run, lock = self.waiting.popleft(), ExitStack()
            try:
                lock.enter_context(store.lock(run))
            except Timeout:
                continue
            self.locks[run.id] = lock
            if incomplete([run], self.weights):  # it may have been finished before the lock was had
                if store.find_record(run):
                    warnings.warn(
                        f"{run} is trained again: its teacher moved, or weights or logits are "
                        f"asked for that are not there.",
                        stacklevel=2,
                    )
                # A route that is trained again keeps what it kept: others label with it.
                kept = (*run.keep, *store.kept_epochs(run))
                return replace(run, keep=kept, route=run.route or store.kept_logits(run))
            self._release(run)
        return None

    def _release(self, run: Run) -> None:
        self.locks.pop(run.id).close()

    def _open(self, run: Run) -> None:
        """Begin a run, on a lane of its own."""
        if not self.active:
            self.images = load_data(run.data, "train", self.device).first(run.images)
            self.test = load_data(run.data, "test", self.device)
        runs = [run, *(lane.run for lane in self.active)]
        self.banks.serve(len(runs), {store.saved_fingerprint(*a) for a in teacher_passes(runs)})
        free = _free_memory(self.device) if self.width.growing else 0
        lane = Trainer(run, self.images, self.test, self.banks)
        lane.begin_epoch()
        self.width.opened(free - _free_memory(self.device) if self.width.growing else 0)
        self.progress.begin(run, lane.epoch)
        self.active.append(lane)

    def _step(self) -> None:
        """A step of every lane, and the end of the epochs whose last it was."""
        for lane in self.active:  # all are under way before the host waits for any
            lane.advance()
        for lane in self.active:
            lane.look_ahead()
        for lane in self.active:
            lane.look()
        for lane in [lane for lane in self.active if lane.taken == lane.steps]:
            self._end_epoch(lane)

    def _end_epoch(self, lane: Trainer) -> None:
        try:
            row = lane.end_epoch()
        except NotFinite as error:
            # without the frames, which would keep the lane alive
            self.failures[lane.run.id] = error.with_traceback(None)
            self._leave(lane)
            return
        self.progress.epoch(lane.run, row, lane.taken * lane.run.recipe.batch, lane.finished)
        self.width.epoch_over(lane.run.id, lane.started, len(self.active))
        if not lane.finished:
            lane.begin_epoch()
            return
        lane.close()
        self.progress.skip(lane.run.recipe.epochs - lane.epoch)
        refuse_to_go_round(lane.run)
        self._leave(lane)

    def _leave(self, lane: Trainer) -> None:
        self.active.remove(lane)
        self._release(lane.run)
        self.width.measure()

    def _wait(self) -> None:
        """A graph must not write to memory that was handed on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop(self) -> None:
        """However it ended, nothing is held any longer."""
        try:
            self._wait()
        finally:
            self.active.clear()
            for lock in self.locks.values():
                lock.close()
            self.locks.clear()
