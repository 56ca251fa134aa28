"""Networks whose channels all differ, and gates on them, for the tests of student search."""

import torch
from torch import nn
from torch.func import functional_call

from kdlib import build_model
from kdlib.methods.gates import Gates
from kdlib.models.channels import Channels

SMALL = ["densenet-bc-16-4", "resnet14-x0.25", "vgg13-x0.06"]
BOTTLENECKS = "resnet50-x0.03"


def lively(name, seed=0, classes=5, channels=1):
    """A network in eval mode with random statistics, scales and shifts."""
    network, generator = build_model(name, classes, channels, seed), torch.manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.3, generator=generator)
    return network.eval()


def images(count=4, size=8, channels=1, seed=0, dtype=torch.float32):
    return torch.randn(count, channels, size, size, generator=torch.manual_seed(seed), dtype=dtype)


def gates_of(network, closed=0.0, seed=0, size=8, weighted=True):
    """Gates between 0.5 and 1.5, a random share of them closed."""
    gates, generator = Gates(Channels(network, size), weighted), torch.manual_seed(seed)
    with torch.no_grad():
        gates.values.uniform_(0.5, 1.5, generator=generator)
        gates.values[torch.rand(len(gates.values), generator=generator) < closed] = 0
    return gates


def values_of(gates):
    """The values of gates by layer, to write to."""
    names = [reader.name for reader in gates.channels.gated]
    return dict(zip(names, gates.values.data.split(gates.channels.sizes), strict=True))


def close(gates, *layers, source=None):
    """Close the gates of these layers; with a ``source``, only on channels that come from it."""
    values, connections = values_of(gates), {r.name: r.inputs for r in gates.channels.gated}
    for layer in layers:
        parts = values[layer].split([connection.channels for connection in connections[layer]])
        for connection, part in zip(connections[layer], parts, strict=True):
            if source in (None, connection.source):
                part.zero_()
    return gates


def gated_logits(network, gates, x):
    return functional_call(network, gates(network), (x,))


def gated_convolutions(network):
    """The convolutions that the paper puts gates before, in the order of the data."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and "stem" not in name and "shortcut" not in name
    ]
