"""An upper bound on a network's speed, from its counted work and the limits of the machine.

We count the operations of one forward pass on shapes alone, as torch dispatches them. The tables
below say how often the inputs and outputs of an operation pass through memory, forward and
backward, and in how many kernels. We assume that each operation reads its inputs from memory and
writes its outputs to memory. A processor cache that keeps the activations of a small batch can
therefore exceed the bound. Bytes of weights count; bytes of images and losses do not.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ceilings import Ceilings


class Passes(NamedTuple):
    """How often inputs and outputs of an operation pass through memory, and in how many kernels."""

    inputs: int | float
    outputs: int
    kernels: int


# A training step. Convolution: forward, gradient of the weights, gradient of the input. Batch norm:
# statistics, normalisation; two sums, gradient. A tensor with two gradients has one addition.
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
# The compiler fuses element-wise operations with the batch norm beside them.
COMPILED = EAGER | {
    "norm": Passes(5, 3, 4),
    "relu": Passes(0, 0, 0),
    "add": Passes(1, 0, 0),
    "cat": Passes(1, 1, 1),
}
FORWARD = {kind: Passes(1, 1, 1) for kind in EAGER}
# One kernel for a convolution, its bias, an addition and ReLU.
FUSED = FORWARD | {"relu": Passes(0, 0, 0), "add": Passes(0.5, 0, 0)}
# Kernels of a step outside the network, eager and compiled: batch, loss, update, metrics.
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
    """One operation of a forward pass for one image: elements in and out, multiply-accumulates."""

    kind: str
    inputs: int
    outputs: int
    macs: int = 0


class Work(NamedTuple):
    """The work of a training step or a forward pass: FLOPs, bytes through memory, kernels."""

    flops: float
    bytes: float
    kernels: float

    def seconds(self, ceilings: Ceilings) -> dict[str, float]:
        """Seconds of each part of the work, by name, if the machine does nothing else."""
        return {
            "arithmetic": self.flops / ceilings.flops_per_s,
            "memory": self.bytes / ceilings.bytes_per_s,
            "launches": self.kernels * ceilings.node_s,
        }

    def bound(self, ceilings: Ceilings) -> tuple[float, str]:
        """The least number of seconds, and the name of the slowest part."""
        parts = self.seconds(ceilings)
        cause = max(parts, key=parts.__getitem__)
        return parts[cause], cause


def operations(network: nn.Module, training: bool, image_size: int = 32) -> list[Operation]:
    """The operations of a forward pass, in order, read from a copy without storage.

    Raises KeyError for an operation that is not in ``KINDS``.
    """
    shape = copy.deepcopy(network).to("meta").train(training)
    channels = next(m.in_channels for m in shape.modules() if isinstance(m, nn.Conv2d))
    images = 2  # batch norm in train mode needs more than one
    with torch.no_grad(), _Record(images) as record:
        shape(torch.empty(images, channels, image_size, image_size, device="meta"))
    return record.found


class _Record(TorchDispatchMode):
    """Records the operations that run inside it, per image."""

    def __init__(self, images: int):
        super().__init__()
        self.images, self.found = images, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name == "empty":  # no data moves
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
    """The work of a step of SGD with momentum on ``batch`` images, without a teacher.

    Args:
        dtype: precision of the convolutions; weights and updates are float32.
        compiled: whether the network is compiled.
    """
    found = operations(network, training=True, image_size=image_size)
    work = _moved(found, COMPILED if compiled else EAGER, batch, dtype)
    first = found[0]  # the images need no gradient
    half = dtype.itemsize < 4
    # A step reads weights twice and writes a gradient. The update reads three tensors, writes two.
    weight_bytes = 3 * dtype.itemsize + 5 * 4
    weight_bytes += 2 * (4 + dtype.itemsize) if half else 0  # casts of weights and gradients
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
    """The work of a forward pass of ``batch`` images in eval mode.

    Args:
        network: with or without folded batch norms.
        dtype: precision of arithmetic and weights.
        fused: one kernel for a convolution and the operations on its output; torch does not reach
            this limit.
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
        per = passes[op.kind]
        elements += per.inputs * op.inputs + per.outputs * op.outputs
        kernels += per.kernels
    return Work(0, batch * dtype.itemsize * elements, kernels)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
