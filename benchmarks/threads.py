"""Speed of a training step on a CPU with one thread and with all cores.

The batch has 64 images. If the ratio is below the number of cores, several notebooks at a time with
one thread each are faster than one notebook with all cores. ``./run_all.sh`` therefore runs one
notebook per core.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import Turn, arguments, compare, selected
from benchmarks.layouts import Contender, Setting
from benchmarks.tables import report

# By the side of the images: networks of smoke, and students of the papers.
NETWORKS = {
    8: ("resnet8-x0.35", "resnet14-x0.5", "densenet-bc-28-6"),
    32: ("mobilenetv2-t6-w0.5", "resnet20", "resnet56", "densenet-bc-40-12"),
}


def run_network(case: str, name: str, side: int, options: argparse.Namespace) -> Iterator[dict]:
    contender = Contender(name, side, Setting(torch.channels_last), options.device)
    cores = os.cpu_count() or 1

    def turn(threads: int) -> Turn:
        torch.set_num_threads(threads)
        return contender.turn("step")

    contenders = {"one thread": partial(turn, 1), "all cores": partial(turn, cores)}
    ratios = {("all cores", "one thread"): None}
    yield from compare(case, contenders, ratios, options)


def main() -> None:
    options = arguments(__doc__)
    networks = {
        f"{name}, {side}x{side}": (name, side) for side, names in NETWORKS.items() for name in names
    }
    cases = selected(networks, options)
    rows = (r for case, network in cases for r in run_network(case, *network, options))
    report("threads", rows, options)


if __name__ == "__main__":
    main()
