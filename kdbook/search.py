"""What is measured and drawn for Search for Better Students."""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from kdbook import figures
from kdlib.data import load_data
from kdlib.models import Cost, Staged, build_model, count_cost
from kdlib.models.architecture import Architecture
from kdlib.models.channels import Channels
from kdlib.runs import Run


def drop_rates(found: Architecture) -> pd.DataFrame:
    """Of every connection the share of channels that are removed.

    Columns layer (which reads), source (whose channels; empty for a sum), channels, removed,
    drop_rate.
    """
    channels = Channels(build_model(found.base, classes=10, seed=0), image_size=32)
    kept, rows = channels.remaining(found.is_open), []
    for reader in channels.gated:
        ends = np.cumsum([connection.channels for connection in reader.inputs])
        parts = np.split(kept[reader.name], ends[:-1])
        for (source, count), part in zip(reader.inputs, parts, strict=True):
            removed = int(count - part.sum())
            rows.append((reader.name, source or "", count, removed, removed / count))
    return pd.DataFrame(rows, columns=["layer", "source", "channels", "removed", "drop_rate"])


@dataclass(frozen=True)
class DenseBlock:
    """Drop rates in one block of a DenseNet.

    Layers are numbered from 0; the source -1 is the block's stem, what it is given to begin with.

    Attributes:
        inputs: of its layers' connections.
        bottlenecks: of the channels between the two convolutions of a layer.
        transition: of what the transition after it reads; empty for the last block.
    """

    inputs: pd.DataFrame
    bottlenecks: pd.DataFrame
    transition: pd.DataFrame

    @property
    def skips(self) -> pd.DataFrame:
        """Connections from one layer to another."""
        return self.inputs[self.inputs.source >= 0]

    @property
    def into_last(self) -> pd.DataFrame:
        """Connections into the last layer."""
        return self.inputs[self.inputs.layer == self.inputs.layer.max()]


def dense_blocks(rates: pd.DataFrame) -> list[DenseBlock]:
    """``drop_rates`` of a DenseNet, block by block."""
    stage, kind = (rates.layer.str.split(".").str[k] for k in (1, -1))
    inputs = {b: rates[(stage == b) & (kind == "conv1")] for b in stage.unique()}
    blocks = []
    for block, (_, own) in enumerate(inputs.items()):
        layers = {name: k for k, name in enumerate(own.layer.unique())}
        sources = {name.replace("conv1", "conv2"): k for name, k in layers.items()}
        after = rates[(stage == str(block + 1)) & ~kind.isin(["conv1", "conv2"])]
        within = rates[(stage == str(block)) & (kind == "conv2")]
        own, after = (t.assign(source=t.source.map(sources).fillna(-1)) for t in (own, after))
        blocks.append(
            DenseBlock(
                own.assign(layer=own.layer.map(layers)),
                within.assign(layer=within.layer.map(sources)),
                after,
            )
        )
    return blocks


def draw_students(axes: Axes, cost: pd.Series, scratch: pd.Series, kd: pd.Series) -> None:
    """Errors against a cost: circles from scratch, crosses with KD, the crosses' Pareto front.

    Args:
        cost, scratch, kd: by the student's name.
    """
    for k, name in enumerate(cost.index):
        look = {"color": figures.OKABE_ITO[k % len(figures.OKABE_ITO)], "ls": ""}
        x = cost[name]
        axes.plot([x, x], [scratch[name], kd[name]], lw=0.8, **look | {"ls": "-", "marker": ""})
        axes.plot(x, scratch[name], marker="o", **look)
        axes.plot(x, kd[name], marker="X", ms=6, **look)
    front = pareto(cost, kd)
    axes.step(
        cost[front], kd[front], where="post", c="#999999", lw=0.8, ls="-", marker="", zorder=0
    )
    figures.log_axis(axes)
    colors = [figures.OKABE_ITO[k % len(figures.OKABE_ITO)] for k in range(len(cost))]
    figures.name_points(axes, cost, kd, colors)


def pareto(cost: pd.Series, error: pd.Series) -> list[str]:
    """Whom nobody beats: no other costs no more and errs less, or costs less and errs no more."""
    cheaper = cost.to_numpy()[:, None] < cost.to_numpy()
    better = error.to_numpy()[:, None] < error.to_numpy()
    beaten = (cheaper & ~better.T) | (better & ~cheaper.T)
    return [*cost[~beaten.any(0)].sort_values().index]


def draw_dense_blocks(figure: Figure, blocks: Iterable[DenseBlock]) -> None:
    """Drop rates of every block of a DenseNet: connections, bottlenecks, transition."""
    import seaborn  # almost a second, in one figure of the book

    blocks = list(blocks)
    grid = figure.subplots(3, len(blocks), gridspec_kw={"height_ratios": (8, 1, 1)}, squeeze=False)
    look = {"vmin": 0, "vmax": 1, "cmap": "cividis_r", "linewidths": 0.4, "linecolor": "white"}
    layout = figure.get_layout_engine()
    figure.set_layout_engine("none")  # seaborn draws the whole figure for every table
    for k, (block, column) in enumerate(zip(blocks, grid.T, strict=True)):
        inputs = block.inputs.pivot(index="source", columns="layer", values="drop_rate")
        strips = {
            "bottleneck": block.bottlenecks.set_index("layer").drop_rate,
            "transition": block.transition.set_index("source").drop_rate,
        }
        tables = [inputs, *(strip.to_frame().T for strip in strips.values())]
        for axes, table in zip(column, tables, strict=True):
            axes.grid(visible=False)
            if table.empty:
                axes.set_axis_off()
                continue
            bar = {"cbar": False, "xticklabels": [_source(c) for c in table.columns]}
            seaborn.heatmap(table, ax=axes, **look, **bar, yticklabels=False, square=False)
            axes.tick_params(length=0, labelsize=5.5, rotation=0)
            axes.set(xlabel="", ylabel="")
        column[0].set_yticks(np.arange(len(inputs)) + 0.5, map(_source, inputs.index), fontsize=5.5)
        column[0].set_title(f"dense block {k + 1}")
        column[0].set_xlabel("layer that reads", fontsize=7)
        if k == 0:
            column[0].set_ylabel("whose channels", fontsize=7)
            for axes, name in zip(column[1:], strips, strict=True):
                axes.set_ylabel(name, fontsize=6.5, rotation=0, ha="right", va="center")
    figure.set_layout_engine(layout)
    shades = figure.colorbar(column[0].collections[0], ax=grid, shrink=0.8, aspect=40, pad=0.01)
    shades.set_label("drop rate: removed over present", fontsize=7)
    shades.ax.tick_params(labelsize=6)


def _source(number: float) -> str:
    return "stem" if number < 0 else f"{number:.0f}"


def cost_of(run: Run) -> Cost:
    """Parameters and multiply-accumulates of a run's network."""
    return count_cost(_built(run), _image_size(run))


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
