"""train(runs): load what the store has, train the rest, teachers first."""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import torch
from filelock import Timeout

from kdlib import store
from kdlib.data import load_data
from kdlib.engine.bank import Shelf
from kdlib.engine.budget import label_sweeps
from kdlib.engine.device import keep_large_blocks, pick_device
from kdlib.engine.lane import Lane
from kdlib.engine.progress import Progress
from kdlib.errors import NotFinite, NothingFound, StoreError
from kdlib.methods.distill import Anchor
from kdlib.runs import Run
from kdlib.store import Trained

# On a GPU a step of one small network leaves most of it idle; on a CPU it does not.
GPU_LANES = 8
BANKS = Shelf()
# A bank is kept where it saves at least this share of its teacher's passes for labels.
WORTH = 0.1


class Search(Protocol):
    """A chain of runs of which each is known only when the one before is trained."""

    def following(self, trained: Trained | None) -> Run | None:
        """The first run, for None; the run after this one; None after the last.

        Raises StoreError where weights or logits are missing, NothingFound where the search ends
        here without a result.
        """

    def looks_at(self, run: Run) -> list[Run]:
        """Runs whose weights or logits decide what follows ``run``."""

    def foreseen(self) -> list[Run]:
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
        lanes: how many students train at a time; None takes 1 on a CPU and 8 on a GPU. Fewer where
            memory runs out.
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
    torch.set_flush_denormal(True)
    keep_large_blocks()
    lanes = lanes or (1 if device.type == "cpu" else GPU_LANES)
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
    search: Search, run: Run, device: torch.device, lanes: int, failures: dict[str, NotFinite]
) -> Run | None:
    try:
        return search.following(store.find_record(run))
    except StoreError:  # a clone with records alone: train what the search wants to look at
        _ensure([run, *search.looks_at(run)], device, lanes, weights=True, failures=failures)
        return search.following(store.find_record(run))


def _merge(runs: Iterable[Run]) -> list[Run]:
    """Each run once, keeping the checkpoints that any of its mentions asks for."""
    merged: dict[str, Run] = {}
    for run in runs:
        known = merged.get(run.id, run)
        merged[run.id] = replace(run, keep=(*known.keep, *run.keep), route=known.route or run.route)
    return list(merged.values())


def _ensure(
    mentions: list[Run],
    device: torch.device,
    lanes: int,
    weights: bool,
    failures: dict[str, NotFinite],
) -> None:
    """Train what is missing of these, teachers first.

    A run may be mentioned more than once, with different wishes for what it and its teachers keep.
    Runs that fail, and those that would learn from them, are added to ``failures`` by id.
    """
    runs = _merge(mentions)
    if not (missing := {run.id for run in _incomplete(runs, weights)}):
        return
    parents = _parents([m for m in mentions if m.id in missing])
    _ensure(parents, device, lanes, weights=True, failures=failures)
    for run in runs:
        if failed := [parent.id for parent, _ in run.parents if parent.id in failures]:
            failures[run.id] = failures[failed[0]]
    # looked for again, since a teacher trained anew outdates all its students
    missing = [run for run in _incomplete(runs, weights) if run.id not in failures]
    sweeps = {store.saved_fingerprint(*a): s for a, s in label_sweeps(missing).items()}
    BANKS.expect({teacher for teacher, s in sweeps.items() if not s.worth(WORTH)})
    progress = Progress(sum(run.recipe.epochs for run in missing))
    try:
        while missing:
            for data, images in {(run.data, run.images) for run in missing}:
                together = [r for r in missing if (r.data, r.images) == (data, images)]
                lanes = _train_some(together, device, lanes, progress, weights, failures)
            missing = [run for run in _incomplete(missing, weights) if run.id not in failures]
    finally:
        progress.close()


def _parents(mentions: list[Run]) -> list[Run]:
    """The runs that these learn or start from, asked to keep what is needed of them.

    Of those that are to be trained theirs, too: what one teacher has to keep for a whole chain of
    runs is so known before it is trained.
    """
    parents = []
    for run in mentions:
        for parent, epochs in _by_run(run.parents).items():
            parents.append(replace(parent, keep=(*parent.keep, *epochs)))
    ids = {parent.id for parent in parents}
    parents += [run for run in mentions if run.id in ids]
    missing = {run.id for run in _incomplete(_merge(parents), weights=True)}
    return parents + (_parents([p for p in parents if p.id in missing]) if missing else [])


def _by_run(checkpoints: Iterable[Anchor]) -> dict[Run, set[int]]:
    epochs = defaultdict(set)
    for run, epoch in checkpoints:
        epochs[run].add(epoch)
    return epochs


def _incomplete(runs: list[Run], weights: bool) -> list[Run]:
    known: dict[tuple, bool] = {}
    return [run for run in runs if not _complete(run, weights, known)]


def _complete(run: Run, weights: bool, known: dict[tuple, bool]) -> bool:
    """Whether nothing is left to do: there is a record, and the teachers did not move since.

    A record alone will do where weights are not needed, as in a clone without a store. Where the
    store has the run, all checkpoints that it is asked to keep must be there. ``known`` remembers
    the answers of one pass, since many students have one teacher.
    """
    key = (run.id, run.keep, run.route, weights)
    if key not in known:
        known[key] = _is_complete(run, weights, known)
    return known[key]


def _is_kept(run: Run, trained: Trained) -> bool:
    """Whether the store has all that the run is asked to keep."""
    if not store.holds_weights(trained, {*run.keep, run.recipe.epochs}):
        return False
    return not run.route or store.holds_logits(trained)


def _is_complete(run: Run, weights: bool, known: dict[tuple, bool]) -> bool:
    trained = store.find_record(run)
    if trained is None:
        return False
    if (weights or store.kept_epochs(run)) and not _is_kept(run, trained):
        return False
    for teacher, epochs in _by_run(run.parents).items():
        if (record := store.find_record(teacher)) is None:
            continue
        now, before = record.closing["weights"], trained.closing["teachers"]
        if not _complete(teacher, False, known):
            return False
        if any(now.get(str(e)) != before.get(f"{teacher.id}@{e}") for e in epochs):
            warnings.warn(
                f"{run} learned from other weights of its teacher {teacher}; it is trained again.",
                stacklevel=2,
            )
            return False
    return True


def _refuse_to_go_round(trained: list[Run]) -> None:
    """Raise StoreError where a run that was just trained could only be trained again, and again."""
    parents = _incomplete(_merge(_parents(trained)), weights=True)
    for run in [*parents, *(run for run in trained if not _is_kept(run, store.find_record(run)))]:
        raise StoreError(
            f"{run} was trained, but what it is to keep is not in {store.folder(run)}: somebody "
            f"removed it, or kdlib is at fault. Calling again makes it anew."
        )


def _train_some(
    runs: list[Run],
    device: torch.device,
    lanes: int,
    progress: Progress,
    weights: bool,
    failures: dict[str, NotFinite],
) -> int:
    """Train up to ``lanes`` of the runs that no other process is training.

    Where all of them are being trained elsewhere, wait a little. Nothing waits while it holds a
    lock, so that processes cannot block each other. Returns the number of lanes to go on with.
    """
    with ExitStack() as locks:
        mine = []
        for run in runs:
            if len(mine) == lanes:
                break
            try:
                locks.enter_context(store.lock(run))
            except Timeout:
                continue
            if _incomplete([run], weights):  # it may have been finished while we asked for the lock
                if store.find_record(run):
                    warnings.warn(
                        f"{run} is trained again: its teacher moved, or weights or logits are "
                        f"asked for that are not there.",
                        stacklevel=2,
                    )
                # A route that is trained again keeps what it kept: others label with it.
                kept = (*run.keep, *store.kept_epochs(run))
                mine.append(replace(run, keep=kept, route=run.route or store.kept_logits(run)))
        if not mine:
            time.sleep(0.2)
            return lanes
        try:
            failures.update(_run_lanes(mine, device, progress))
            _refuse_to_go_round([run for run in mine if run.id not in failures])
            return lanes
        except torch.OutOfMemoryError:
            if lanes == 1:
                raise
    # Out of the except block, whose traceback keeps the lanes and their memory alive.
    BANKS.clear()
    torch.cuda.empty_cache()
    warnings.warn(f"Out of memory with {lanes} lanes: {lanes // 2} from now.", stacklevel=2)
    return lanes // 2


def _run_lanes(runs: list[Run], device: torch.device, progress: Progress) -> dict[str, NotFinite]:
    """Train runs of one data set together, each step of every lane in turn.

    Returns by id why a run stopped whose loss left the finite numbers.
    """
    failures: dict[str, NotFinite] = {}
    images = load_data(runs[0].data, "train", device).first(runs[0].images)
    test = load_data(runs[0].data, "test", device)
    BANKS.wanted = {store.saved_fingerprint(*anchor) for anchor in label_sweeps(runs)}
    active = [Lane(run, images, test, BANKS) for run in runs]
    progress.skip(sum(lane.epoch for lane in active))
    try:
        while active:
            for lane in active:
                lane.begin_epoch()
            for step in range(max(lane.steps for lane in active)):
                going = [lane for lane in active if step < lane.steps]
                for lane in going:  # all are under way before the host waits for any
                    lane.advance()
                for lane in going:
                    lane.look()
            for lane in active:
                try:
                    row = lane.end_epoch()
                    images = lane.taken * lane.run.recipe.batch
                    progress.epoch(lane.run, row, images, lane.finished)
                except NotFinite as error:
                    failures[lane.run.id] = error
                    continue
                if lane.finished:
                    lane.close()
                    progress.skip(lane.run.recipe.epochs - lane.epoch)
            active = [n for n in active if not n.finished and n.run.id not in failures]
    finally:
        if device.type == "cuda":  # a graph must not write to memory that was handed on
            torch.cuda.synchronize(device)
    return failures
