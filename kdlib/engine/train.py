"""train(runs): load the runs that the store has, train the others, teachers first."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch

from kdlib import store
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.deadline import Deadline, until
from kdlib.engine.device import asked_parallel, pick_device, prepare
from kdlib.engine.graph import incomplete, next_level
from kdlib.engine.pool import TrainerPool
from kdlib.engine.progress import Progress
from kdlib.errors import NotFinite, NothingFound, OutOfTime, StoreError
from kdlib.runs import Run
from kdlib.store import Trained

CACHES = CachePool()


class RunChain(Protocol):
    """A chain of runs, each known only when the one before it is trained.

    Attributes:
        tolerant: ``next_run`` is asked also after a run whose loss was not finite, with None. The
            chain ends where it names such a run again.
    """

    tolerant: bool = False

    def next_run(self, trained: Trained | None) -> Run | None:
        """The run after ``trained``; the first run if that is None. None after the last run.

        Raises StoreError where weights or logits are missing, NothingFound where the chain ends
        here without a result.
        """

    def needs(self, run: Run) -> list[Run]:
        """The runs whose weights or logits decide which run follows ``run``."""

    def estimate(self) -> list[Run]:
        """Runs that cost about as much as the chain, for a forecast."""


def train(
    runs: Iterable[Run | RunChain] | Mapping[Any, Iterable[Run | RunChain]],
    device: str | torch.device | None = None,
    parallel: int | None = None,
    weights: bool = False,
    partial: bool = False,
    deadline: Deadline | None = None,
    then: Callable[[Trained], object] | None = None,
    retry: bool = True,
) -> list[Trained | None] | dict[Any, list[Trained | None]]:
    """Train the runs that neither the store nor the committed records have; one result per run.

    A mapping of rows to runs gives a mapping of rows to results; all runs are trained in one call.
    A chain is trained run by run beside the others; its result is that of its last run.

    The teachers of a run are trained before it, and only if the run has to be trained. Several
    processes may share a store: each run is trained by one of them while the others wait.

    Args:
        device: ``cpu``, ``cuda``, …; None takes a GPU if there is one.
        parallel: students that train at a time; None takes ``$KDLIB_PARALLEL``, else 1 on a CPU
            and 16 on a GPU. Fewer where memory runs out.
        weights: train also runs of which only a record exists.
        partial: return None for runs that failed, and warn, instead of raising NotFinite or
            NothingFound.
        then: called with each result, as soon as its run is trained; for measurements that need
            weights. It is called once for a run that was trained before, too.
        deadline: stop then, in time, with all that was trained saved; the same call continues.
        retry: train also runs whose loss was not finite in an earlier call. False counts them as
            failed.

    Raises:
        OutOfTime: at the deadline, if runs are left. It is raised with ``partial`` too.
        NotFinite: a loss was infinite or not a number.
        NothingFound: a chain ended without a result. It and NotFinite are raised only after all
            other runs are trained.
        StoreError, DataError: a file cannot be read or written. The message says what to do.
    """
    if isinstance(runs, Mapping):
        rows = {row: list(members) for row, members in runs.items()}
        members = chain(*rows.values())
        results = iter(train(members, device, parallel, weights, partial, deadline, then, retry))
        return {row: [next(results) for _ in members] for row, members in rows.items()}
    device = pick_device(device)
    items, session = [*runs], _Session(device, asked_parallel(parallel, device), then, retry)
    session.results = {item.id for item in items if isinstance(item, Run)}
    prepare(device)
    try:
        with until(deadline):
            runs, unfound = session.follow(items, weights)
            session.ensure(runs, weights)
    except OutOfTime:
        session.report({}, partial=True)
        raise
    failed = {*unfound, *(k for k, run in enumerate(runs) if run.id in session.failures)}
    good = [run for k, run in enumerate(runs) if k not in failed]
    session.results |= {run.id for run in good}
    for run in good:
        session.tell(run)
    session.report(unfound, partial)
    return [None if k in failed else store.find_record(run) for k, run in enumerate(runs)]


class _Session:
    """One call of ``train``.

    Attributes:
        failures: one error for each failed run, by its id. A run fails, too, if it would learn
            from a failed run.
        results: the ids of the runs that ``then`` is called with.
    """

    def __init__(self, device: torch.device, parallel: int, then: Callable | None, retry: bool):
        self.device, self.parallel, self.then, self.retry = device, parallel, then, retry
        self.failures: dict[str, NotFinite] = {}
        self.results: set[str] = set()
        self._told: set[str] = set()

    def tell(self, run: Run) -> None:
        """Call ``then`` with a trained run, once."""
        if self.then and run.id in self.results - self._told:
            self._told.add(run.id)
            self.then(store.find_record(run))

    def follow(
        self, items: list[Run | RunChain], weights: bool
    ) -> tuple[list[Run], dict[int, NothingFound]]:
        """Follow all chains to their ends: the last runs, and errors of chains by their place."""
        chains = {k: item for k, item in enumerate(items) if not isinstance(item, Run)}
        runs = [item.next_run(None) if k in chains else item for k, item in enumerate(items)]
        unfound: dict[int, NothingFound] = {}
        while chains:
            self.ensure(runs, weights)
            for k, run_chain in [*chains.items()]:
                after = None
                if runs[k].id not in self.failures or getattr(run_chain, "tolerant", False):
                    try:
                        after = self._next_run(run_chain, runs[k])
                    except NothingFound as error:
                        unfound[k] = error
                if after and after.id not in self.failures:
                    runs[k] = after
                else:
                    del chains[k]
        return runs, unfound

    def _next_run(self, run_chain: RunChain, run: Run) -> Run | None:
        before = store.find_record(run)
        try:
            return run_chain.next_run(before)
        except StoreError:  # a clone with records alone: train the runs that the chain needs
            self.ensure([run, *run_chain.needs(run)], weights=True)
        after = store.find_record(run)
        unchanged = all(before.summary[k] == after.summary[k] for k in ("weights", "teachers"))
        # Other weights may lead to other choices, from the first on.
        return run_chain.next_run(after if unchanged else None)

    def ensure(self, runs: list[Run], weights: bool) -> None:
        """Train all of these runs that are incomplete, teachers first.

        The graph is read again when runs have ended, since a teacher that was trained again makes
        its students incomplete.
        """
        if not (everything := incomplete(runs, weights, {})):
            return
        progress = Progress(sum(run.recipe.epochs for run in everything))
        ready = partial(next_level, runs, weights, self.failures)
        pool = TrainerPool(
            *(self.device, self.parallel, CACHES, progress),
            *(ready, everything, self.failures, self.retry, self.tell),
        )
        try:
            while pool.train():
                pass
        finally:
            progress.close()

    def report(self, unfound: Mapping[int, NothingFound], partial: bool) -> None:
        """Raise or warn of what failed, when all other runs are trained."""
        errors = [*{str(e): e for e in [*self.failures.values(), *unfound.values()]}.values()]
        if errors and not partial:
            for other in errors[1:]:
                errors[0].add_note(str(other))
            raise errors[0]
        for error in errors:
            warnings.warn(str(error), stacklevel=3)
