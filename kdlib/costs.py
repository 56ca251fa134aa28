"""What the networks of runs cost on the images they see: counted, and measured."""

import statistics
import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from kdlib.data import load_data
from kdlib.models import Cost, Staged, build_model, count_cost
from kdlib.models.channels import Channels
from kdlib.runs import Run


def cost_of(run: Run) -> Cost:
    """Parameters and multiply-accumulates of a run's network."""
    return count_cost(_built(run), _image_size(run))


def channels_of(run: Run) -> Channels:
    """Who reads whose channels in a run's network, and what that costs."""
    return Channels(_built(run), _image_size(run))


def latencies(runs: Mapping[str, Run], batch: int = 64, rounds: int = 20) -> pd.DataFrame:
    """Median time of a forward pass of every run's network, on the CPU and a GPU if there is one.

    In eval mode, float32, fresh weights. The networks take turns, so that a busy machine slows all
    of them alike.

    Returns columns ``device``, ``parameters, M``, ``MACs, M``, ``ms a batch``; index: the names.
    """
    x = load_data(next(iter(runs.values())).data, "test").batch(torch.arange(batch))
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        images = x.to(device)
        networks = {name: _built(run).eval().to(device) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 2):
            for name, network in networks.items():
                times[name].append(_seconds(network, images))
        for name, network in networks.items():
            cost = count_cost(network, x.shape[-1])
            milliseconds = 1000 * statistics.median(times[name][2:])
            rows.append((name, device, cost.params / 1e6, cost.macs / 1e6, milliseconds))
    columns = ["network", "device", "parameters, M", "MACs, M", "ms a batch"]
    return pd.DataFrame(rows, columns=columns).set_index("network").round(3)


def _built(run: Run) -> Staged:
    images = load_data(run.data, "test")
    network = build_model(run.model, images.classes, images.channels, seed=0)
    return network.to(memory_format=torch.channels_last)


def _image_size(run: Run) -> int:
    return load_data(run.data, "test").batch(torch.zeros(1, dtype=torch.int64)).shape[-1]


@torch.no_grad()
def _seconds(network: nn.Module, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    network(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
