"""What an architecture removed, connection by connection, and the picture of a DenseNet's."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from kdlib.models import build_model
from kdlib.models.architecture import Architecture
from kdlib.models.channels import Channels


def drop_rates(found: Architecture) -> pd.DataFrame:
    """Of every connection the share of channels that are removed.

    Columns layer (which reads), source (whose channels; empty for a sum), channels, removed,
    drop_rate.
    """
    channels = Channels(build_model(found.base, classes=10, seed=0), image_size=32)
    kept, rows = channels.settle(found.is_open), []
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
