"""Limits of the machine: bytes/s, FLOP/s, and the time of one small operation.

- copy: copies a tensor that is much larger than any cache. Its bytes count twice: read and write.
- arithmetic: the faster of a product of square matrices and a 3x3 convolution with many channels,
  because different libraries compute them. The precision is that of training on the device.
- small operation: one of a thousand additions to a tiny tensor, each of which needs the result of
  the one before. On a GPU it is a node of a replayed CUDA graph; on a CPU it is the time that the
  host needs to call an operation.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import arguments, row, time_is_over, timed
from benchmarks.tables import report
from kdlib.engine.precision import training_dtype

# Sizes that take at least milliseconds: elements of the copied float32 tensor, side of the
# matrices, number of images and their height and width after the convolution.
COPIED = {"cpu": 1 << 25, "cuda": 1 << 28}
SIDE = {"cpu": 1024, "cuda": 8192}
CONVOLVED = {"cpu": (16, 8), "cuda": (1024, 16)}
CHANNELS = 512
NODES = 1000
REPEATS = 5
MACHINE = "machine"  # the case of the limits in a table


class Ceilings(NamedTuple):
    """A machine's limits."""

    bytes_per_s: float
    flops_per_s: float
    node_s: float

    @classmethod
    def best(cls, measured: list["Ceilings"]) -> "Ceilings":
        """The best value of each limit."""
        copies, products, nodes = zip(*measured, strict=True)
        return cls(max(copies), max(products), min(nodes))


def measure(device: torch.device) -> Ceilings:
    """Measure each limit of ``device`` as the best of a few repeats."""
    arithmetic = max(multiplying(device, training_dtype(device)), _convolving(device))
    return Ceilings(_copying(device), arithmetic, _fastest(_chain(device), device) / NODES)


def rows_of(ceilings: Ceilings, device: torch.device, k: int) -> list[dict]:
    """Rows of one measurement, that of round ``k``."""
    precision = str(training_dtype(device)).removeprefix("torch.")
    return [
        row(MACHINE, "small operation, µs", ceilings.node_s * 1e6, k),
        row(MACHINE, "copy, GB/s", ceilings.bytes_per_s / 1e9, k),
        row(MACHINE, f"arithmetic in {precision}, GFLOP/s", ceilings.flops_per_s / 1e9, k),
    ]


def _copying(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), device)
    return 2 * source.numel() * source.itemsize / seconds


def multiplying(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices in this precision."""
    side = SIDE[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    product = torch.empty_like(a)
    return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=product), device)


@torch.no_grad()
def _convolving(device: torch.device) -> float:
    images, size = CONVOLVED[device.type]
    dtype, channels_last = training_dtype(device), torch.channels_last
    # No padding: its multiplications count, but some libraries skip them.
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False).to(device, dtype)
    convolution.to(memory_format=channels_last)
    x = torch.randn(images, CHANNELS, size + 2, size + 2, device=device)
    x = x.to(dtype, memory_format=channels_last)
    multiplied = images * size**2 * convolution.weight.numel()
    return 2 * multiplied / _fastest(lambda: convolution(x), device)


def _chain(device: torch.device) -> Callable[[], None]:
    x = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(NODES):
            x.add_(1)

    if device.type == "cpu":
        return chain
    chain()  # load the kernel before the capture
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    return graph.replay


def _fastest(work: Callable, device: torch.device) -> float:
    """Seconds of the fastest of a few repeats, after one for warm-up."""
    work()
    return min(timed(work, 0, device).wall for _ in range(REPEATS))


def rounds(options: argparse.Namespace) -> Iterator[dict]:
    for k in range(options.rounds):
        if time_is_over(options, f"round {k + 1}"):
            return
        yield from rows_of(measure(options.device), options.device, k)


def main() -> None:
    options = arguments(__doc__)
    report("ceilings", rounds(options), options)


if __name__ == "__main__":
    main()
