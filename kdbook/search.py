"""Search for Better Students: the tables and pictures of its exhibits."""

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.func import functional_call

from kdbook import figures
from kdbook.profile import Profile
from kdlib.chains.found import extract, searched_modules
from kdlib.data import load_data
from kdlib.models import Cost, Staged, build_model, count_cost
from kdlib.models.architecture import Architecture
from kdlib.models.channels import Channels
from kdlib.runs import Run
from kdlib.store import Trained

# Factors on the strength and the rate of the gates, by profile. Gates must close in fewer steps in
# a shorter profile.
GATE_FACTORS = {"smoke": (800, 5), "laptop": (50, 1), "course": (3, 3), "paper": (1, 1)}


def gate_settings(profile: Profile, strength: float, rate: float) -> dict[str, float]:
    """The paper's λ₂ and η in this profile, as settings of ``GateSearch``."""
    on_strength, on_rate = GATE_FACTORS[profile.name]
    return {"strength": strength * on_strength, "rate": rate * on_rate}


def drop_rates(found: Architecture) -> pd.DataFrame:
    """The share of channels that an architecture removes from each connection.

    Columns: layer (that reads the channels), source (layer that makes them; empty for a sum),
    channels, removed, drop_rate.
    """
    channels = Channels(build_model(found.base, classes=10, seed=0), image_size=32)
    kept, rows = channels.remaining(found.masks), []
    for reader in channels.gated:
        ends = np.cumsum([connection.channels for connection in reader.inputs])
        parts = np.split(kept[reader.name], ends[:-1])
        for (source, count), part in zip(reader.inputs, parts, strict=True):
            removed = int(count - part.sum())
            rows.append((reader.name, source or "", count, removed, removed / count))
    return pd.DataFrame(rows, columns=["layer", "source", "channels", "removed", "drop_rate"])


@dataclass(frozen=True)
class DenseBlock:
    """The drop rates of one block of a DenseNet.

    The numbers of layers start at 0. The source -1 is the input of the block.

    Attributes:
        inputs: connections into the layers.
        bottlenecks: channels between the two convolutions of a layer.
        transition: connections into the transition after the block; empty for the last block.
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
    """The table ``drop_rates`` of a DenseNet, split by block."""
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


def draw_students(
    axes: Axes, cost: pd.Series, scratch: pd.Series, kd: pd.Series, numbers: Mapping[str, int]
) -> None:
    """Errors against a cost: circles from scratch, crosses with KD and their Pareto front.

    Args:
        cost, scratch, kd: by the student's name.
        numbers: what stands beside a student's cross; ``name_students`` explains it.
    """
    for name in cost.index:
        color = _color(numbers[name])
        x = cost[name]
        axes.plot([x, x], [scratch[name], kd[name]], c=color, lw=0.8, ls="-", marker="")
        axes.plot(x, scratch[name], c=color, ls="", marker="o")
        axes.plot(x, kd[name], c=color, ls="", marker="X", ms=6)
        look = {"fontsize": 7, "color": color, "textcoords": "offset points"}
        axes.annotate(str(numbers[name]), (x, kd[name]), (5, -2), **look)
    front = pareto(cost, kd)
    axes.step(
        cost[front], kd[front], where="post", c="#999999", lw=0.8, ls="-", marker="", zorder=0
    )
    figures.log_axis(axes)


def name_students(figure: Figure, numbers: Mapping[str, int]) -> None:
    """The legend of ``draw_students``: numbers and names."""
    handles = [
        Line2D([], [], c=_color(number), ls="", marker="X", ms=6, label=f"{number} {name}")
        for name, number in numbers.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7)


def _color(number: int) -> str:
    return figures.OKABE_ITO[number % len(figures.OKABE_ITO)]


def pareto(cost: pd.Series, error: pd.Series) -> list[str]:
    """The names on the Pareto front, from the cheapest to the most expensive.

    A point is not on the front if another point has a lower cost and no higher error, or a lower
    error and no higher cost.
    """
    cheaper = cost.to_numpy()[:, None] < cost.to_numpy()
    better = error.to_numpy()[:, None] < error.to_numpy()
    beaten = (cheaper & ~better.T) | (better & ~cheaper.T)
    return [*cost[~beaten.any(0)].sort_values().index]


def draw_dense_blocks(figure: Figure, blocks: Iterable[DenseBlock]) -> None:
    """Drop rates of every block of a DenseNet: connections, bottlenecks, transition."""
    blocks = list(blocks)
    grid = figure.subplots(3, len(blocks), gridspec_kw={"height_ratios": (8, 1, 1)}, squeeze=False)
    for number, (block, column) in enumerate(zip(blocks, grid.T, strict=True), start=1):
        inputs = block.inputs.pivot(index="source", columns="layer", values="drop_rate")
        strips = {
            "bottleneck": block.bottlenecks.set_index("layer").drop_rate,
            "transition": block.transition.set_index("source").drop_rate,
        }
        _draw_rates(column[0], inputs)
        for axes, strip in zip(column[1:], strips.values(), strict=True):
            _draw_rates(axes, strip.to_frame().T)
        column[0].set_yticks(np.arange(len(inputs)) + 0.5, map(_source, inputs.index))
        column[0].set_title(f"dense block {number}")
        column[0].set_xlabel("reading layer", fontsize=7)
        if number == 1:
            column[0].set_ylabel("source of the channels", fontsize=7)
            for axes, name in zip(column[1:], strips, strict=True):
                axes.set_ylabel(name, fontsize=6.5, rotation=0, ha="right", va="center")
    shades = figure.colorbar(column[0].collections[0], ax=grid, shrink=0.8, aspect=40, pad=0.01)
    shades.set_label("drop rate: channels removed / channels", fontsize=7)
    shades.ax.tick_params(labelsize=6)


def _draw_rates(axes: Axes, table: pd.DataFrame) -> None:
    """A heat map. ``seaborn.heatmap`` would draw the whole figure again for every table."""
    if table.empty:
        axes.set_axis_off()
        return
    look = {"cmap": "cividis_r", "linewidth": 0.4, "edgecolor": "white"}
    axes.grid(visible=False)
    axes.pcolormesh(table, vmin=0, vmax=1, **look)
    axes.set_xticks(np.arange(table.shape[1]) + 0.5, map(_source, table.columns))
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=5.5)


def _source(number: float) -> str:
    return "stem" if number < 0 else f"{number:.0f}"


def cost_of(run: Run) -> Cost:
    """Parameters and multiply-accumulates of a run's network on its test images."""
    return count_cost(_network_of(run), load_data(run.dataset, "test").size)


def latencies(runs: Mapping[str, Run], batch: int = 64, rounds: int = 20) -> pd.DataFrame:
    """Median time of a forward pass of each run's network, on the CPU and on a GPU if there is one.

    Networks have random weights, in eval mode and float32. They take turns, so that other work on
    the machine slows all of them equally.

    Index: network, the names in ``runs``. Columns: ``device``, ``parameters, M``, ``MACs, M``,
    ``ms a batch``.
    """
    x = load_data(next(iter(runs.values())).dataset, "test").batch(torch.arange(batch))
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        images = x.to(device)
        networks = {
            name: _network_of(run).eval().to(device, memory_format=torch.channels_last)
            for name, run in runs.items()
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 2):
            for name, network in networks.items():
                times[name].append(_seconds(network, images))
        for name, network in networks.items():
            cost = count_cost(network, x.shape[-1])
            milliseconds = 1000 * statistics.median(times[name][2:])  # the first two warm up
            rows.append((name, device, cost.params / 1e6, cost.macs / 1e6, milliseconds))
    columns = ["network", "device", "parameters, M", "MACs, M", "ms a batch"]
    return pd.DataFrame(rows, columns=columns).set_index("network").round(3)


def _network_of(run: Run) -> Staged:
    images = load_data(run.dataset, "test")
    return build_model(run.model, images.classes, images.channels, seed=0)


@torch.no_grad()
def _seconds(network: nn.Module, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    network(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def extraction(trained: Trained) -> pd.DataFrame:
    """The result of ``extract`` compared with the gated network, on the test set.

    Columns: macs, counted on the extracted network; test_top1 in %; difference, the largest
    absolute difference of a logit; logit, the largest absolute logit of the gated network.
    """
    modules, found = searched_modules(trained), extract(trained)
    student, gates = modules["student"], modules["gates"]
    images, scaled = load_data(trained.run.dataset, "test"), gates(student)
    hits, difference, largest = 0, 0.0, 0.0
    for index in torch.arange(len(images)).split(500):
        x = images.batch(index)
        ours, gated = found(x), functional_call(student, scaled, (x,))
        hits += (ours.argmax(1) == images.labels[index]).sum().item()
        difference = max(difference, (ours - gated).abs().max().item())
        largest = max(largest, gated.abs().max().item())
    row = {
        "macs": count_cost(found, x.shape[-1]).macs,
        "test_top1": 100 * hits / len(images),
        "difference": difference,
        "logit": largest,
    }
    return pd.DataFrame([row])
