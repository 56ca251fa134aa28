"""Architecture: which channels of a network make a smaller one, as a file that a name refers to."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from kdlib import files
from kdlib.errors import StoreError, UnknownName
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
        if not path.exists() or path.read_bytes() != self.text.encode():  # absent or damaged
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

    A damaged file is named in a warning and passed over. Raises StoreError where there is no other,
    UnknownName where that of this hash is another network's.
    """
    committed = files.results().glob(f"*/records/{file_of(name)}")
    for path in (files.home() / file_of(name), *committed):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text())
            found = Architecture(content["base"], tuple(content["kept"].items()))
            if file_of(found.name) != path.name:
                raise ValueError("its content changed")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            warnings.warn(f"The architecture {path} is damaged ({error}).", stacklevel=2)
            continue
        if found.name != name:
            raise UnknownName("model", name, [found.name])
        return found
    raise StoreError(
        f"The architecture {name} is not in {files.home()}: the search that found it writes it "
        f"there when it is run again."
    )


def random_architecture(model: str, channels: Channels, macs: int, seed: int) -> Architecture:
    """Gates closed in random order until what is left has no more multiply-accumulates than these.

    The control that the paper lacks: the same teacher, the same gates, the same cost, no search.
    The last gate of a neck stays, as in a search.
    """
    # not a permutation, whose order numpy may change from one version to the next
    order = np.random.default_rng(seed).random(sum(channels.sizes)).argsort(kind="stable")
    last = {begin + order.argsort()[begin:end].argmax() for begin, end in channels.necks}

    def after(closed: int) -> Kept:
        is_open = np.ones(len(order), bool)
        is_open[order[:closed]] = False
        is_open[[*last]] = True
        return channels.settle(channels.split(is_open))

    low, high = 0, len(order)  # the cost falls with every gate that is closed
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if channels.macs(after(middle)) > macs else (low, middle)
    return Architecture.of(model, channels, after(low))
