"""TrainerPool: students that train in parallel, as many as a device has memory and time for."""

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
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.graph import is_complete, refuse_repetition
from kdlib.engine.passes import teacher_passes
from kdlib.engine.progress import Progress
from kdlib.engine.trainer import Trainer
from kdlib.errors import NotFinite
from kdlib.runs import Run

# Students in parallel. One keeps a CPU busy; a step of one small network leaves most of a GPU idle.
PARALLEL = {"cpu": 1, "cuda": 16}
# Words in errors that report a lack of memory, besides torch.OutOfMemoryError.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")


def asked_parallel(parallel: int | None, device: torch.device) -> int:
    """Students in parallel: by the argument, else by ``$KDLIB_PARALLEL``, else by the device.

    Raises ValueError for less than one.
    """
    asked = parallel if parallel is not None else os.environ.get("KDLIB_PARALLEL")
    if asked in (None, ""):
        return PARALLEL[device.type]
    if not (str(asked).isdecimal() and int(asked)):
        raise ValueError(
            f"{asked} students in parallel: give a whole number of at least 1 "
            f"(argument parallel, or KDLIB_PARALLEL)."
        )
    return int(asked)


def _out_of_memory(error: RuntimeError) -> bool:
    named = isinstance(error, torch.OutOfMemoryError)
    return named or any(words in str(error) for words in NO_MEMORY)


class TrainerPool:
    """Trains runs of one data set. The steps of the trainers take turns.

    Args:
        parallel: the largest number of students that train at a time; it falls if memory runs out.
    """

    def __init__(self, device: torch.device, parallel: int, caches: CachePool, progress: Progress):
        self.device, self.parallel = device, parallel
        self.caches, self.progress = caches, progress
        self.waiting: deque[Run] = deque()
        self.active: list[Trainer] = []
        self.locks: dict[str, ExitStack] = {}
        self.failures: dict[str, NotFinite] = {}

    def train(self, runs: list[Run]) -> dict[str, NotFinite]:
        """Train the runs that no other process is training; wait a little if others train all.

        Nothing waits while it holds a lock, so that processes cannot block each other. Out of
        memory, fewer students continue. If a step was lost, the runs continue later from their
        last saved epoch. Returns by id the error of each run whose loss was not finite.
        """
        self.waiting.extend(runs)
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
        if too_many:  # outside of the except block, whose traceback keeps the trainers alive
            self.caches.clear()
            self._shrink(too_many, too_many // 2)
        if idle:
            time.sleep(0.2)
        return self.failures

    def _fill(self) -> bool:
        """Begin waiting runs while there is room; whether any run is in training."""
        while len(self.active) < self.parallel and (run := self._claim()):
            try:
                self._open(run)
                continue
            except RuntimeError as error:
                if not (self.active and _out_of_memory(error)):
                    raise
                self._wait()  # the first steps may still run
            self._release(run)
            self.waiting.appendleft(run)
            self._shrink(len(self.active) + 1, len(self.active))
        return bool(self.active)

    def _shrink(self, students: int, fewer: int) -> None:
        warnings.warn(
            f"Out of memory with {students} students in parallel: {fewer} from now on.",
            stacklevel=2,
        )
        self.parallel = fewer
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _claim(self) -> Run | None:
        """The next run that is incomplete and that no other process trains; its lock is held."""
        while self.waiting:
            run, lock = self.waiting.popleft(), ExitStack()
            try:
                lock.enter_context(store.lock(run))
            except Timeout:
                continue
            self.locks[run.id] = lock
            # another process may have finished it before the lock was free
            if not is_complete(run, weights=True):
                return self._keeping_all(run)
            self._release(run)
        return None

    def _keeping_all(self, run: Run) -> Run:
        """The run, asked to keep also what its record in the store keeps, since others use it."""
        if not (found := store.find_record(run)):
            return run
        warnings.warn(
            f"{run} is trained again: the weights of its teacher changed, or weights or logits "
            f"are needed that are not in the store.",
            stacklevel=2,
        )
        if not found.in_store:
            return run
        keep = (*run.keep, *map(int, found.summary["weights"]))
        return replace(run, keep=keep, save_logits=run.save_logits or "logits" in found.summary)

    def _release(self, run: Run) -> None:
        self.locks.pop(run.id).close()

    def _open(self, run: Run) -> None:
        """Begin a run with a trainer of its own."""
        if not self.active:
            self.images = load_data(run.dataset, "train", self.device).first(run.images)
            self.test = load_data(run.dataset, "test", self.device)
        runs = [run, *(trainer.run for trainer in self.active)]
        self.caches.serve(len(runs), {store.saved_fingerprint(*c) for c in teacher_passes(runs)})
        trainer = Trainer(run, self.images, self.test, self.caches)
        trainer.begin_epoch()
        self.progress.begin(run, trainer.epoch)
        self.active.append(trainer)

    def _step(self) -> None:
        """One step of every trainer, and the end of the epochs whose last step it was."""
        for trainer in self.active:  # all are launched before the host waits for any
            trainer.advance()
        for trainer in self.active:
            trainer.look_ahead()
        for trainer in self.active:
            trainer.check_stop()
        for trainer in [t for t in self.active if t.taken == t.steps]:
            self._end_epoch(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        try:
            row = trainer.end_epoch()
        except NotFinite as error:
            # without its frames, which would keep the trainer alive
            self.failures[trainer.run.id] = error.with_traceback(None)
            self._close(trainer)
            return
        images = trainer.taken * trainer.run.recipe.batch
        self.progress.epoch(trainer.run, row, images, trainer.finished)
        if not trainer.finished:
            trainer.begin_epoch()
            return
        trainer.close()
        self.progress.skip(trainer.run.recipe.epochs - trainer.epoch)
        refuse_repetition(trainer.run)
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        self.active.remove(trainer)
        self._release(trainer.run)

    def _wait(self) -> None:
        """A graph must not write to memory that is in use for something else."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop(self) -> None:
        """Release all locks, in whatever way the training ended."""
        try:
            self._wait()
        finally:
            self.active.clear()
            self.waiting.clear()
            self.images = self.test = None  # their memory may be needed for other data
            for lock in self.locks.values():
                lock.close()
            self.locks.clear()
