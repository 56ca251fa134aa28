"""What of some runs is left to train, by the store and the committed records."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from kdlib import store
from kdlib.errors import StoreError
from kdlib.methods.distill import Anchor
from kdlib.runs import Run
from kdlib.store import Trained


def merge(runs: Iterable[Run]) -> list[Run]:
    """Each run once, keeping the checkpoints that any of its mentions asks for."""
    merged: dict[str, Run] = {}
    for run in runs:
        known = merged.get(run.id, run)
        merged[run.id] = replace(run, keep=(*known.keep, *run.keep), route=known.route or run.route)
    return list(merged.values())


def parents_of(mentions: list[Run]) -> list[Run]:
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
    missing = {run.id for run in incomplete(merge(parents), weights=True)}
    return parents + (parents_of([p for p in parents if p.id in missing]) if missing else [])


def _by_run(checkpoints: Iterable[Anchor]) -> dict[Run, set[int]]:
    epochs = defaultdict(set)
    for run, epoch in checkpoints:
        epochs[run].add(epoch)
    return epochs


def incomplete(runs: Iterable[Run], weights: bool) -> list[Run]:
    """Those of the runs that something is left to do of; with ``weights`` a record will not do."""
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
        now, before = record.summary["weights"], trained.summary["teachers"]
        if not _complete(teacher, False, known):
            return False
        if any(now.get(str(e)) != before.get(f"{teacher.id}@{e}") for e in epochs):
            warnings.warn(
                f"{run} learned from other weights of its teacher {teacher}; it is trained again.",
                stacklevel=2,
            )
            return False
    return True


def refuse_to_go_round(run: Run) -> None:
    """Raise StoreError where a run that was just trained could only be trained again, and again."""
    lost = incomplete(merge(parents_of([run])), weights=True)
    if not _is_kept(run, store.find_record(run)):
        lost.append(run)
    if lost:
        raise StoreError(
            f"{lost[0]} was trained, but what it is to keep is not in {store.folder(lost[0])}: "
            f"somebody removed it, or kdlib is at fault. Calling again makes it anew."
        )
