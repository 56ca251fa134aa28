"""Speed of memory layouts and precisions, for training steps and a teacher's labels.

- channels_last: in weights and activations the channels are the last dimension.
- contiguous: the channels come before height and width, PyTorch's default.
- autocast, on a CPU: channels_last, the network in bfloat16 by ``torch.autocast``.

"step" is a forward pass, a backward pass and an update with batch 64. "labels" is a forward pass of
64 images in eval mode, with folded batch norms, as for the cache of a teacher's logits. In both,
the images are on the device. "gradient" is the relative difference between a contender's first
gradient and that of channels_last: the norm of the difference over the norm.

torch chooses the number of threads; with OMP_NUM_THREADS=1 it is one. On a CPU that multiplies in
bfloat16, ``--write`` also writes ``kdlib/engine/bfloat16.csv``: by family of networks and side of
the images, how much faster bfloat16 is.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import Turn, arguments, compare, row, selected, timed
from benchmarks.batches import CLASSES
from benchmarks.tables import report
from kdlib import build_model
from kdlib.engine.logit_cache import folded
from kdlib.engine.precision import SPEEDS, multiplies_bfloat16, training_dtype

BATCH = 64
# By the side of the images: networks of every family, small ones of those that the book trains.
NETWORKS = {
    32: (
        *("resnet20", "wrn-16-1", "vgg13-x0.16", "densenet-bc-50-12", "mobilenetv2-t6-w0.5"),
        *("shufflenetv2-x0.32", "googlenet-x0.2"),
    ),
    28: ("lenet",),
    16: (
        *("resnet20", "resnet8-x0.5", "wrn-16-1", "vgg13-x0.16", "densenet-bc-50-12"),
        *("mobilenetv2-t6-w0.5", "shufflenetv2-x0.32", "googlenet-x0.2", "lenet"),
    ),
    8: (
        *("resnet20", "resnet8-x0.5", "wrn-10-1-x0.5", "vgg13-x0.11", "densenet-bc-16-5"),
        *("mobilenetv2-x0.15", "shufflenetv2-x0.18", "googlenet-x0.05", "lenet"),
    ),
}
WORKS = ("step", "labels")
TEACHERS = {32: ("resnet50",)}  # labels only: a step would take seconds
SECONDS = 0.2  # of a turn, about
LEAST_SIDE = 16
# The table for kdlib: its file, the families, and the contenders whose ratio it has.
FAMILIES = ("resnet", "wrn", "vgg", "densenet", "mobilenetv2", "shufflenet", "googlenet", "lenet")
RATIO = "autocast / channels_last"


class Setting(NamedTuple):
    """A contender: its layout, and the dtype of autocast."""

    layout: torch.memory_format
    cast: torch.dtype | None = None


def settings(device: torch.device) -> dict[str, Setting]:
    cast = training_dtype(device) if device.type == "cuda" else None
    found = {
        "channels_last": Setting(torch.channels_last, cast),
        "contiguous": Setting(torch.contiguous_format, cast),
    }
    if device.type == "cpu":
        found["autocast"] = Setting(torch.channels_last, torch.bfloat16)
    return found


class Contender:
    """A network that repeats one kind of work on the same images."""

    def __init__(self, name: str, side: int, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        channels = 3 if side == 32 else 1
        self.network = build_model(name, CLASSES, channels, seed=0)
        self.network.to(device, memory_format=setting.layout)
        self.teacher = folded(self.network.eval()).to(device, memory_format=setting.layout)
        self.network.train()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(BATCH, channels, side, side, generator=generator)
        self.x = x.to(device, memory_format=setting.layout)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True
        )
        self.repeats = {}

    def logits(self, network: nn.Module) -> Tensor:
        with torch.autocast(self.device.type, self.setting.cast, self.setting.cast is not None):
            return network(self.x)

    def gradient(self) -> Tensor:
        """The gradient of the loss with respect to all parameters, as one vector."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.logits(self.network).float(), self.labels).backward()
        return torch.cat([p.grad.flatten().float() for p in self.network.parameters()])

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.logits(self.network).float(), self.labels).backward()
        self.optimizer.step()

    @torch.no_grad()
    def label(self) -> None:
        self.logits(self.teacher)

    def turn(self, work: str) -> Turn:
        """Time "step" or "labels" for about ``SECONDS``."""
        once = self.step if work == "step" else self.label
        if work not in self.repeats:
            once()
            single = timed(once, BATCH, self.device)
            self.repeats[work] = max(1, round(SECONDS / single.wall))
        repeats = self.repeats[work]
        return timed(lambda: [once() for _ in range(repeats)], repeats * BATCH, self.device)


def run_network(
    case: str, name: str, side: int, work: str, options: argparse.Namespace
) -> Iterator[dict]:
    known = settings(options.device)
    contenders = {n: Contender(name, side, s, options.device) for n, s in known.items()}
    if work == "step":
        gradients = {n: c.gradient() for n, c in contenders.items()}
        exact = gradients.pop("channels_last")
        for other, gradient in gradients.items():
            off = (gradient - exact).norm() / exact.norm()
            yield row(case, f"gradient, {other}", off.item())
    ratios = {(other, "channels_last"): None for other in known if other != "channels_last"}
    turns = {n: partial(c.turn, work) for n, c in contenders.items()}
    yield from compare(case, turns, ratios, options)


def bfloat16_table(measured: pd.DataFrame) -> pd.DataFrame:
    """How much faster bfloat16 is than float32: columns family, side, training, labels.

    A number is a ratio of images/s: the median over the rounds, and over the networks of a family.
    A family and side without both numbers has no row. Images below ``LEAST_SIDE`` have none either:
    there bfloat16 gains nothing that is sure, and every machine computes the same numbers.
    """
    ratios = measured[measured.quantity == RATIO].groupby("case").value.median()
    parts = ratios.index.str.extract(r"(\S+), (\d+)x\d+, (\w+)")
    family = [next(f for f in FAMILIES if name.startswith(f)) for name in parts[0]]
    table = pd.DataFrame(
        {
            "family": family,
            "side": parts[1].astype(int),
            "work": parts[2],
            "ratio": ratios.to_numpy(),
        }
    )
    table = table.pivot_table(
        index=["family", "side"], columns="work", values="ratio", aggfunc="median"
    )
    table = table[table.index.get_level_values("side") >= LEAST_SIDE]
    return table.reindex(columns=WORKS).dropna().set_axis(["training", "labels"], axis=1).round(3)


def main() -> None:
    options = arguments(__doc__)
    cases = {
        f"{name}, {side}x{side}, {work}": (name, side, work)
        for networks, works in ((NETWORKS, WORKS), (TEACHERS, WORKS[1:]))
        for side, several in networks.items()
        for name in several
        for work in works
    }
    chosen = selected(cases, options)
    rows = (r for case, what in chosen for r in run_network(case, *what, options))
    measured = report("layouts", rows, options)
    if options.write and options.device.type == "cpu" and multiplies_bfloat16():
        bfloat16_table(measured).to_csv(SPEEDS)


if __name__ == "__main__":
    main()
