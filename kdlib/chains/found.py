"""Students found inside their teacher: search, extract, train from scratch."""

import copy
from dataclasses import dataclass, fields, replace

import pandas as pd
import torch
from torch.func import functional_call

from kdlib.data import load_data
from kdlib.engine.state import trained_networks
from kdlib.errors import NothingFound
from kdlib.methods import GateSearch
from kdlib.models import Staged, build_model, count_cost, load_weights
from kdlib.models.architecture import Architecture, random_architecture
from kdlib.models.channels import Channels
from kdlib.models.pruned import prune
from kdlib.runs import Run
from kdlib.store import Trained, measure


@dataclass(frozen=True)
class FoundStudent:
    """A chain of runs for ``train``: a search, then the network it found, from random weights.

    Attributes:
        search: a run of ``GateSearch``.
        student: how to train what it finds; the model it names is replaced.
        held: before the student, search again with the divergence held at this share of the largest
            that ``search`` had after an epoch (ε of Eq. 5, from 0 to 1); 0 for not at all.

    Raises ValueError where ``search`` is none, or cannot be held so.
    """

    search: Run
    student: Run
    held: float = 0.0

    def __post_init__(self):
        if not isinstance(self.search.method, GateSearch):
            raise ValueError(f"{self.search} is no search: give it GateSearch(teacher, budget=…).")
        if not 0 <= self.held <= 1 or (self.held and self.search.method.target != "soft"):
            raise ValueError(f"A soft target is held at a share from 0 to 1: {self.held}.")

    def following(self, trained: Trained | None) -> Run | None:
        """The search; after it, where one is ``held``, that one; then the student; then None."""
        if trained is None:
            return self.search
        if self.held and trained.run == self.search:
            return self.held_search(trained)
        if isinstance(trained.run.method, GateSearch):
            return replace(self.student, model=self.choose(trained).save())
        return None

    def choose(self, trained: Trained) -> Architecture:
        """The student, given its search."""
        return architecture(trained)

    def held_search(self, trained: Trained) -> Run:
        """The second search, given the first."""
        divergence = self.held * trained.log.train_kd.max()
        return replace(self.search, method=replace(self.search.method, held_at=divergence))

    def needs(self, run: Run) -> list[Run]:
        """What must be in the store to say what follows ``run``."""
        return [run]

    def estimate(self) -> list[Run]:
        """The runs of the chain, as long as their recipes say and the student as the teacher: what
        it may cost at most."""
        again = [replace(self.search, method=replace(self.search.method, held_at=self.held))]
        student = {f.name: getattr(self.student, f.name) for f in fields(Run)}
        chain = f"{type(self).__name__} {self.search.id} {self.held}"
        return [self.search, *(again if self.held else []), Foreseen(**student, of=chain)]


@dataclass(frozen=True)
class Foreseen(Run):
    """Stands in, in forecasts, for a run whose network is not known yet, nor so its id.

    Attributes:
        of: tells it from others.
    """

    of: str = ""


@dataclass(frozen=True)
class RandomStudent(FoundStudent):
    """The control of ``FoundStudent``: a random part of the teacher that costs what was found."""

    def choose(self, trained):
        _check_end(trained)
        run = trained.run
        return random_architecture(run.model, channels_of(run), trained.final["macs"], run.seed)


def architecture(trained: Trained, epoch: int | None = None) -> Architecture:
    """What a search found. Kept beside its record, so that a record alone tells it.

    Args:
        epoch: what was open after this one of its epochs; None for the end.

    Raises NothingFound where the search ended above its budget, or nothing is left of the network;
    ValueError for an epoch that it did not have.
    """
    if epoch is None:
        _check_end(trained)
    elif trained.epochs < epoch < trained.run.recipe.epochs:
        raise ValueError(f"{trained.run} ended in epoch {trained.epochs}: there is no {epoch}.")
    table = measure(trained, kept_channels, epoch=epoch)
    return Architecture(trained.run.model, tuple(zip(table.layer, table.kept, strict=True)))


def _check_end(trained: Trained) -> None:
    budget, share = trained.run.method.budget, trained.final["macs_share"]
    if share > budget:
        raise NothingFound(
            f"{trained.run} ended at {share:.1%} of the teacher's multiply-accumulates, above its "
            f"budget of {budget:.1%}: give it more epochs or a larger strength."
        )
    if share == 0:
        raise NothingFound(
            f"{trained.run} closed all gates of a layer that all others depend on: nothing is "
            f"left. Give it a smaller strength."
        )


def kept_channels(trained: Trained, epoch: int | None) -> pd.DataFrame:
    """By every gated layer its inputs in order, 1 for a channel that stays: columns layer, kept.

    Args:
        epoch: after this one of the search; None for its last.
    """
    gates = _networks(trained, epoch)["gates"]
    found = Architecture.of(trained.run.model, gates.channels, gates.kept())
    return pd.DataFrame(found.kept, columns=["layer", "kept"])


def extract(trained: Trained) -> Staged:
    """The network that a search found with the weights it had there, gates multiplied into them.

    In eval mode and frozen; its logits are those of the gated network. Needs the search's weights.
    """
    networks = _networks(trained)
    student, gates = networks["student"], networks["gates"]
    whole = copy.deepcopy(student)
    load_weights(whole, whole.state_dict() | gates(student))
    found = prune(whole, gates.channels, gates.kept())
    return found.eval().requires_grad_(False)


@torch.no_grad()
def extraction(trained: Trained) -> pd.DataFrame:
    """``extract`` against the gated network, on the test set.

    Columns: macs, as counted of the extracted network; test_top1 in %; difference, the largest of
    any logit, and logit, the largest of the gated network's.
    """
    networks, found = _networks(trained), extract(trained)
    student, gates = networks["student"], networks["gates"]
    images, scaled = load_data(trained.run.data, "test"), gates(student)
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


def _networks(trained: Trained, epoch: int | None = None):
    run = trained.run
    epoch = run.recipe.epochs if epoch is None else epoch
    images = load_data(run.data).first(run.images)
    return trained_networks(run, epoch, images, trained.summary["weights"].get(str(epoch)))


def channels_of(run: Run) -> Channels:
    """Which layer reads which channels in a run's network, and what that costs."""
    images = load_data(run.data, "test")
    network = build_model(run.model, images.classes, images.channels, seed=0)
    return Channels(network, images.size)
