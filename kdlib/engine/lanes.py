"""Lanes: students that train side by side, as many as a device has memory and time for."""

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
from kdlib.engine.bank import Shelf
from kdlib.engine.budget import label_sweeps
from kdlib.engine.lane import Lane
from kdlib.engine.missing import incomplete, refuse_to_go_round
from kdlib.engine.progress import Progress
from kdlib.errors import NotFinite
from kdlib.runs import Run


class Width:
    """How many lanes run side by side.

    On a CPU one, since it keeps the CPU busy. A step of one small network leaves most of a GPU
    idle: there the lanes are doubled while that makes all of them together faster and memory
    lasts. Their speed is that of whole epochs, with evaluations and labels.

    Args:
        asked: a number for every device; for None ``$KDLIB_LANES``, or what is said above.

    Attributes:
        now: lanes that may run.

    Raises ValueError for less than one.
    """

    FIRST, MOST = 4, 64
    # Each epoch takes longer beside more lanes: they have to bring at least so much.
    GAIN = 1.15

    def __init__(self, device: torch.device, asked: int | str | None = None):
        asked = os.environ.get("KDLIB_LANES") or None if asked is None else asked
        if asked is not None and not (str(asked).isdecimal() and int(asked)):
            raise ValueError(f"{asked} lanes: it takes a whole number from 1 (KDLIB_LANES).")
        self.device = device
        self.chooses = asked is None and device.type == "cuda"
        self.most = int(asked) if asked else self.MOST if self.chooses else 1
        self.lane_bytes = 1  # of the lane that was opened last
        self.restart()

    def restart(self) -> None:
        """Other runs come: what was fast for those before may not be for them."""
        self.growing = self.chooses
        self.now = self.before = min(self.FIRST, self.most) if self.chooses else self.most
        self.speed = 0.0
        self.measure()

    def measure(self) -> None:
        """Measure from here on: the lanes are not those of before."""
        self.images, self.told, self.since = 0, set(), time.perf_counter()

    def limit(self, lanes: int) -> None:
        """Memory lasts for so many, and that will not change."""
        self.most = lanes
        self.now, self.before = min(self.now, lanes), min(self.before, lanes)

    def epoch_over(self, lane: Lane, lanes: int) -> None:
        """Tell that one of so many lanes ended an epoch; when each has, decide."""
        self.told.add(lane.run.id)
        if not self.growing or lanes < self.now or len(self.told) < lanes:
            return
        speed = self.images / (time.perf_counter() - self.since)
        if speed < self.GAIN * self.speed:
            self.growing = False
            self.now = self.now if speed > self.speed else self.before
        else:
            self.speed, self.before = speed, self.now
            room = _free_memory(self.device) // self.lane_bytes
            self.now = min(2 * self.now, self.now + room, self.most)
            self.growing = self.now > self.before


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, those that torch has in reserve among them."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class Lanes:
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
        banks: Shelf,
        progress: Progress,
        weights: bool,
    ):
        self.waiting, self.device, self.width = deque(runs), device, width
        self.banks, self.progress, self.weights = banks, progress, weights
        self.active: list[Lane] = []
        self.locks: dict[str, ExitStack] = {}
        self.failures: dict[str, NotFinite] = {}

    def train(self) -> dict[str, NotFinite]:
        """Train until none is left; where others train all of them, wait a little.

        Nothing waits while it holds a lock, so that processes cannot block each other. Out of
        memory, fewer lanes go on: in a step that left all of them undone, those that are taken up
        again do so from their last saved epoch. Returns by id why a run stopped whose loss left
        the finite numbers.
        """
        self.width.restart()
        idle, too_many = True, 0
        try:
            while self._fill():
                idle = False
                self._step()
        except torch.OutOfMemoryError:
            too_many = len(self.active)
            if too_many < 2:
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
            except torch.OutOfMemoryError:
                if not self.active:
                    raise
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
        self.banks.serve(len(runs), {store.saved_fingerprint(*a) for a in label_sweeps(runs)})
        before = self._reserved()
        lane = Lane(run, self.images, self.test, self.banks)
        lane.begin_epoch()
        self.width.lane_bytes = max(1, self._reserved() - before)
        self.width.measure()
        self.progress.skip(lane.epoch)
        self.active.append(lane)

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def _step(self) -> None:
        """A step of every lane, and the end of the epochs whose last it was."""
        for lane in self.active:  # all are under way before the host waits for any
            lane.advance()
        for lane in self.active:
            lane.look()
            self.width.images += lane.run.recipe.batch
        for lane in [lane for lane in self.active if lane.taken == lane.steps]:
            self._end_epoch(lane)

    def _end_epoch(self, lane: Lane) -> None:
        try:
            row = lane.end_epoch()
        except NotFinite as error:
            self.failures[lane.run.id] = error
            self._leave(lane)
            return
        self.progress.epoch(lane.run, row, lane.taken * lane.run.recipe.batch, lane.finished)
        self.width.epoch_over(lane, len(self.active))
        if not lane.finished:
            lane.begin_epoch()
            return
        lane.close()
        self.progress.skip(lane.run.recipe.epochs - lane.epoch)
        refuse_to_go_round(lane.run)
        self._leave(lane)

    def _leave(self, lane: Lane) -> None:
        self.active.remove(lane)
        self._release(lane.run)
        self.width.measure()

    def _stop(self) -> None:
        """However it ended, nothing is held any longer."""
        if self.device.type == "cuda":  # a graph must not write to memory that was handed on
            torch.cuda.synchronize(self.device)
        self.active.clear()
        for lock in self.locks.values():
            lock.close()
        self.locks.clear()
