"""train(runs): load what the store has, train the rest, teachers first."""

import time
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace

import torch
from filelock import Timeout

from kdlib import store
from kdlib.data import load_data
from kdlib.engine.bank import Shelf
from kdlib.engine.device import keep_large_blocks, pick_device
from kdlib.engine.lane import Lane
from kdlib.engine.progress import Progress
from kdlib.errors import NotFinite
from kdlib.runs import Run
from kdlib.store import Trained

# On a GPU a step of one small network leaves most of it idle; on a CPU it does not.
GPU_LANES = 8
BANKS = Shelf()


def train(
    runs: Iterable[Run],
    device: str | torch.device | None = None,
    lanes: int | None = None,
    weights: bool = False,
) -> list[Trained]:
    """Train what the store and the committed records do not have yet; return one result per run.

    Teachers named by the runs are trained first, and only where a student needs them. Several
    processes may share a store: each run is trained by one of them while the others wait.

    Args:
        device: ``cpu``, ``cuda``, …; None takes a GPU if there is one.
        lanes: how many students train at a time; None takes 1 on a CPU and 8 on a GPU. Fewer where
            memory runs out.
        weights: train also those runs of which only a record is there.

    Raises:
        NotFinite: a loss left the finite numbers.
        StoreError, DataError: what cannot be read or written, and what to do.
    """
    runs, device = list(runs), pick_device(device)
    torch.set_flush_denormal(True)
    keep_large_blocks()
    lanes = lanes or (1 if device.type == "cpu" else GPU_LANES)
    _ensure(_merge(runs), device, lanes, weights)
    return [store.find_record(run) for run in runs]


def _merge(runs: Iterable[Run]) -> list[Run]:
    """Each run once, keeping the checkpoints that any of its mentions asks for."""
    merged: dict[str, Run] = {}
    for run in runs:
        keep = merged[run.id].keep if run.id in merged else ()
        merged[run.id] = replace(run, keep=(*keep, *run.keep))
    return list(merged.values())


def _ensure(runs: list[Run], device: torch.device, lanes: int, weights: bool) -> None:
    if not (missing := _incomplete(runs, weights)):
        return
    _ensure(_teachers(missing), device, lanes, weights=True)
    missing = _incomplete(runs, weights)  # a teacher trained anew outdates all its students
    progress = Progress(sum(run.recipe.epochs for run in missing))
    failures: dict[str, NotFinite] = {}
    try:
        while missing:
            for data, images in {(run.data, run.images) for run in missing}:
                together = [r for r in missing if (r.data, r.images) == (data, images)]
                lanes = _train_some(together, device, lanes, progress, weights, failures)
            missing = [run for run in _incomplete(missing, weights) if run.id not in failures]
    finally:
        progress.close()
    if failures:  # told when the others are done: one bad run does not hold them up
        first, *others = failures.values()
        for other in others:
            first.add_note(str(other))
        raise first


def _teachers(runs: list[Run]) -> list[Run]:
    """The runs whose checkpoints label these, asked to keep them."""
    anchors = {anchor for run in runs for anchor in run.method.anchors(run.recipe.epochs)}
    return _merge(replace(teacher, keep=(*teacher.keep, epoch)) for teacher, epoch in anchors)


def _incomplete(runs: list[Run], weights: bool) -> list[Run]:
    return [run for run in runs if not _complete(run, weights)]


def _complete(run: Run, weights: bool) -> bool:
    """Whether nothing is left to do: there is a record, and the teachers did not move since.

    A record alone will do where weights are not needed, as in a clone without a store. Where the
    store has the run, all checkpoints that it is asked to keep must be there.
    """
    trained = store.find_record(run)
    if trained is None:
        return False
    needed = {*run.keep, run.recipe.epochs} if weights or store.kept_epochs(run) else set()
    if not store.holds_weights(trained, needed):
        return False
    for teacher, epoch in run.method.anchors(run.recipe.epochs):
        record = store.find_record(teacher)
        now = record and record.closing["weights"].get(str(epoch))
        before = trained.closing["teachers"].get(f"{teacher.id}@{epoch}")
        if record and (now != before or not _complete(teacher, weights=False)):
            warnings.warn(
                f"{run} learned from other weights of its teacher {teacher}; it is trained again.",
                stacklevel=2,
            )
            return False
    return True


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
            if not _complete(run, weights):  # it may have been finished while we asked for the lock
                # A route that is trained again keeps what it kept: others label with it.
                mine.append(replace(run, keep=(*run.keep, *store.kept_epochs(run))))
        if not mine:
            time.sleep(0.2)
            return lanes
        try:
            failures |= _run_lanes(mine, device, progress)
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
    anchors = {anchor for run in runs for anchor in run.method.anchors(run.recipe.epochs)}
    BANKS.wanted = {store.saved_fingerprint(teacher, epoch) for teacher, epoch in anchors}
    active = [Lane(run, images, test, BANKS) for run in runs]
    progress.skip(sum(lane.epoch for lane in active))
    try:
        while active:
            for lane in active:
                lane.begin_epoch()
            for step in range(max(lane.steps for lane in active)):
                for lane in active:
                    if step < lane.steps:
                        lane.advance()
            for lane in active:
                try:
                    progress.epoch(lane.run, lane.end_epoch())
                except NotFinite as error:
                    failures[lane.run.id] = error
                if lane.finished:
                    lane.close()
            active = [n for n in active if not n.finished and n.run.id not in failures]
    finally:
        if device.type == "cuda":  # a graph must not write to memory that was handed on
            torch.cuda.synchronize(device)
    return failures
