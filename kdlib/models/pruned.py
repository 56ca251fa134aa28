"""Smaller networks that have only some channels of a larger network."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.models.channels import Channels, Masks, Reader
from kdlib.models.staged import Classifier, Staged, batch_norm, load_weights


class _Selecting(nn.Module):
    """A layer that reads only the input channels in ``index``."""

    def __init__(self, index: Tensor, *arguments, **settings):
        super().__init__(len(index), *arguments, **settings)
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.index_select(1, self.index))


class SelectingNorm(_Selecting, nn.BatchNorm2d):
    """Batch norm of some of its input channels."""


class SelectingConv(_Selecting, nn.Conv2d):
    """A convolution of some of its input channels."""


def prune(network: Staged, channels: Channels, kept: Masks) -> Staged:
    """A copy of the network that has only the kept channels, with their weights.

    Outputs that no layer keeps are not computed. Layers without outputs are removed. A layer that
    keeps only some of the computed channels selects them by index.

    Args:
        kept: the masks that ``channels.remaining`` returned.

    Raises ValueError if no path is left from the image to the logits.
    """
    if not kept[channels.readers[-1].name].any():
        raise ValueError("All gates of a layer are closed: nothing is left of the network.")
    network = copy.deepcopy(network)
    needed = channels.needed(kept)
    removed = {r.block for r in channels.readers if r.block and not needed[r.name].any()}
    for reader in channels.readers:
        layer = network.get_submodule(reader.name)
        if reader.block in removed or isinstance(layer, nn.BatchNorm2d):
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
    for block in removed:
        # A residual block keeps its shortcut. Its ReLU is not in place: other layers read x, too.
        shortcut = getattr(network.get_submodule(block), "shortcut", None)
        rest = nn.Sequential(shortcut, nn.ReLU()) if shortcut else nn.Identity()
        network.set_submodule(block, rest)
    return network.train(network.training)  # sets the mode of the new layers


def _positions(reader: Reader, kept: np.ndarray, needed: Masks) -> Tensor | None:
    """The positions of the kept channels among the computed ones; None if they are all of them."""
    computed = [
        np.ones(c.channels, bool) if c.source is None else needed[c.source] for c in reader.inputs
    ]
    among = kept[np.concatenate(computed)]
    return None if among.all() else torch.tensor(among.nonzero()[0])


def _norm(norm: nn.BatchNorm2d, inputs: Sequence[int], index: Tensor | None) -> nn.BatchNorm2d:
    smaller = batch_norm(len(inputs)) if index is None else SelectingNorm(index)
    smaller.num_batches_tracked = None
    return _with_weights(smaller, {name: t[inputs] for name, t in norm.state_dict().items()})


def _linear(layer: nn.Linear, inputs: Sequence[int]) -> nn.Linear:
    smaller = Classifier(len(inputs), layer.out_features)
    return _with_weights(smaller, {"weight": layer.weight[:, inputs], "bias": layer.bias})


def _conv(
    layer: nn.Conv2d, inputs: Sequence[int], outputs: Sequence[int], index: Tensor | None
) -> nn.Conv2d:
    shape = (len(outputs), layer.kernel_size, layer.stride, layer.padding)
    kind, first = (nn.Conv2d, len(inputs)) if index is None else (SelectingConv, index)
    state = {name: t[outputs] for name, t in layer.state_dict().items()}
    state["weight"] = state["weight"][:, inputs]
    return _with_weights(kind(first, *shape, bias="bias" in state), state)


def _with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    load_weights(module, weights)
    return module
