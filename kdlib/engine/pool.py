"""TrainerPool: students that train in parallel, as many as a device has memory and time for."""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from filelock import Timeout

from kdlib import store
from kdlib.data import load_data
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.capture import out_of_memory
from kdlib.engine.deadline import check_time
from kdlib.engine.device import beside_students
from kdlib.engine.graph import is_complete, refuse_repetition
from kdlib.engine.passes import teacher_passes
from kdlib.engine.progress import Progress
from kdlib.engine.trainer import Trainer
from kdlib.engine.writer import Writer
from kdlib.errors import NotFinite, OutOfTime
from kdlib.runs import Run

# Students in parallel. One keeps a CPU busy; a step of one small network leaves most of a GPU idle.
PARALLEL = {"cpu": 1, "cuda": 16}
# Steps of an epoch after which a teacher computes the logits of the next: not all at once.
LOOK_AHEAD = 50


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


class TrainerPool:
    """Trains runs of one data set. The steps of the trainers take turns.

    Args:
        parallel: the largest number of students that train at a time; it falls if memory runs out.
        everything: all runs that are to be trained, also by other pools; they decide on compiling.
        then: called with each run that is trained.
    """

    def __init__(
        self,
        device: torch.device,
        parallel: int,
        caches: CachePool,
        progress: Progress,
        everything: Sequence[Run] = (),
        then: Callable[[Run], None] = lambda run: None,
    ):
        self.device, self.parallel = device, parallel
        self.caches, self.progress = caches, progress
        self.everything, self.then = everything, then
        self.writer = Writer()
        self.waiting: deque[Run] = deque()
        # Before the first step of an epoch; on a GPU a teacher computes their logits meanwhile.
        self.opening: list[Trainer] = []
        self.active: list[Trainer] = []
        self.free_streams: list[torch.cuda.Stream] = []
        self.locks: dict[str, ExitStack] = {}
        self.failures: dict[str, NotFinite] = {}

    def train(self, runs: list[Run]) -> dict[str, NotFinite]:
        """Train the runs that no other process is training; wait a little if others train all.

        Nothing waits while it holds a lock, so that processes cannot block each other. Out of
        memory, fewer students continue. If a step was lost, the runs continue later from their
        last saved epoch. Returns by id the error of each run whose loss was not finite.

        Raises OutOfTime at the deadline, after it has saved the state of every run.
        """
        self.waiting.extend(runs)
        idle, too_many = True, 0
        try:
            with beside_students(self.device):
                while self._fill():
                    idle = False
                    self._turn()
            check_time()
        except OutOfTime:
            for trainer in (*self.active, *self.opening):
                if trainer.epoch or trainer.taken:
                    trainer.save()
            raise
        except RuntimeError as error:
            too_many = self._students
            if too_many < 2 or not out_of_memory(error):
                raise
        finally:
            self._stop()
        if too_many:  # outside of the except block, whose traceback keeps the trainers alive
            self.caches.clear()
            self._shrink(too_many, too_many // 2)
        if idle:
            time.sleep(0.2)
        return self.failures

    # --- opening ----------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Open a waiting run where there is room; whether any run is in training.

        One at a time, since to open and capture a run takes the host about a second.
        """
        if self._students < self.parallel and (run := self._claim()):
            self._if_memory_lasts(run, self._open, run)
        self._begin_opened()
        return bool(self._students)

    def _begin_opened(self) -> None:
        """Begin an epoch of every student whose logits are there; one at least must run."""
        for trainer in [*self.opening]:
            ready = trainer.data.has_labels() or not self.active
            if ready and self._if_memory_lasts(trainer.run, self._begin, trainer):
                trainer.advance_block()  # at once: the host may be busy for long

    @property
    def _students(self) -> int:
        return len(self.active) + len(self.opening)

    def _if_memory_lasts(self, run: Run, work: Callable, argument: Run | Trainer) -> bool:
        """Do work for a new run; without memory for it the run waits, and the others go on."""
        try:
            work(argument)
            return True
        except RuntimeError as error:
            others = [t for t in (*self.active, *self.opening) if t is not argument]
            if not (others and out_of_memory(error)):
                raise
            self._wait()  # the first steps may still run
        if isinstance(argument, Trainer):  # between two epochs: its state is whole
            argument.save()
            self._leave(argument, self.opening)
        else:
            self._release(run)
        self.waiting.appendleft(run)
        self._shrink(self._students + 1, self._students)
        return False

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
        """Give a run a trainer of its own."""
        if not self._students:
            self.images = load_data(run.dataset, "train", self.device).first(run.images)
            self.test = load_data(run.dataset, "test", self.device)
        runs = [run, *(trainer.run for trainer in (*self.active, *self.opening))]
        self.caches.serve(len(runs), {store.saved_fingerprint(*c) for c in teacher_passes(runs)})
        self.writer.students = len(runs)
        alike = sum(
            -(-len(self.images) // other.recipe.batch) * other.recipe.epochs
            for other in self.everything
            if other.model == run.model
        )
        stream = self.free_streams.pop() if self.free_streams else None
        trainer = Trainer(
            run, self.images, self.test, self.caches, self.writer, alike=alike, stream=stream
        )
        trainer.look_ahead(trainer.epoch)
        self.progress.begin(run, trainer.epoch)
        self.opening.append(trainer)

    def _begin(self, trainer: Trainer) -> None:
        trainer.begin_epoch()
        self.opening.remove(trainer)
        self.active.append(trainer)

    # --- turns ------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Steps of every student that has few before it, and the end of epochs that are done."""
        check_time()
        ready = [t for t in self.active if t.taken < t.steps and t.blocks_in_flight() < 2]
        for trainer in ready:  # all are launched before the host waits for any
            trainer.advance_block()
        for trainer in self.active:
            if trainer.taken >= min(LOOK_AHEAD, trainer.steps // 2) and trainer.look_ahead():
                break  # one in a turn, since it takes the host some time
        done = [t for t in self.active if t.taken == t.steps and not t.blocks_in_flight()]
        for trainer in done:
            self._end_epoch(trainer)
        if not (ready or done):
            time.sleep(1e-4)

    def _end_epoch(self, trainer: Trainer) -> None:
        try:
            row = trainer.end_epoch()
        except NotFinite as error:
            # without its frames, which would keep the trainer alive
            self.failures[trainer.run.id] = error.with_traceback(None)
            self._leave(trainer, self.active)
            return
        images = trainer.steps * trainer.run.recipe.batch
        self.progress.epoch(trainer.run, row, images, trainer.finished)
        if trainer.finished:
            trainer.close()
            self.progress.skip(trainer.run.recipe.epochs - trainer.epoch)
            refuse_repetition(trainer.run)
            self._leave(trainer, self.active)
            self.then(trainer.run)
        else:
            trainer.look_ahead(trainer.epoch)  # where the epoch was too short to do it before
            self.active.remove(trainer)
            self.opening.append(trainer)

    def _leave(self, trainer: Trainer, students: list[Trainer]) -> None:
        """Give back what a student holds. Its lock is the last: then its files are written."""
        students.remove(trainer)
        if trainer.stream:
            self.free_streams.append(trainer.stream)
        trainer.files.wait()
        self._release(trainer.run)

    def _wait(self) -> None:
        """A graph must not write to memory that is in use for something else."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stop(self) -> None:
        """Release all locks, in whatever way the training ended."""
        try:
            with ExitStack() as both:
                both.callback(self.writer.wait)
                self._wait()
        finally:
            self.active.clear()
            self.opening.clear()
            self.waiting.clear()
            self.images = self.test = None  # their memory may be needed for other data
            for lock in self.locks.values():
                lock.close()
            self.locks.clear()
