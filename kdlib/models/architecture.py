"""Architecture: a smaller network inside a network, as a file that a model's name refers to."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from kdlib import files
from kdlib.errors import StoreError, UnknownName
from kdlib.models.channels import Channels, Masks, close_in_order
from kdlib.models.pruned import prune
from kdlib.models.staged import Staged, initialise

# Separates the name of the larger network from the hash of the architecture.
MARK = "@"


@dataclass(frozen=True)
class Architecture:
    """A smaller network inside a network with a name.

    Attributes:
        base: the name of the larger network.
        kept: for every gated layer its name and one digit per input: 1 if the input is kept, or 0.
    """

    base: str
    kept: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, base: str, channels: Channels, kept: Masks) -> "Architecture":
        """The architecture of the masks that ``channels.remaining`` returned."""
        texts = ((r.name, "".join(map(str, kept[r.name].astype(int)))) for r in channels.gated)
        return cls(base, tuple(texts))

    @cached_property
    def text(self) -> str:
        """The content of the file, as JSON."""
        return json.dumps({"base": self.base, "kept": dict(self.kept)}, indent=1) + "\n"

    @property
    def name(self) -> str:
        """The name for ``build_model``: the larger network's name and a hash of the content."""
        return f"{self.base}{MARK}{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def save(self) -> str:
        """Write the file to the store, and return the name."""
        path = files.home() / file_of(self.name)
        if not path.exists() or path.read_bytes() != self.text.encode():  # missing or damaged
            files.write_atomic(path, self.text)
        return self.name

    @property
    def masks(self) -> Masks:
        """The kept inputs of every gated layer, as bool arrays."""
        return {name: np.array(list(text)) == "1" for name, text in self.kept}

    def build(self, network: Staged) -> Staged:
        """The smaller network with random weights, given the larger one."""
        channels = Channels(network, image_size=32)  # the size changes costs, not shapes
        smaller = prune(network, channels, channels.remaining(self.masks))
        for module in smaller.head.modules():
            if isinstance(module, nn.Linear):  # its random weights depend on its number of inputs
                module.reset_parameters()
        return initialise(smaller)


def file_of(name: str) -> str:
    """The file name of an architecture, both in the store and in committed records."""
    return f"architecture-{name.partition(MARK)[2]}.json"


def load_architecture(name: str) -> Architecture:
    """Load an architecture by name from the store, or else from the committed records.

    Warns of damaged files and tries the next place. Raises StoreError if no intact file is left,
    UnknownName if the file with this hash belongs to another network.
    """
    for path in files.own_or_committed(files.home() / file_of(name), file_of(name)):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text())
            found = Architecture(content["base"], tuple(content["kept"].items()))
            if file_of(found.name) != path.name:
                raise ValueError("its content does not match its name")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            warnings.warn(f"The architecture {path} is damaged ({error}).", stacklevel=2)
            continue
        if found.name != name:
            raise UnknownName("model", name, [found.name])
        return found
    raise StoreError(
        f"The architecture {name} is not in {files.home()}. Run the search that found it again: "
        f"the search writes the file."
    )


def unsearched_architecture(
    model: str, channels: Channels, macs: int, seed: int, by_savings: bool = False
) -> Architecture:
    """Close gates in a fixed order until the network has at most ``macs`` multiply-accumulates.

    Controls that the paper lacks: the same teacher, gates and cost, but no search. The order is
    random; or by what a gate saves, the largest first, and random among equals. In that order the
    penalty alone closes gates, if the loss does not care. One gate of every range in
    ``channels.keep_one`` stays open, as in a search.
    """
    # not `permutation`: numpy may change its order from one version to the next
    order = np.random.default_rng(seed).random(sum(channels.sizes)).argsort(kind="stable")
    if by_savings:
        order = order[(-channels.savings()[order]).argsort(kind="stable")]
    rank = order.argsort()
    last = [begin + rank[begin:end].argmax() for begin, end in channels.keep_one]
    order = order[~np.isin(order, last)]
    is_open = close_in_order(channels, np.ones(len(rank), bool), order, macs)
    return Architecture.of(model, channels, channels.remaining(channels.split(is_open)))
