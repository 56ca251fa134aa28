"""The graph of runs: students after their teachers, and the part of it that is left to train."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter

from kdlib import store
from kdlib.errors import StoreError
from kdlib.runs import Checkpoint, Run


def ancestry(runs: Iterable[Run]) -> list[Run]:
    """These runs and all that they learn or start from, each once, parents first.

    Each run keeps the checkpoints and the logits that any declaration of it asks for, and the
    checkpoints that its children need.
    """
    graph = _walk(runs)
    return [graph[name].merged for name in _order(graph)]


def next_level(runs: Iterable[Run], weights: bool, failures: dict[str, Exception]) -> list[Run]:
    """The runs to train next for ``runs``: they are incomplete, and all their parents complete.

    Args:
        weights: as for ``train``; of the parents of an incomplete run weights are always needed.
        failures: errors of runs that cannot be trained, by id. The runs that depend on them are
            added.
    """
    graph, missing = _incomplete(list(runs), weights, {})
    for name in _order(graph):
        for parent in graph[name].parents & failures.keys():
            failures.setdefault(name, failures[parent])
    missing -= failures.keys()
    return [n.merged for name, n in graph.items() if name in missing and not n.parents & missing]


def incomplete(runs: Iterable[Run], weights: bool, known: dict[tuple, bool]) -> list[Run]:
    """The runs that ``train(runs, weights=weights)`` would train.

    Args:
        known: answers of ``is_complete``, shared by several calls while nothing is trained.
    """
    graph, missing = _incomplete(list(runs), weights, known)
    return [node.merged for name, node in graph.items() if name in missing]


def _incomplete(
    runs: list[Run], weights: bool, known: dict[tuple, bool]
) -> tuple[dict[str, _Node], set[str]]:
    """The graph of these runs and of the parents of incomplete ones; the ids of the latter."""
    missing: set[str] = set()
    while True:
        graph = _walk(runs, missing.__contains__)
        found = {
            name
            for name, node in graph.items()
            if not is_complete(node.merged, weights or bool(node.children & missing), known)
        }
        if found <= missing:
            return graph, found
        missing |= found


@dataclass
class _Node:
    """A run of the graph: its edges, and all that any declaration of it asks to keep."""

    run: Run
    keep: set[int] = field(default_factory=set)
    save_logits: bool = False
    parents: set[str] = field(default_factory=set)
    children: set[str] = field(default_factory=set)

    @property
    def merged(self) -> Run:
        return replace(self.run, keep=tuple(self.keep), save_logits=self.save_logits)


def _walk(
    runs: Iterable[Run], descends: Callable[[str], bool] = lambda name: True
) -> dict[str, _Node]:
    """The graph of these runs by id, with the parents of those where ``descends`` holds.

    A run may be declared several times, each with other checkpoints to keep, of its teachers too.
    All are kept.
    """
    graph: dict[str, _Node] = {}
    visited: set[int] = set()
    pending = list(runs)[::-1]
    while pending:
        run = pending.pop()
        node = graph.setdefault(run.id, _Node(run))
        node.keep.update(run.keep)
        node.save_logits |= run.save_logits
        if id(run) in visited or not descends(run.id):
            continue
        visited.add(id(run))
        for parent, epoch in run.parents:
            node.parents.add(parent.id)
            above = graph.setdefault(parent.id, _Node(parent))
            above.children.add(run.id)
            above.keep.add(epoch)
            pending.append(parent)
    return graph


def _order(graph: Mapping[str, _Node]) -> list[str]:
    return [*TopologicalSorter({name: node.parents for name, node in graph.items()}).static_order()]


def by_run(checkpoints: Iterable[Checkpoint]) -> dict[Run, set[int]]:
    """The epochs of checkpoints by their run."""
    epochs: dict[Run, set[int]] = {}
    for run, epoch in checkpoints:
        epochs.setdefault(run, set()).add(epoch)
    return epochs


def is_complete(run: Run, weights: bool, known: dict[tuple, bool] | None = None) -> bool:
    """Whether nothing is left to do for a run.

    There is a record, and the teachers have the weights that it names. A record alone is enough
    where weights are not needed, as in a clone without a store. Where the store has the run, all
    checkpoints that it is asked to keep must be there.

    Args:
        known: answers for other runs, since many students have one teacher.
    """
    known, key = {} if known is None else known, (run.id, run.keep, run.save_logits, weights)
    if key not in known:
        known[key] = _is_complete(run, weights, known)
    return known[key]


def _is_complete(run: Run, weights: bool, known: dict[tuple, bool]) -> bool:
    trained = store.find_record(run)
    if trained is None:
        return False
    if (weights or trained.in_store) and not _is_kept(run, trained):
        return False
    for teacher, epochs in by_run(run.parents).items():
        if (record := store.find_record(teacher)) is None:
            continue
        if not is_complete(teacher, False, known):
            return False
        now, before = record.summary["weights"], trained.summary["teachers"]
        if any(now.get(str(e)) != before.get(f"{teacher.id}@{e}") for e in epochs):
            warnings.warn(
                f"{run} learned from other weights of its teacher {teacher}; it is trained again.",
                stacklevel=2,
            )
            return False
    return True


def _is_kept(run: Run, trained: store.Trained) -> bool:
    """Whether the store has all that the run is asked to keep."""
    if not store.holds_weights(trained, {*run.keep, run.recipe.epochs}):
        return False
    return not run.save_logits or store.holds_logits(trained)


def keeping_all(run: Run) -> Run:
    """A run to train again, asked to keep also what its record in the store keeps."""
    if not (found := store.find_record(run)):
        return run
    warnings.warn(
        f"{run} is trained again: the weights of its teacher changed, or weights or logits "
        f"are needed that are not in the store.",
        stacklevel=2,
    )
    if not found.in_store:
        return run
    keep = (*run.keep, *map(int, found.summary["weights"]))
    return replace(run, keep=keep, save_logits=run.save_logits or "logits" in found.summary)


def refuse_repetition(run: Run) -> None:
    """Raise StoreError if a run that was just trained is incomplete: training would not end."""
    parents = by_run(run.parents).items()
    needed = [replace(parent, keep=(*parent.keep, *epochs)) for parent, epochs in parents]
    lost = [parent for parent in needed if not is_complete(parent, weights=True)]
    trained = store.find_record(run)
    if trained is None or not _is_kept(run, trained):
        lost.append(run)
    if lost:
        raise StoreError(
            f"{lost[0]} was trained, but its checkpoints are not all in {store.folder(lost[0])}: "
            f"something removed them, or kdlib has a defect. Call again to train it again."
        )
