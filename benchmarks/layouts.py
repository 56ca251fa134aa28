"""Speed of memory layouts and precisions, for steps and forward passes.

- channels_last: in weights and activations the channels are the last dimension.
- contiguous: the channels come before height and width, PyTorch's default.
- autocast, on a CPU: channels_last, the network in bfloat16 by ``torch.autocast``.
- bf16 convolutions, on a CPU: channels_last, float32 except for the products in convolutions.

"step" is a forward pass, a backward pass and an update with batch 64. "forward" evaluates 64
images. In both, the images are on the device. Images have the size of CIFAR, MNIST or the digits.
"gradient" is the relative difference between a contender's first gradient and that of
channels_last: the norm of the difference over the norm. torch chooses the number of threads; with
OMP_NUM_THREADS=1 it is one.
"""

import argparse
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import Turn, arguments, compare, report, row, timed
from kdlib import build_model
from kdlib.engine.device import keep_large_blocks, training_dtype

BATCH, CLASSES = 64, 100
# By the side of the images: one network of every family, and some of smoke's networks.
NETWORKS = {
    32: (
        *("mobilenetv2-t6-w0.5", "shufflenetv2-x0.32", "resnet20", "wrn-16-1", "vgg13-x0.16"),
        *("densenet-bc-50-12", "googlenet-x0.2"),
    ),
    28: ("lenet",),
    8: ("mobilenetv2-x0.15", "resnet8-x0.5", "densenet-bc-28-6"),
}
TEACHERS = {32: ("resnet50",)}  # forward pass only: a step would take seconds
SECONDS = 0.2  # of a turn, about


class Setting(NamedTuple):
    """A contender: its layout, the dtype of autocast, and the precision of float32 convolutions."""

    layout: torch.memory_format
    cast: torch.dtype | None = None
    convolutions: str = "none"

    @contextlib.contextmanager
    def convolving(self) -> Iterator[None]:
        before = torch.backends.mkldnn.conv.fp32_precision
        torch.backends.mkldnn.conv.fp32_precision = self.convolutions
        yield
        torch.backends.mkldnn.conv.fp32_precision = before


def settings(device: torch.device) -> dict[str, Setting]:
    cast = training_dtype(device) if device.type == "cuda" else None
    found = {
        "channels_last": Setting(torch.channels_last, cast),
        "contiguous": Setting(torch.contiguous_format, cast),
    }
    if device.type == "cpu":
        found["autocast"] = Setting(torch.channels_last, torch.bfloat16)
        found["bf16 convolutions"] = Setting(torch.channels_last, convolutions="bf16")
    return found


class Contender:
    """A network that repeats one kind of work on the same images."""

    def __init__(self, name: str, side: int, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        channels = 3 if side == 32 else 1
        self.network = build_model(name, CLASSES, channels, seed=0)
        self.network.to(device, memory_format=setting.layout)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH, channels, side, side, generator=generator)
        self.x = x.to(device, memory_format=setting.layout)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True
        )
        self.repeats = {}

    def logits(self) -> Tensor:
        with torch.autocast(self.device.type, self.setting.cast, self.setting.cast is not None):
            return self.network(self.x)

    def gradient(self) -> Tensor:
        """The gradient of the loss with respect to all parameters, as one vector."""
        with self.setting.convolving():
            self.optimizer.zero_grad()
            F.cross_entropy(self.logits().float(), self.labels).backward()
        return torch.cat([p.grad.flatten().float() for p in self.network.parameters()])

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.logits().float(), self.labels).backward()
        self.optimizer.step()

    @torch.no_grad()
    def forward(self) -> None:
        self.logits()

    def turn(self, work: str) -> Turn:
        """Time ``step`` or ``forward`` for about ``SECONDS``."""
        self.network.train(work == "step")
        once = getattr(self, work)
        with self.setting.convolving():
            if work not in self.repeats:
                once()
                single = timed(once, BATCH, self.device)
                self.repeats[work] = max(1, round(SECONDS / single.wall))
            repeats = self.repeats[work]
            return timed(lambda: [once() for _ in range(repeats)], repeats * BATCH, self.device)


def run_network(name: str, side: int, works: tuple, options: argparse.Namespace) -> list[dict]:
    case = f"{name}, {side}x{side}"
    known = settings(options.device)
    contenders = {n: Contender(name, side, s, options.device) for n, s in known.items()}
    rows = []
    if "step" in works:
        gradients = {n: c.gradient() for n, c in contenders.items()}
        exact = gradients.pop("channels_last")
        for other, gradient in gradients.items():
            off = (gradient - exact).norm() / exact.norm()
            rows.append(row(f"{case}, step", f"gradient, {other}", off.item()))
    ratios = {(other, "channels_last"): None for other in known if other != "channels_last"}
    for work in works:
        turns = {n: partial(c.turn, work) for n, c in contenders.items()}
        rows += compare(f"{case}, {work}", turns, ratios, options)
    return rows


def main() -> None:
    options = arguments(__doc__)
    keep_large_blocks()
    torch.set_flush_denormal(True)
    rows = []
    for networks, works in ((NETWORKS, ("step", "forward")), (TEACHERS, ("forward",))):
        for side, names in networks.items():
            for name in names:
                rows += run_network(name, side, works, options)
    report("layouts", rows, options)


if __name__ == "__main__":
    main()
