"""train(runs): load what the store has, train the rest, teachers first."""

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Protocol

import torch

from kdlib import store
from kdlib.engine.device import pick_device, prepare
from kdlib.engine.graph import incomplete, merge, parents_of
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.passes import teacher_passes
from kdlib.engine.pool import TrainerPool, Width, asked_parallel
from kdlib.engine.progress import Progress
from kdlib.errors import NotFinite, NothingFound, StoreError
from kdlib.runs import Run
from kdlib.store import Trained

CACHES = CachePool()
# A bank is kept where it saves at least this share of its teacher's passes for labels.
WORTH = 0.1


class Search(Protocol):
    """A chain of runs of which each is known only when the one before is trained."""

    def following(self, trained: Trained | None) -> Run | None:
        """The first run, for None; the run after this one; None after the last.

        Raises StoreError where weights or logits are missing, NothingFound where the search ends
        here without a result.
        """

    def needs(self, run: Run) -> list[Run]:
        """Runs whose weights or logits decide what follows ``run``."""

    def estimate(self) -> list[Run]:
        """What the chain may cost, before anything of it is known."""


def train(
    runs: Iterable[Run | Search] | Mapping[Any, Iterable[Run | Search]],
    device: str | torch.device | None = None,
    lanes: int | None = None,
    weights: bool = False,
    partial: bool = False,
) -> list[Trained | None] | dict[Any, list[Trained | None]]:
    """Train what the store and the committed records do not have yet; return one result per run.

    A mapping of rows to runs gives a mapping of rows to results; all are trained in one go. A
    search of runs is trained run by run beside the others; its result is that of its last run.

    Teachers named by the runs are trained first, and only where a student needs them. Several
    processes may share a store: each run is trained by one of them while the others wait.

    Args:
        device: ``cpu``, ``cuda``, …; None takes a GPU if there is one.
        lanes: how many students train at a time; None takes ``$KDLIB_PARALLEL`` or chooses: 1 on a
            CPU, on a GPU what memory and the measured speed allow. Fewer where memory runs out.
        weights: train also those runs of which only a record is there.
        partial: give None for what failed, and warn, instead of raising NotFinite or NothingFound.

    Raises:
        NotFinite: a loss left the finite numbers.
        NothingFound: a search ended without a result. Both are told when the other runs are done.
        StoreError, DataError: what cannot be read or written, and what to do.
    """
    if isinstance(runs, Mapping):
        rows = {row: list(members) for row, members in runs.items()}
        results = iter(train(chain(*rows.values()), device, lanes, weights, partial))
        return {row: [next(results) for _ in members] for row, members in rows.items()}
    runs, device = list(runs), pick_device(device)
    searches = {k: run for k, run in enumerate(runs) if not isinstance(run, Run)}
    runs = [run.following(None) if k in searches else run for k, run in enumerate(runs)]
    lanes = asked_parallel(lanes)
    prepare(device)
    failures: dict[str, NotFinite] = {}
    without: dict[int, NothingFound] = {}
    while searches:
        _ensure(runs, device, lanes, weights, failures)
        for k, search in [*searches.items()]:
            following = None
            if runs[k].id not in failures:
                try:
                    following = _following(search, runs[k], device, lanes, failures)
                except NothingFound as error:
                    without[k] = error
            if following:
                runs[k] = following
            else:
                del searches[k]
    _ensure(runs, device, lanes, weights, failures)
    # told when all others are done: one that fails does not hold them up
    errors = [*{str(e): e for e in [*failures.values(), *without.values()]}.values()]
    if errors and not partial:
        for other in errors[1:]:
            errors[0].add_note(str(other))
        raise errors[0]
    for error in errors:
        warnings.warn(str(error), stacklevel=2)
    failed = {*without, *(k for k, run in enumerate(runs) if run.id in failures)}
    return [None if k in failed else store.find_record(run) for k, run in enumerate(runs)]


def _following(
    search: Search,
    run: Run,
    device: torch.device,
    lanes: int | None,
    failures: dict[str, NotFinite],
) -> Run | None:
    try:
        return search.following(store.find_record(run))
    except StoreError:  # a clone with records alone: train what the search wants to look at
        _ensure([run, *search.needs(run)], device, lanes, weights=True, failures=failures)
        return search.following(store.find_record(run))


def _ensure(
    mentions: list[Run],
    device: torch.device,
    lanes: int | None,
    weights: bool,
    failures: dict[str, NotFinite],
) -> None:
    """Train what is missing of these, teachers first.

    A run may be mentioned more than once, with different wishes for what it and its teachers keep.
    Runs that fail, and those that would learn from them, are added to ``failures`` by id.
    """
    runs = merge(mentions)
    if not (missing := {run.id for run in incomplete(runs, weights)}):
        return
    parents = parents_of([m for m in mentions if m.id in missing])
    _ensure(parents, device, lanes, weights=True, failures=failures)
    for run in runs:
        if failed := [parent.id for parent, _ in run.parents if parent.id in failures]:
            failures[run.id] = failures[failed[0]]
    # looked for again, since a teacher trained anew outdates all its students
    missing = [run for run in incomplete(runs, weights) if run.id not in failures]
    sweeps = {store.saved_fingerprint(*a): s for a, s in teacher_passes(missing).items()}
    CACHES.expect({teacher for teacher, s in sweeps.items() if not s.worth(WORTH)})
    progress = Progress(sum(run.recipe.epochs for run in missing))
    widths = {(run.data, run.images): Width(device, lanes) for run in missing}
    try:
        while missing:
            for what in {(run.data, run.images) for run in missing}:
                together = [run for run in missing if (run.data, run.images) == what]
                group = TrainerPool(together, device, widths[what], CACHES, progress, weights)
                failures.update(group.train())
            missing = [run for run in incomplete(missing, weights) if run.id not in failures]
    finally:
        progress.close()
