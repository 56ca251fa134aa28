"""How fast a network could be: its work, counted, against what a machine can do at best.

Work is counted on one forward pass of shapes alone, operation by operation as torch dispatches
them. How often an operation's inputs and outputs then go through memory, forward and backward, and
by how many kernels, stands in the tables below. Every operation is taken to read from memory what
it needs and to write what it makes: a cache that keeps a small batch's activations beats the bound,
so that a share of it can exceed 1. Bytes of weights are in, those of images and losses are not.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ceilings import Ceilings


class Passes(NamedTuple):
    """How often all inputs and outputs of an operation are read or written, in how many kernels."""

    inputs: int | float
    outputs: int
    kernels: int


# Of a training step. A convolution: forward, gradient of the weights, gradient of the input. Batch
# norm: statistics, normalisation; two sums, gradient. What has two gradients is added up once.
EAGER = {
    "convolution": Passes(3, 3, 3),
    "linear": Passes(3, 3, 4),
    "norm": Passes(5, 3, 5),
    "relu": Passes(2, 3, 2),
    "add": Passes(2, 2, 2),
    "cat": Passes(2, 3, 3),
    "pool": Passes(2, 2, 2),
    "shuffle": Passes(2, 2, 2),
}
# The compiler joins what is done element by element to the batch norm beside it.
COMPILED = EAGER | {
    "norm": Passes(5, 3, 4),
    "relu": Passes(0, 0, 0),
    "add": Passes(1, 0, 0),
    "cat": Passes(1, 1, 1),
}
FORWARD = {kind: Passes(1, 1, 1) for kind in EAGER}
# One kernel for a convolution, its bias, what is added to it and ReLU.
FUSED = FORWARD | {"relu": Passes(0, 0, 0), "add": Passes(0.5, 0, 0)}
# Kernels of a step outside of the network: batch, loss, update, account.
REST = {False: 25, True: 15}

KINDS = {
    "convolution": "convolution",
    "addmm": "linear",
    "native_batch_norm": "norm",
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "cat": "cat",
    "mean": "pool",
    "max_pool2d_with_indices": "pool",
    "avg_pool2d": "pool",
    "adaptive_max_pool2d": "pool",
    "channel_shuffle": "shuffle",
}


class Operation(NamedTuple):
    """One operation of a forward pass, for one image: elements, multiply-accumulates."""

    kind: str
    inputs: int
    outputs: int
    macs: int = 0


class Work(NamedTuple):
    """What a training step or a forward pass takes: FLOPs, bytes through memory, kernels."""

    flops: float
    bytes: float
    kernels: float

    def seconds(self, ceilings: Ceilings) -> dict[str, float]:
        """What each part of the work takes if the machine does nothing else, by its name."""
        return {
            "arithmetic": self.flops / ceilings.flops_per_s,
            "memory": self.bytes / ceilings.bytes_per_s,
            "launches": self.kernels * ceilings.node_s,
        }

    def bound(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds that it takes at least, and the name of the part that takes as long."""
        parts = self.seconds(ceilings)
        cause = max(parts, key=parts.__getitem__)
        return parts[cause], cause


def operations(network: nn.Module, training: bool, image_size: int = 32) -> list[Operation]:
    """A network's operations in the order of a forward pass.

    On a copy without storage. Raises KeyError for an operation that nobody has counted yet.
    """
    shape = copy.deepcopy(network).to("meta").train(training)
    channels = next(m.in_channels for m in shape.modules() if isinstance(m, nn.Conv2d))
    images = 2  # a batch norm in training wants more than one
    with torch.no_grad(), _Record(images) as record:
        shape(torch.empty(images, channels, image_size, image_size, device="meta"))
    return record.found


class _Record(TorchDispatchMode):
    """Notes the operations that run inside, per image."""

    def __init__(self, images: int):
        super().__init__()
        self.images, self.found = images, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name == "empty":  # nothing moves
            return result
        kind = KINDS[name]
        output = result[0] if isinstance(result, tuple) else result
        weight = args[1] if kind == "convolution" else args[2].T if kind == "linear" else None
        if kind == "add":
            read = args[:2]
        elif kind == "cat":
            read = args[0]
        else:
            read = args[1:2] if kind == "linear" else args[:1]
        elements = [sum(map(Tensor.numel, read)), output.numel()]
        if weight is not None:
            elements.append(output.numel() * weight[0].numel())
        self.found.append(Operation(kind, *(count // self.images for count in elements)))
        return result


def training(
    network: nn.Module, batch: int, dtype: torch.dtype, compiled: bool = False, image_size: int = 32
) -> Work:
    """A step of SGD with momentum on ``batch`` images, without labels of a teacher.

    Args:
        dtype: in which convolutions compute; weights and updates are float32.
        compiled: whether the network is.
    """
    found = operations(network, training=True, image_size=image_size)
    work = _moved(found, COMPILED if compiled else EAGER, batch, dtype)
    first = found[0]  # nobody asks for the gradient of the images
    half = dtype.itemsize < 4
    # Used twice, made once; the update reads weight, gradient, momentum and writes two of them.
    weight_bytes = 3 * dtype.itemsize + 5 * 4
    weight_bytes += 2 * (4 + dtype.itemsize) if half else 0  # to half precision, gradients back
    casts = sum(op.kind in ("convolution", "linear") for op in found) * (1 if compiled else 2)
    return Work(
        2 * batch * (3 * sum(op.macs for op in found) - first.macs),
        work.bytes
        - batch * dtype.itemsize * (first.inputs + first.outputs)
        + weight_bytes * _parameters(network),
        work.kernels + REST[compiled] + (casts if half else 0) - 1,
    )


def forward(
    network: nn.Module, batch: int, dtype: torch.dtype, fused: bool = False, image_size: int = 32
) -> Work:
    """The logits of ``batch`` images, of a network in eval mode as it is, folded or not.

    Args:
        dtype: in which it computes, its weights as well.
        fused: with one kernel for a convolution and what is done to its output; as far as torch
            goes, a limit that is not reached.
    """
    found = operations(network, training=False, image_size=image_size)
    work = _moved(found, FUSED if fused else FORWARD, batch, dtype)
    weights = _parameters(network) * dtype.itemsize
    macs = sum(op.macs for op in found)
    return Work(2 * batch * macs, work.bytes + weights, work.kernels)


def _moved(
    found: list[Operation], passes: dict[str, Passes], batch: int, dtype: torch.dtype
) -> Work:
    elements = kernels = 0
    for op in found:
        of = passes[op.kind]
        elements += of.inputs * op.inputs + of.outputs * op.outputs
        kernels += of.kernels
    return Work(0, batch * dtype.itemsize * elements, kernels)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
