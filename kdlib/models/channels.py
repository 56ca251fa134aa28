"""Who reads whose channels in a network, and what stays of it when some are not read."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.models import densenet, resnet
from kdlib.models.cost import count_cost
from kdlib.models.staged import Staged

# Whether a channel is kept, by the layer that reads it: bool ``[its inputs]``.
Kept = dict[str, np.ndarray]


class Connection(NamedTuple):
    """Channels that a layer reads from one other.

    Attributes:
        source: the convolution that puts them out; None for the image and for a sum of several,
            of which none can be removed.
        channels: how many.
    """

    source: str | None
    channels: int


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels.

    Attributes:
        name: where it is in the network.
        inputs: whose channels it reads, in order.
        norm: the batch norm between these and the layer, if there is one.
        outputs: of a convolution, how many channels it puts out; else 0.
        summed: whether these go into a sum, where none can be left out.
        gated: whether its inputs can be closed one by one.
        block: the module that is left out where the layer puts out nothing.
    """

    name: str
    inputs: tuple[Connection, ...]
    norm: str | None = None
    outputs: int = 0
    summed: bool = False
    gated: bool = True
    block: str | None = None

    @property
    def channels(self) -> int:
        return sum(connection.channels for connection in self.inputs)


def read_channels(network: Staged) -> list[Reader]:
    """All layers that read channels, in the order of the data.

    In a DenseNet every dense layer's convolutions and the transitions are gated, in a ResNet the
    convolutions of the blocks, in a VGG all but the first.

    Raises ValueError where the network has layers of another kind.
    """
    found: list[Reader] = []
    stream: list[Connection] = []
    norm = None
    for name, layer in _layers(network):
        if isinstance(layer, densenet.DenseLayer):
            found += _dense_layer(name, layer, tuple(stream))
            stream.append(Connection(f"{name}.conv2", layer.conv2.out_channels))
        elif isinstance(layer, resnet.Block):
            sources = {connection.source for connection in stream}
            found = [replace(r, summed=r.summed or r.name in sources) for r in found]
            found += _residual_block(name, layer)
            stream, norm = [Connection(None, layer.norms[-1].num_features)], None
        elif isinstance(layer, nn.BatchNorm2d):
            norm = name
        elif isinstance(layer, nn.Conv2d):
            first = [Connection(None, layer.in_channels)]
            inputs = tuple(stream or first)
            found.append(Reader(name, inputs, norm, layer.out_channels, gated=bool(stream)))
            stream, norm = [Connection(name, layer.out_channels)], None
        elif isinstance(layer, nn.Linear):
            found.append(Reader(name, tuple(stream), norm, gated=False))
        elif next(layer.children(), None) or next(layer.parameters(), None) is not None:
            raise ValueError(f"There are no gates for a {type(layer).__name__}, which {name} is.")
    return found


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What is in a network, containers opened."""
    if isinstance(module, Staged | nn.Sequential | nn.ModuleList):
        for child, part in module.named_children():
            yield from _layers(part, f"{name}.{child}" if name else child)
    else:
        yield name, module


def _dense_layer(name: str, layer: nn.Module, stream: tuple[Connection, ...]) -> list[Reader]:
    narrow = Connection(f"{name}.conv1", layer.conv1.out_channels)
    return [
        Reader(narrow.source, stream, f"{name}.norm1", narrow.channels, block=name),
        Reader(f"{name}.conv2", (narrow,), f"{name}.norm2", layer.conv2.out_channels, block=name),
    ]


def _residual_block(name: str, block: nn.Module) -> list[Reader]:
    """Its convolutions, and the batch norm before the sum, whose bias remains where they die."""
    readers, source, norm = [], None, None
    for k, layer in enumerate(block.convs):
        inputs = (Connection(source, layer.in_channels),)
        source = f"{name}.convs.{k}"
        readers.append(Reader(source, inputs, norm, layer.out_channels, block=name))
        norm = f"{name}.norms.{k}"
    last = (Connection(source, block.norms[-1].num_features),)
    return [*readers, Reader(norm, last, gated=False)]


class Channels:
    """A network's channels, and what it costs where some are closed.

    Args:
        network: of any kind that ``read_channels`` takes.
        image_size: height and width of the square images that it sees.
    """

    def __init__(self, network: Staged, image_size: int):
        self.readers = read_channels(network)
        self.gated = [reader for reader in self.readers if reader.gated]
        self.sizes = [reader.channels for reader in self.gated]
        self._area = _multiplications(network, self.readers, image_size)
        everything = self.settle(self.split(np.ones(sum(self.sizes), bool)))
        self._besides = count_cost(network, image_size).macs - self._of_readers(everything)
        self.whole = self.macs(everything)

    @property
    def necks(self) -> list[tuple[int, int]]:
        """Ranges of gates of which one must stay open, or nothing is left of the network.

        Of each gated layer that nothing leads around, those on its first connection, whose source
        cannot die.
        """
        begins = np.cumsum([0, *self.sizes]).tolist()
        return [
            (begin, begin + reader.inputs[0].channels)
            for reader, begin in zip(self.gated, begins, strict=False)
            if reader.block is None
        ]

    def split(self, flat: np.ndarray) -> Kept:
        """One value per gate, taken apart by gated layer."""
        parts = np.split(flat, np.cumsum(self.sizes)[:-1])
        return {reader.name: part for reader, part in zip(self.gated, parts, strict=True)}

    def settle(self, is_open: Mapping[str, np.ndarray]) -> Kept:
        """The channels that stay, by every reader, given those whose gates are open.

        What is read of a layer without inputs goes, since it is a constant; then what nobody reads.
        """
        kept, lives = {}, {None: True}
        for reader in self.readers:
            live = [np.full(c.channels, lives[c.source]) for c in reader.inputs]
            kept[reader.name] = np.concatenate(live)
            if reader.gated:
                kept[reader.name] &= is_open[reader.name]
            lives[reader.name] = bool(kept[reader.name].any())
        needed = self._summed()
        for reader in reversed(self.readers):
            if reader.outputs and not needed[reader.name].any():
                kept[reader.name][:] = False
            _note(reader, kept[reader.name], needed)
        return kept

    def needed(self, kept: Kept) -> Kept:
        """Which outputs of every layer somebody keeps."""
        needed = self._summed()
        for reader in self.readers:
            _note(reader, kept[reader.name], needed)
        return needed

    def _summed(self) -> Kept:
        """The outputs that nobody can leave out."""
        return {r.name: np.full(r.outputs, r.summed) for r in self.readers}

    def macs(self, kept: Kept) -> int:
        """Multiply-accumulates of the network that keeps these channels alone."""
        return self._besides + self._of_readers(kept)

    def _of_readers(self, kept: Kept) -> int:
        needed = self.needed(kept)
        return sum(
            area * int(kept[name].sum()) * int(needed[name].sum() or not len(needed[name]))
            for name, area in self._area.items()
        )

    def savings(self) -> np.ndarray:
        """How many multiply-accumulates each gate's summary saves in the whole network.

        Those of the layer that reads the channel. Where the gate is on the only way from one layer
        to another, also those that compute it; not so where a layer reads several, as a transition
        does: a gate there closes a connection (docs/decisions.md, SBS-s).
        """
        layers = {reader.name: reader for reader in self.readers}
        read = Counter(c.source for reader in self.readers for c in reader.inputs)
        savings = []
        for reader in self.gated:
            saved, source = self._area[reader.name] * reader.outputs, reader.inputs[0].source
            if len(reader.inputs) == 1 and source and read[source] == 1:
                saved += self._area[source] * layers[source].channels
            savings += [saved] * reader.channels
        return np.array(savings)


def _note(reader: Reader, kept: np.ndarray, needed: Kept) -> None:
    begin = 0
    for source, channels in reader.inputs:
        if source is not None:
            needed[source] |= kept[begin : begin + channels]
        begin += channels


def _multiplications(network: Staged, readers: list[Reader], image_size: int) -> dict[str, int]:
    """Of every layer that multiplies, how often for one pair of an input and an output; of a linear
    layer for all its outputs."""
    shape, counts = copy.deepcopy(network).to("meta").eval(), {}

    def hook(name: str):
        def count(module: nn.Module, _: tuple, output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                counts[name] = output[0, 0].numel() * module.weight[0, 0].numel()
            elif isinstance(module, nn.Linear):
                counts[name] = module.out_features

        return count

    for reader in readers:
        shape.get_submodule(reader.name).register_forward_hook(hook(reader.name))
    with torch.no_grad():
        shape(torch.empty(1, readers[0].channels, image_size, image_size, device="meta"))
    return counts
