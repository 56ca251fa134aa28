"""EpochData: the input of an epoch's steps, at fixed addresses."""

import torch
from torch import Tensor

from kdlib.data import Images
from kdlib.engine.plan import epoch_batches, mix
from kdlib.engine.teachers import Teachers
from kdlib.runs import Run


class EpochData:
    """The images, views, teacher's logits and method's inputs of one epoch, step by step.

    All of it is computed before the epoch begins. A step reads its part at ``cursor``, so that a
    captured step can be replayed.

    Args:
        run: the run in training.
        images: the images that it learns from.
        teachers: its teachers.

    Attributes:
        cursor: the number of the step within the epoch.
    """

    def __init__(self, run: Run, images: Images, teachers: Teachers):
        self.run, self.images, self.teachers = run, images, teachers
        self.device = images.device
        shape = (-(-len(images) // run.recipe.batch), run.recipe.batch)
        self.index = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.view = torch.zeros_like(self.index)
        self.needs_logits = run.method.needs_logits and run.method.teacher_at(0) is not None
        self.teacher_logits = torch.zeros((*shape, images.classes), device=self.device)
        self.inputs = {name: t.to(self.device) for name, t in self._inputs(0).items()}
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        # The logits of the next epoch, and the event that marks that they are computed.
        self.next_logits: tuple[Tensor, torch.cuda.Event] | None = None

    def begin(self, epoch: int) -> int:
        """Load an epoch, counted from 0, and return its number of steps."""
        index, view = self._plan(epoch)
        steps = len(index)
        self.index[:steps].copy_(index)
        self.view[:steps].copy_(view)
        if self.needs_logits:
            # Copied, not indexed in the step: a graph would keep the address of one cache for good.
            self.teacher_logits[:steps].copy_(self._due_logits(epoch))
        for name, values in self._inputs(epoch).items():
            self.inputs[name].copy_(values)
        self.cursor.zero_()
        return steps

    def look_ahead(self, epoch: int) -> bool:
        """On a GPU, compute the teacher's logits of an epoch beside the present work.

        Returns whether they are needed and were not begun before.
        """
        if not self.needs_logits or self.next_logits:
            return False
        self.teachers.cache(epoch, self.images)  # here: to load a teacher is to wait for its stream
        with self.teachers.caches.beside(self.device) as done:
            self.next_logits = self._logits(epoch), done
        return True

    def has_labels(self) -> bool:
        """Whether the logits that ``look_ahead`` began to compute are there."""
        return self.next_logits is None or self.next_logits[1].query()

    def batch(self) -> dict:
        """The fields of ``Step`` that change from step to step."""
        index, view = self._now(self.index), self._now(self.view)
        return {
            "x": self.images.batch(index, view),
            "labels": self.images.labels[index],
            "teacher_logits": self._now(self.teacher_logits) if self.needs_logits else None,
            "inputs": {name: self._now(values) for name, values in self.inputs.items()},
        }

    def _now(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.cursor)[0]

    def _due_logits(self, epoch: int) -> Tensor:
        """The teacher's logits for an epoch that begins now."""
        if self.next_logits is None:
            self.teachers.caches.join()
            return self._logits(epoch)
        (logits, done), self.next_logits = self.next_logits, None
        torch.cuda.current_stream(self.device).wait_event(done)
        return logits

    def _logits(self, epoch: int) -> Tensor:
        """The teacher's logits for an epoch's steps, ``[steps, batch, classes]``."""
        index, view = self._plan(epoch)
        cache = self.teachers.cache(epoch, self.images)
        return cache.logits(index.flatten(), view.flatten()).view(*index.shape, -1)

    def _plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Images and views of an epoch's steps, on the CPU."""
        run, images = self.run, self.images
        epoch += run.epochs_before
        return epoch_batches(run.seed, epoch, len(images), images.views, run.recipe.batch)

    def _inputs(self, epoch: int) -> dict[str, Tensor]:
        """The method's inputs for the steps of an epoch, on the CPU."""
        seed = mix("uniform", self.run.seed, self.run.epochs_before + epoch)
        generator = torch.Generator().manual_seed(seed)
        steps, batch = self.index.shape
        return self.run.method.epoch_inputs(epoch, generator, steps, batch, self.images.classes)
