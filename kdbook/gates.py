"""What decides which gates a search closes: batch norm, the loss, or the weights of the penalty."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.func import functional_call

from kdlib import losses
from kdlib.chains.divergence import training_images
from kdlib.chains.found import architecture, channels_of, searched_modules
from kdlib.errors import NothingFound
from kdlib.methods.gates import Gates
from kdlib.models.architecture import Architecture, unsearched_architecture
from kdlib.models.channels import Channels
from kdlib.store import Trained


@torch.no_grad()
def shrinking(trained: Trained, factors: Sequence[float], count: int = 512) -> pd.DataFrame:
    """What gates on the bottlenecks of a DenseNet's first block do to its logits.

    Columns: gates (what is done to them), batch and running: T²·KL at T = 4 from the logits of the
    same network with open gates, with batch norm's statistics of this batch, the first ``count``
    training images, and with its running statistics.
    """
    images = training_images(trained.run).first(count)
    x = images.batch(torch.arange(len(images), device=images.device)).cpu()
    gates = Gates(Channels(trained.model(), images.size))
    names = np.repeat([r.name for r in gates.channels.gated], gates.channels.sizes)
    inside = torch.tensor([n.startswith("body.0.") and n.endswith("conv2") for n in names])
    half = inside & (torch.rand(len(names), generator=torch.manual_seed(0)) < 0.5)
    cases = {f"all times {factor:g}": torch.where(inside, factor, 1.0) for factor in factors}
    cases["a random half closed"] = torch.where(half, 0.0, 1.0)
    found = {name: [] for name in cases}
    for training in (True, False):
        network = trained.model().train(training)
        whole = network(x)
        for name, values in cases.items():
            gates.values.copy_(values)
            logits = functional_call(network, gates(network), (x,))
            found[name].append(losses.kd(logits, whole, temperature=4.0).item())
    table = pd.DataFrame.from_dict(found, orient="index", columns=["batch", "running"])
    return table.rename_axis("gates").reset_index()


def separation(trained: Trained, epoch: int) -> pd.DataFrame:
    """How far the gates of one layer differ from each other after an epoch of a search.

    They start equal and have one α, so only the loss can separate them. Columns: within and
    between, the variances of gates around the mean of their layer, and of these means; share,
    within / (within + between).
    """
    gates = searched_modules(trained, epoch)["gates"]
    layers = gates.values.split(gates.channels.sizes)
    means = torch.cat([layer.mean().expand(len(layer)) for layer in layers])
    within = (gates.values - means).square().mean().item()
    between = means.var(correction=0).item()
    share = within / (within + between) if within + between else np.nan
    return pd.DataFrame([(within, between, share)], columns=["within", "between", "share"])


def end_of(trained: Trained) -> Architecture:
    """What a search has left; also of a search that ended above its budget."""
    try:
        return architecture(trained)
    except NothingFound:
        return architecture(trained, trained.run.recipe.epochs)


def without_search(trained: Trained, by_savings: bool) -> Architecture:
    """A part of the teacher at the cost of what a search found: random, or by α alone."""
    run, channels = trained.run, channels_of(trained.run)
    macs = channels.macs(channels.remaining(end_of(trained).masks))
    return unsearched_architecture(run.model, channels, macs, run.seed, by_savings)


def closed(found: Architecture) -> np.ndarray:
    """One bool for each gate of the larger network: whether it is closed."""
    return ~np.concatenate([*found.masks.values()])


def agreement(one: Architecture, other: Architecture) -> float:
    """Closed gates that both have, over closed gates that one of them has (Jaccard's index)."""
    first, second = closed(one), closed(other)
    return float((first & second).sum() / (first | second).sum())


def cost_share(trained: Trained) -> float:
    """The cost of what a search has left, as a share of the teacher's multiply-accumulates."""
    channels = channels_of(trained.run)
    return channels.macs(channels.remaining(end_of(trained).masks)) / channels.total_macs
