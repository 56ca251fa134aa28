"""Architecture: which channels of a network make a smaller one, as a file that a name refers to."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from kdlib import files
from kdlib.errors import StoreError
from kdlib.models.channels import Channels, Kept
from kdlib.models.pruned import prune
from kdlib.models.staged import Staged, initialise

# Between the name of the network and that of the architecture found inside it.
MARK = "@"


@dataclass(frozen=True)
class Architecture:
    """A smaller network inside one that has a name.

    Attributes:
        base: that name.
        kept: by every gated layer its inputs in order: 1 for a channel that stays, else 0.
    """

    base: str
    kept: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, base: str, channels: Channels, kept: Kept) -> "Architecture":
        """That of the channels kept, settled by ``channels``."""
        texts = ((r.name, "".join(map(str, kept[r.name].astype(int)))) for r in channels.gated)
        return cls(base, tuple(texts))

    @cached_property
    def text(self) -> str:
        return json.dumps({"base": self.base, "kept": dict(self.kept)}, indent=1) + "\n"

    @property
    def name(self) -> str:
        """For ``build_model``, once it is saved: the base's name and a hash of the content."""
        return f"{self.base}{MARK}{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def save(self) -> str:
        """Write it to the store, where its name is looked up, and return the name."""
        path = files.home() / file_of(self.name)
        if not path.exists():
            files.write_atomic(path, self.text)
        return self.name

    @property
    def is_open(self) -> Kept:
        """The kept inputs of every gated layer, as bool arrays."""
        return {name: np.array(list(text)) == "1" for name, text in self.kept}

    def build(self, whole: Staged) -> Staged:
        """The smaller network with fresh weights, given the whole one."""
        channels = Channels(whole, image_size=32)  # the size changes costs, not shapes
        smaller = prune(whole, channels, channels.settle(self.is_open))
        smaller.head.apply(_draw_anew)
        return initialise(smaller)


def _draw_anew(module: nn.Module) -> None:
    """The initial weights of a linear layer depend on how many inputs it has."""
    if isinstance(module, nn.Linear):
        module.reset_parameters()


def file_of(name: str) -> str:
    """The file of an architecture, in the store as among committed records."""
    return f"architecture-{name.partition(MARK)[2]}.json"


def load_architecture(name: str) -> Architecture:
    """An architecture by name, from the store, else from any profile's committed records.

    Raises StoreError where it is in neither or damaged.
    """
    for path in places_of(name):
        if path.exists():
            try:
                content = json.loads(path.read_text())
                found = Architecture(content["base"], tuple(content["kept"].items()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(f"{path} is damaged ({error}): remove it.") from error
            if found.name != name:
                raise StoreError(f"{path} is damaged: it is {found.name}, not {name}. Remove it.")
            return found
    raise StoreError(
        f"The architecture {name} is not in {files.home()}: the search that found it writes it "
        f"there when it is run again."
    )


def places_of(name: str) -> Iterator[Path]:
    """Where the file of an architecture may be."""
    yield files.home() / file_of(name)
    yield from files.results().glob(f"*/records/{file_of(name)}")
