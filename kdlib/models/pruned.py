"""Smaller networks made of some channels of a larger one."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.models.channels import Channels, Kept, Reader
from kdlib.models.staged import Classifier, Staged, batch_norm, load_weights


class SelectingNorm(nn.BatchNorm2d):
    """Batch norm of some of the channels it is given."""

    def __init__(self, index: Tensor):
        super().__init__(len(index))
        self.num_batches_tracked = None
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(1, self.index))


class SelectingConv(nn.Conv2d):
    """A convolution of some of the channels it is given."""

    def __init__(self, index: Tensor, *arguments, **settings):
        super().__init__(len(index), *arguments, **settings)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(1, self.index))


def prune(network: Staged, channels: Channels, kept: Kept) -> Staged:
    """The network that has the kept channels alone, with their weights.

    Layers read by index what they keep of what there is; outputs that nobody keeps are not
    computed, and layers without any are left out.

    Args:
        kept: settled by ``channels``.

    Raises ValueError where nothing is left between the image and the logits.
    """
    if not kept[channels.readers[-1].name].any():
        raise ValueError("All gates of a layer are closed: nothing is left of the network.")
    network = copy.deepcopy(network)
    needed = channels.needed(kept)
    dead = {r.block for r in channels.readers if r.outputs and not needed[r.name].any()}
    for reader in channels.readers:
        layer = network.get_submodule(reader.name)
        if reader.block in dead or isinstance(layer, nn.BatchNorm2d):
            continue
        inputs = kept[reader.name].nonzero()[0].tolist()
        index = _positions(reader, kept[reader.name], needed)
        if reader.norm:
            norm = _norm(network.get_submodule(reader.norm), inputs, index)
            network.set_submodule(reader.norm, norm)
        if isinstance(layer, nn.Linear):
            smaller = _linear(layer, inputs)
        else:
            outputs = needed[reader.name].nonzero()[0].tolist()
            smaller = _conv(layer, inputs, outputs, None if reader.norm else index)
        network.set_submodule(reader.name, smaller)
    for block in filter(None, dead):
        network.set_submodule(block, _without(network.get_submodule(block)))
    return network.train(network.training)  # the new layers, too


def _positions(reader: Reader, kept: np.ndarray, needed: Kept) -> Tensor | None:
    """Where the kept channels lie among those that there are; None for all of these."""
    there = [
        np.ones(c.channels, bool) if c.source is None else needed[c.source] for c in reader.inputs
    ]
    among = kept[np.concatenate(there)]
    return None if among.all() else torch.tensor(among.nonzero()[0])


def _norm(norm: nn.BatchNorm2d, inputs: Sequence[int], index: Tensor | None) -> nn.BatchNorm2d:
    smaller = batch_norm(len(inputs)) if index is None else SelectingNorm(index)
    return _with_state(smaller, {name: t[inputs] for name, t in norm.state_dict().items()})


def _linear(layer: nn.Linear, inputs: Sequence[int]) -> nn.Linear:
    smaller = Classifier(len(inputs), layer.out_features)
    return _with_state(smaller, {"weight": layer.weight[:, inputs], "bias": layer.bias})


def _conv(
    layer: nn.Conv2d, inputs: Sequence[int], outputs: Sequence[int], index: Tensor | None
) -> nn.Conv2d:
    settings = {
        "out_channels": len(outputs),
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "bias": layer.bias is not None,
    }
    if index is None:
        smaller = nn.Conv2d(len(inputs), **settings)
    else:
        smaller = SelectingConv(index, **settings)
    state = {name: t[outputs] for name, t in layer.state_dict().items()}
    return _with_state(smaller, state | {"weight": state["weight"][:, inputs]})


def _with_state(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    load_weights(module, state)
    return module


def _without(block: nn.Module) -> nn.Module:
    """What is left of a block whose convolutions are gone: of a residual block its shortcut."""
    if shortcut := getattr(block, "shortcut", None):
        return nn.Sequential(shortcut, nn.ReLU())  # not in place: x has other readers
    return nn.Identity()
