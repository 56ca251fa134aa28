"""Teachers: the checkpoints that one run learns from, and their fingerprints for its record."""

import torch
from torch import nn

from kdlib import store
from kdlib.data import Images
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.logit_cache import LogitCache
from kdlib.engine.precision import label_dtype
from kdlib.engine.state import lent_module
from kdlib.errors import StoreError
from kdlib.models import Staged, load_weights
from kdlib.runs import Checkpoint, Run


class Teachers:
    """Loads the teachers of a run, and notes the fingerprints of their weights.

    Args:
        run: the run that learns.
        caches: the logit caches of the process.

    Attributes:
        noted: fingerprints by ``id@epoch``.
        network: the teacher itself, for a method with ``needs_teacher``; its weights change in
            place.
        pretrained: the modules of other runs that the method uses.
    """

    def __init__(self, run: Run, caches: CachePool):
        self.run, self.caches = run, caches
        self.noted: dict[str, str] = {}
        self.network: Staged | None = None
        self.pretrained: dict[str, nn.Module] = {}
        self._loaded: str | None = None
        if run.start:
            self.note(Checkpoint(run.start, run.start.recipe.epochs))

    def note(self, checkpoint: Checkpoint) -> str:
        """The fingerprint of a checkpoint; the run's record will name it."""
        name = f"{checkpoint.run.id}@{checkpoint.epoch}"
        return self.noted.setdefault(name, store.saved_fingerprint(*checkpoint))

    def changed_since(self, noted: dict[str, str]) -> bool:
        """Whether a checkpoint has other weights now than in ``noted``."""
        now = {f"{c.run.id}@{c.epoch}": store.saved_fingerprint(*c) for c in self.run.parents}
        return any(noted[name] != now[name] for name in noted.keys() & now.keys())

    def load(self, checkpoint: Checkpoint) -> Staged:
        """A teacher, frozen and in eval mode.

        Raises StoreError where its weights are not those that were noted.
        """
        model, found = store.load_checkpoint(*checkpoint)
        if found != self.note(checkpoint):
            raise StoreError(
                f"{checkpoint.run} was trained again while {self.run} learned from it. Train "
                f"{self.run} again."
            )
        return model

    def cache(self, epoch: int, images: Images) -> LogitCache | None:
        """The logits of the teacher of the run's ``epoch`` for these images."""
        checkpoint = self.run.method.teacher_at(epoch)
        if checkpoint is None:
            return None
        known = self.note(checkpoint)
        dtype = label_dtype(images.device, checkpoint.run.model, images.size)

        def make() -> LogitCache:
            teacher = self.caches.teacher(known, images.device) or self.load(checkpoint)
            return LogitCache(teacher, images, dtype)

        key = (known, self.run.dataset, images.split, len(images), str(images.device), dtype)
        return self.caches.get(key, make)

    def load_pretrained(self, images: Images) -> None:
        """Load ``pretrained``; ``images`` are those that the run learns from."""
        for name, lender in self.run.method.pretrained().items():
            known = self.note(Checkpoint(lender, lender.recipe.epochs))
            module = lent_module(lender, name, images, known)
            self.pretrained[name] = module.to(memory_format=torch.channels_last)

    def load_network(self, epoch: int, device: torch.device) -> None:
        """Give ``network`` the weights of the teacher of the run's ``epoch``, in place."""
        checkpoint = self.run.method.teacher_at(epoch)
        if self._loaded == (known := self.note(checkpoint)):
            return
        model, self._loaded = self.load(checkpoint), known
        if self.network is None:
            self.network = model.to(device, memory_format=torch.channels_last)
        else:
            load_weights(self.network, model.state_dict())
