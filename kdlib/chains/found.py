"""Students found inside their teacher: search, extract, train from random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from kdlib.data import load_data
from kdlib.engine.state import trained_modules
from kdlib.errors import NothingFound
from kdlib.methods.gates import GateSearch
from kdlib.models import Staged, build_model, load_weights
from kdlib.models.architecture import MARK, Architecture, unsearched_architecture
from kdlib.models.channels import Channels
from kdlib.models.pruned import prune
from kdlib.runs import Run
from kdlib.store import Trained, measure

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class FoundStudent:
    """A chain of runs for ``train``: a search, then its network, from random weights.

    Attributes:
        search: a run of ``GateSearch``.
        student: the training of the found network; its model is replaced.
        held: ε of Eq. 5 as a share, from 0 to 1, of the largest divergence that ``search`` had
            after an epoch. A second search holds the divergence at this value before the student
            is trained. 0 for no second search.
        held_by: how the second search holds it, see ``GateSearch``.

    Raises ValueError where ``search`` is no search, or its target cannot be held.
    """

    search: Run
    student: Run
    held: float = 0.0
    held_by: str = "distance"

    def __post_init__(self):
        if not isinstance(self.search.method, GateSearch):
            raise ValueError(f"{self.search} is no search: give it GateSearch(teacher, budget=…).")
        if not 0 <= self.held <= 1 or (self.held and self.search.method.target != "soft"):
            raise ValueError(
                f"held={self.held}: only the soft target can be held, at a share from 0 to 1."
            )

    def next_run(self, trained: Trained | None) -> Run | None:
        """The search; then, with ``held``, the second search; then the student; then None."""
        if trained is None:
            return self.search
        if self.held and trained.run == self.search:
            return self.held_search(trained)
        if isinstance(trained.run.method, GateSearch):
            return replace(self.student, model=self.choose(trained).save())
        return None

    def choose(self, trained: Trained) -> Architecture:
        """The student's architecture, given the trained search."""
        return architecture(trained)

    def held_search(self, trained: Trained) -> Run:
        """The second search, given the first."""
        divergence = self.held * max(row["train_kd"] for row in trained.rows)
        method = replace(self.search.method, held_at=divergence, held_by=self.held_by)
        return replace(self.search, method=method)

    def needs(self, run: Run) -> list[Run]:
        """The search: its gates decide the student."""
        return [run]

    def estimate(self) -> list[Run]:
        """The chain at most: all epochs of the recipes, and a student as large as the teacher.

        The architecture is not known yet: its name holds the search's id in place of its own.
        """
        held = replace(self.search.method, held_at=self.held, held_by=self.held_by)
        again = [replace(self.search, method=held)]
        kind = f"{type(self).__name__}-{self.search.id}-{self.held}-{self.held_by}"
        unknown = f"{self.search.model}{MARK}{kind}"
        student = replace(self.student, model=unknown)
        return [self.search, *(again if self.held else []), student]


@dataclass(frozen=True)
class RandomStudent(FoundStudent):
    """A control of ``FoundStudent``: a random part of the teacher, at most as costly."""

    by_savings: ClassVar[bool] = False

    def choose(self, trained):
        run, channels = trained.run, channels_of(trained.run)
        macs = channels.macs(channels.remaining(architecture(trained).masks))
        return unsearched_architecture(run.model, channels, macs, run.seed, self.by_savings)


@dataclass(frozen=True)
class AlphaStudent(RandomStudent):
    """A control of ``FoundStudent``: gates close in the order of their α, without a loss."""

    by_savings = True


def architecture(trained: Trained, epoch: int | None = None) -> Architecture:
    """The architecture that a search found; a measurement keeps it beside the search's record.

    At the end, the last step's gates are opened again as far as the budget allows.

    Args:
        epoch: of the search: the channels that were open after it; None for the end.

    Raises NothingFound where the search ended above its budget, or nothing is left of the network;
    ValueError for an epoch that the search did not have.
    """
    if epoch is None:
        _check_end(trained)
    elif trained.epochs < epoch < trained.run.recipe.epochs:
        raise ValueError(f"{trained.run} ended in epoch {trained.epochs}, before epoch {epoch}.")
    table = measure(trained, kept_channels, epoch=epoch)
    return Architecture(trained.run.model, tuple(zip(table.layer, table.kept, strict=True)))


def _check_end(trained: Trained) -> None:
    budget, share = trained.run.method.budget, trained.final["macs_share"]
    if share > budget:
        raise NothingFound(
            f"{trained.run} ended at {share:.1%} of the teacher's multiply-accumulates, above its "
            f"budget of {budget:.1%}. Give it more epochs or a larger strength."
        )
    if share == 0:
        raise NothingFound(
            f"{trained.run} closed all gates of a layer that all later layers depend on: nothing "
            f"is left of the network. Give it a smaller strength."
        )


def kept_channels(trained: Trained, epoch: int | None) -> pd.DataFrame:
    """The kept input channels of every gated layer: columns layer, kept (a list of 0 and 1).

    Args:
        epoch: of the search; None for its last.
    """
    import pandas as pd  # `import kdlib` needs no pandas

    gates = searched_modules(trained, epoch)["gates"]
    found = Architecture.of(trained.run.model, gates.channels, gates.kept())
    return pd.DataFrame(found.kept, columns=["layer", "kept"])


kept_channels.version = 2


def extract(trained: Trained) -> Staged:
    """The network that a search found, with its weights from the search, multiplied by the gates.

    In eval mode and frozen; its logits equal those of the gated network. Raises StoreError without
    the search's weights.
    """
    modules = searched_modules(trained)
    student, gates = modules["student"], modules["gates"]
    merged = copy.deepcopy(student)
    load_weights(merged, merged.state_dict() | gates(student))
    found = prune(merged, gates.channels, gates.kept())
    return found.eval().requires_grad_(False)


def searched_modules(trained: Trained, epoch: int | None = None) -> nn.ModuleDict:
    """The ``student`` and the ``gates`` of a search after ``epoch``.

    None for its end, where ``Gates.reopen`` has made up for a last step that went too far.
    """
    run = trained.run
    at = run.recipe.epochs if epoch is None else epoch
    images = load_data(run.dataset).first(run.images)
    modules = trained_modules(run, at, images, trained.summary["weights"].get(str(at)))
    if epoch is None:
        gates = modules["gates"]
        gates.reopen(int(run.method.budget * gates.channels.total_macs))
    return modules


def channels_of(run: Run) -> Channels:
    """Which layer reads which channels in a run's network, and what that costs."""
    images = load_data(run.dataset, "test")
    network = build_model(run.model, images.classes, images.channels, seed=0)
    return Channels(network, images.size)
