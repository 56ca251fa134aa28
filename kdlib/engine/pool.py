"""TrainerPool: students that train in parallel, as many as a device has memory and time for."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from filelock import Timeout

from kdlib import files, store
from kdlib.data import Images, load_data
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.capture import out_of_memory
from kdlib.engine.deadline import check_time
from kdlib.engine.device import beside_students
from kdlib.engine.graph import is_complete, keeping_all, refuse_repetition
from kdlib.engine.passes import teacher_passes
from kdlib.engine.progress import Progress
from kdlib.engine.trainer import Trainer
from kdlib.engine.writer import Writer
from kdlib.errors import NotFinite, OutOfTime
from kdlib.runs import Run

# Steps of an epoch after which a teacher computes the logits of the next: not all at once.
LOOK_AHEAD = 50
# A cache is kept where it saves at least this share of its teacher's passes.
WORTH = 0.1


class TrainerPool:
    """Trains runs, teachers before their students. The steps of the trainers take turns.

    Args:
        parallel: the largest number of students that train at a time; it falls if memory runs out.
        ready: lists the incomplete runs whose teachers are complete. It is asked again whenever a
            place is free, so that no place waits for the slowest teacher.
        everything: all runs that are to be trained; they decide on compiling and on caches.
        failures: gets the error of each run whose loss was not finite, by its id.
        retry: train also runs that failed in an earlier call.
        then: called with each run that is trained.
    """

    def __init__(
        self,
        device: torch.device,
        parallel: int,
        caches: CachePool,
        progress: Progress,
        ready: Callable[[], list[Run]],
        everything: Sequence[Run],
        failures: dict[str, NotFinite],
        retry: bool,
        then: Callable[[Run], None],
    ):
        self.device, self.parallel = device, parallel
        self.caches, self.progress = caches, progress
        self.ready, self.everything, self.then = ready, everything, then
        self.failures, self.retry = failures, retry
        self.short_lived = {c for c, p in teacher_passes(everything).items() if not p.saves(WORTH)}
        caches.expect(set())
        self.writer = Writer()
        self.waiting: deque[Run] = deque()
        self.ended = False  # a run has, since ``ready`` was asked
        # Before the first step of an epoch; on a GPU a teacher computes their logits meanwhile.
        self.opening: list[Trainer] = []
        self.active: list[Trainer] = []
        self.free_streams: list[torch.cuda.Stream] = []
        self.locks: dict[str, ExitStack] = {}

    def train(self) -> bool:
        """Train the runs that no other process is training; whether any run was ready.

        Waits a little if others train all; it holds no lock then, so that processes cannot block
        each other. Out of memory, fewer students continue. If a step was lost, the next call
        continues from the last saved epochs.

        Raises OutOfTime at the deadline, after it has saved the state of every run.
        """
        if not self._ask():
            return False
        check_time()
        idle, too_many = True, 0
        try:
            with beside_students(self.device):
                while self._fill():
                    idle = False
                    self._turn()
        except OutOfTime:
            for trainer in self._students:
                if trainer.epoch or trainer.taken:
                    trainer.save()
            raise
        except RuntimeError as error:
            too_many = len(self._students)
            if too_many < 2 or not out_of_memory(error):
                raise
        finally:
            self._stop()
        if too_many:  # outside of the except block, whose traceback keeps the trainers alive
            self.caches.clear()
            self._shrink(too_many, too_many // 2)
        if idle:
            time.sleep(0.5)
        return True

    # --- opening ----------------------------------------------------------------------------------

    def _ask(self) -> bool:
        """Let all runs wait that are ready now, those of one data set together; whether any is."""
        self.ended, found = False, self.ready()  # runs in training, too: their locks are held
        order = [*dict.fromkeys(map(_data_of, found))]
        self.waiting.extend(sorted(found, key=lambda run: order.index(_data_of(run))))
        return bool(found)

    def _fill(self) -> bool:
        """Open a waiting run where there is room; whether any run is in training.

        One at a time, since to open and capture a run takes the host about a second.
        """
        if len(self._students) < self.parallel:
            if self.ended and not self.waiting:
                self._ask()
            if run := self._claim():
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
    def _students(self) -> list[Trainer]:
        return [*self.active, *self.opening]

    def _if_memory_lasts(self, run: Run, work: Callable, argument: Run | Trainer) -> bool:
        """Do work for a new run; without memory for it the run waits, and the others go on."""
        try:
            work(argument)
            return True
        except RuntimeError as error:
            others = any(trainer is not argument for trainer in self._students)
            if not (others and out_of_memory(error)):
                raise
            self._wait()  # the first steps may still run
        if isinstance(argument, Trainer):  # between two epochs: its state is whole
            argument.save()
            self._leave(argument, self.opening)
        else:
            self._release(run)
        self.waiting.appendleft(run)
        self._shrink(len(self._students) + 1, len(self._students))
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
            if not (self._failed_before(run) or is_complete(run, weights=True)):
                return keeping_all(run)
            self._release(run)
        return None

    def _failed_before(self, run: Run) -> bool:
        path = store.failure_path(run)
        if failed := not self.retry and path.exists():
            self.failures[run.id] = NotFinite(path.read_text())
        return failed

    def _release(self, run: Run) -> None:
        self.locks.pop(run.id).close()

    def _open(self, run: Run) -> None:
        """Give a run a trainer of its own."""
        images, test = self._images(run)
        runs = [run, *(trainer.run for trainer in self._students)]
        taught = {c: store.saved_fingerprint(*c) for c in teacher_passes(runs)}
        short_lived = {known for c, known in taught.items() if c in self.short_lived}
        self.caches.serve(len(runs), {*taught.values()}, short_lived)
        self.writer.students = len(runs)
        alike = sum(
            -(-len(images) // other.recipe.batch) * other.recipe.epochs
            for other in self.everything
            if other.model == run.model
        )
        stream = self.free_streams.pop() if self.free_streams else None
        trainer = Trainer(run, images, test, self.caches, self.writer, alike=alike, stream=stream)
        trainer.look_ahead(trainer.epoch)
        self.progress.begin(run, trainer.epoch)
        self.opening.append(trainer)

    def _images(self, run: Run) -> tuple[Images, Images]:
        """The run's training and test images; students of one data set share them."""
        for trainer in self._students:
            if _data_of(trainer.run) == _data_of(run):
                return trainer.images, trainer.test
        images = load_data(run.dataset, "train", self.device).first(run.images)
        return images, load_data(run.dataset, "test", self.device)

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
            files.write_atomic(store.failure_path(trainer.run), str(error))
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
        self.ended = True
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
            for lock in self.locks.values():
                lock.close()
            self.locks.clear()


def _data_of(run: Run) -> tuple[str, int | None]:
    return run.dataset, run.images
