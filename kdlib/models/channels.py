"""Channels of a network: which layer reads which, and which remain when gates are closed."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import nn

from kdlib.models import densenet, resnet
from kdlib.models.cost import count_cost
from kdlib.models.staged import Staged

# One bool per channel, True if the channel is kept; by the name of a layer.
Masks = dict[str, np.ndarray]


class Connection(NamedTuple):
    """Channels that one layer reads from one other layer.

    Attributes:
        source: the convolution that computes the channels; None for the image and for a sum of
            convolutions, because no channel of these can be removed.
        channels: the number of channels.
    """

    source: str | None
    channels: int


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels.

    Attributes:
        name: the layer's name in the network.
        inputs: the connections that the layer reads, in order.
        norm: the batch norm between the channels and the layer, if there is one.
        outputs: the number of output channels of a convolution; 0 for other layers.
        gated: True if each input has a gate.
        block: the module to remove when the layer has no outputs left.
    """

    name: str
    inputs: tuple[Connection, ...]
    norm: str | None = None
    outputs: int = 0
    gated: bool = True
    block: str | None = None

    @property
    def channels(self) -> int:
        return sum(connection.channels for connection in self.inputs)


def read_channels(network: Staged) -> list[Reader]:
    """All layers that read channels, in the order of the forward pass.

    The gated layers are: in a DenseNet, the convolutions of the dense layers and the transitions;
    in a ResNet, the convolutions of the blocks; in a VGG, all convolutions except the first.

    Raises ValueError if the network has other kinds of layers.
    """
    found: list[Reader] = []
    stream: list[Connection] = []
    norm = None
    for name, layer in _layers(network):
        if isinstance(layer, densenet.DenseLayer):
            found += _dense_layer(name, layer, tuple(stream))
            stream.append(Connection(f"{name}.conv2", layer.conv2.out_channels))
        elif isinstance(layer, resnet.Block):
            found += _residual_block(name, layer)
            stream, norm = [Connection(None, layer.norms[-1].num_features)], None
        elif isinstance(layer, nn.BatchNorm2d):
            norm = name
        elif isinstance(layer, nn.Conv2d):
            inputs = tuple(stream) or (Connection(None, layer.in_channels),)
            found.append(Reader(name, inputs, norm, layer.out_channels, gated=bool(stream)))
            stream, norm = [Connection(name, layer.out_channels)], None
        elif isinstance(layer, nn.Linear):
            found.append(Reader(name, tuple(stream), norm, gated=False))
        elif next(layer.children(), None) or next(layer.parameters(), None) is not None:
            raise ValueError(
                f"There are no gates for a {type(layer).__name__} ({name}): gates are for "
                f"DenseNets, ResNets and VGGs."
            )
    return found


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers and blocks of a network, by name."""
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
    """The convolutions, and the last batch norm: its bias enters the sum even without inputs."""
    readers, source, norm = [], None, None
    for k, layer in enumerate(block.convs):
        inputs = (Connection(source, layer.in_channels),)
        source = f"{name}.convs.{k}"
        readers.append(Reader(source, inputs, norm, layer.out_channels, block=name))
        norm = f"{name}.norms.{k}"
    last = (Connection(source, block.norms[-1].num_features),)
    return [*readers, Reader(norm, last, gated=False)]


class Channels:
    """The channels of a network, and its cost when some gates are closed.

    Args:
        network: of a kind that ``read_channels`` accepts.
        image_size: height and width of the square images.

    Attributes:
        readers: all layers that read channels.
        gated: the readers with gates.
        sizes: the number of gates of each gated reader.
        total_macs: multiply-accumulates of the network with all gates open.
    """

    def __init__(self, network: Staged, image_size: int):
        self.readers = read_channels(network)
        self.gated = [reader for reader in self.readers if reader.gated]
        self.sizes = [reader.channels for reader in self.gated]
        # How often the outputs of a layer are read. A sum is not a reader.
        self._reads = Counter(c.source for reader in self.readers for c in reader.inputs)
        cost = count_cost(network, image_size)
        # Multiply-accumulates of one pair of an input and an output (of a linear layer: of one
        # input and all outputs).
        self._area = {
            reader.name: cost.layers[reader.name] // (reader.channels * (reader.outputs or 1))
            for reader in self.readers
            if reader.name in cost.layers
        }
        self.total_macs = cost.macs
        self._fixed = 0
        everything = self.remaining(self.split(np.ones(sum(self.sizes), bool)))
        self._fixed = cost.macs - self.macs(everything)  # the cost of the shortcuts

    @property
    def keep_one(self) -> list[tuple[int, int]]:
        """Ranges of gates; one gate of each range must stay open to keep a path to the logits.

        There is one range for every gated layer that no shortcut or concatenation bypasses: the
        gates on its first connection, because the source of this connection is never removed.
        """
        begins = np.cumsum([0, *self.sizes]).tolist()
        return [
            (begin, begin + reader.inputs[0].channels)
            for reader, begin in zip(self.gated, begins, strict=False)
            if reader.block is None
        ]

    def split(self, flat: np.ndarray) -> Masks:
        """One value per gate, split by gated layer."""
        parts = np.split(flat, np.cumsum(self.sizes)[:-1])
        return {reader.name: part for reader, part in zip(self.gated, parts, strict=True)}

    def remaining(self, is_open: Mapping[str, np.ndarray]) -> Masks:
        """The inputs that every reader keeps, given the open gates of the gated layers.

        The outputs of a layer without inputs are constant, so they are removed. Then every layer
        whose outputs no layer reads is removed.
        """
        kept, computes = {}, {None: True}
        for reader in self.readers:
            inputs = [np.full(c.channels, computes[c.source]) for c in reader.inputs]
            kept[reader.name] = np.concatenate(inputs)
            if reader.gated:
                kept[reader.name] &= is_open[reader.name]
            computes[reader.name] = bool(kept[reader.name].any())
        self.needed(kept, remove=True)
        return kept

    def needed(self, kept: Masks, remove: bool = False) -> Masks:
        """The outputs of every layer that some layer keeps as inputs.

        Args:
            remove: also clear, in ``kept``, the inputs of convolutions without needed outputs.
        """
        # Outputs without a reader go into a sum, so none of them can be removed.
        needed = {r.name: np.full(r.outputs, not self._reads[r.name]) for r in self.readers}
        for reader in reversed(self.readers):
            if remove and reader.outputs and not needed[reader.name].any():
                kept[reader.name][:] = False
            begin = 0
            for source, channels in reader.inputs:
                if source is not None:
                    needed[source] |= kept[reader.name][begin : begin + channels]
                begin += channels
        return needed

    def macs(self, kept: Masks) -> int:
        """Multiply-accumulates of the network that has only the kept channels."""
        needed = self.needed(kept)
        return self._fixed + sum(
            area * int(kept[name].sum()) * int(needed[name].sum() or not len(needed[name]))
            for name, area in self._area.items()
        )

    def savings(self) -> np.ndarray:
        """The multiply-accumulates that closing one gate saves in the network, for every gate.

        The layer that reads the channel always saves its part. The layer that computes the channel
        saves its part only if its outputs have no other reader and the reading layer no other
        source; a transition reads several layers (docs/decisions.md, SBS-s).
        """
        layers = {reader.name: reader for reader in self.readers}
        savings = []
        for reader in self.gated:
            saved, source = self._area[reader.name] * reader.outputs, reader.inputs[0].source
            if len(reader.inputs) == 1 and source and self._reads[source] == 1:
                saved += self._area[source] * layers[source].channels
            savings += [saved] * reader.channels
        return np.array(savings)


def close_in_order(
    channels: Channels, is_open: np.ndarray, order: np.ndarray, macs: int
) -> np.ndarray:
    """Close gates in this order until the network costs at most ``macs``: one bool per gate.

    Args:
        is_open: one bool per gate; the gates in ``order`` are open at first, whatever it says.
    """

    def after(closed: int) -> np.ndarray:
        now = is_open.copy()
        now[order[:closed]], now[order[closed:]] = False, True
        return now

    def cost(closed: int) -> int:
        return channels.macs(channels.remaining(channels.split(after(closed))))

    # the smallest number of closed gates with a low enough cost: every closed gate lowers the cost
    return after(bisect.bisect_left(range(len(order)), -macs, key=lambda k: -cost(k)))
