"""Teachers: the checkpoints one run learns from, each told in its record by fingerprint."""

import torch
from torch import nn

from kdlib import store
from kdlib.data import Images
from kdlib.engine.logit_cache import CachePool, LogitCache
from kdlib.engine.state import trained_networks
from kdlib.errors import StoreError
from kdlib.models import Staged, load_weights
from kdlib.runs import Run


class Teachers:
    """Hands out the labellers of a run, and notes which weights they had.

    Args:
        run: who learns.
        banks: shelf of label banks, shared by the lanes of a process.

    Attributes:
        noted: fingerprints by ``id@epoch``.
        live: the teacher_at itself, for a method that is ``live``; its weights change in place.
        frozen: the parts of other runs that the method uses.
    """

    def __init__(self, run: Run, banks: CachePool):
        self.run, self.banks = run, banks
        self.noted: dict[str, str] = {}
        self.live: Staged | None = None
        self.frozen: dict[str, nn.Module] = {}
        self._living: str | None = None
        if run.start:
            self.note(run.start, run.start.recipe.epochs)

    def note(self, teacher: Run, epoch: int) -> str:
        """Fingerprint of a checkpoint, told in the run's record from now on."""
        name = f"{teacher.id}@{epoch}"
        return self.noted.setdefault(name, store.saved_fingerprint(teacher, epoch))

    def moved_since(self, noted: dict[str, str]) -> bool:
        """Whether a checkpoint has other weights now than it had then."""
        now = {f"{t.id}@{e}": store.saved_fingerprint(t, e) for t, e in self.run.parents}
        return any(noted[name] != now[name] for name in noted.keys() & now.keys())

    def checkpoint(self, teacher: Run, epoch: int) -> Staged:
        """Frozen and in eval mode. Raises StoreError where it is not the one that was noted."""
        model, found = store.load_checkpoint(teacher, epoch)
        if found != self.note(teacher, epoch):
            raise StoreError(
                f"{teacher} was trained anew while {self.run} learned from it: train it again."
            )
        return model

    def bank(self, epoch: int, images: Images) -> LogitCache | None:
        """The bank of the teacher_at of the run's ``epoch`` for these images."""
        anchor = self.run.method.teacher_at(epoch)
        if anchor is None:
            return None
        known = self.note(*anchor)

        def make() -> LogitCache:
            teacher = self.banks.teacher(known, images.device) or self.checkpoint(*anchor)
            return LogitCache(teacher, images)

        key = (known, self.run.data, images.split, len(images), str(images.device))
        return self.banks.get(key, make)

    def borrow(self, images: Images) -> None:
        """Load ``frozen``; ``images`` are those that the run learns from."""
        for name, lender in self.run.method.frozen().items():
            epoch = lender.recipe.epochs
            known = self.note(lender, epoch)
            part = trained_networks(lender, epoch, images, known)[name]
            self.frozen[name] = part.to(memory_format=torch.channels_last)

    def enliven(self, epoch: int, device: torch.device) -> None:
        """Make ``live`` the teacher_at of the run's ``epoch``, at the address it has."""
        anchor = self.run.method.teacher_at(epoch)
        if self._living == (known := self.note(*anchor)):
            return
        model, self._living = self.checkpoint(*anchor), known
        if self.live is None:
            self.live = model.to(device, memory_format=torch.channels_last)
        else:
            load_weights(self.live, model.state_dict())
