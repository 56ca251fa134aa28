"""Train a recorded run again, from its record alone, and compare every bit.

A training is repeated on the kind of device, with the threads and the precision of its record. On
a CPU like the recorded one it then gives the same bits.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import torch

from kdbook.recorded import Recorded
from kdlib import train
from kdlib.data import canonical_name, load_data, split_name
from kdlib.engine.deadline import Deadline
from kdlib.engine.train import CACHES
from kdlib.errors import DataError
from kdlib.models.architecture import MARK, load_architecture
from kdlib.runs import Run
from kdlib.store import Trained

# What decides the bits of a training, in a record's description of its machine.
DECIDING = (
    "device",
    "instructions",
    "threads",
    "precision",
    "label_precision",
    "compiled",
    "torch",
)
# Parts of a summary that are measured or compared in another way.
MEASURED = {"seconds", "environment", "earlier_environments", "weights"}


# --- the place and the conditions -----------------------------------------------------------------


@contextmanager
def setting(**variables: str) -> Iterator[None]:
    """Set these variables of the environment inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def fresh_store(recorded: Iterable[Recorded]) -> Iterator[Path]:
    """Work inside with an empty store and without any record, in a temporary folder.

    Only the architectures that the recorded runs name are there: they are part of the description.
    """
    named = {run.model for record in recorded for run in record.ancestry if MARK in run.model}
    architectures = [load_architecture(name) for name in sorted(named)]
    with tempfile.TemporaryDirectory(prefix="kdlib-verify-") as name:
        folder = Path(name)
        places = {"KDLIB_HOME": f"{folder / 'runs'}", "KDLIB_RESULTS": f"{folder / 'results'}"}
        with setting(**places):
            CACHES.clear()
            for architecture in architectures:
                architecture.save()
            yield folder
            CACHES.clear()


def check_data(recorded: Recorded, given: Mapping[str, str]) -> None:
    """Raise DataError where a data set of the run or of an ancestor is not on this machine.

    Args:
        given: the reader's data sets, as ``--data`` names them.
    """
    folders = [canonical_name(own) for own in given.values()]
    for name in sorted({split_name(run.dataset)[0] for run in recorded.ancestry}):
        base, _, content = name.partition("@")
        if not content:
            load_data(name)
        elif name not in folders:
            others = f" Given: {', '.join(folders)}." if folders else ""
            raise DataError(
                f"{recorded.run} needs the image folder {base!r} with the hash {content}; where it "
                f"lies is not known. Add --data NAME=folder:PATH, such as "
                f"--data cifar10=folder:../{base}. The folder needs this name and the same "
                f"images.{others}"
            )


@contextmanager
def as_recorded(environment: Mapping) -> Iterator[torch.device]:
    """Train inside as a record says, as far as this machine can; the device to train on.

    Precision is left to the engine where training and labels differ on a CPU, and where a GPU is
    recorded but none is here.
    """
    on_gpu = not environment["device"].endswith("CPU")
    device = torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")
    precision = environment["precision"]
    labels = environment.get("label_precision")
    like = (device.type == "cuda") == on_gpu
    asked = precision if like and (on_gpu or labels in (None, precision)) else ""
    compiled = "always" if environment.get("compiled") and like else "never"
    threads = torch.get_num_threads()
    torch.set_num_threads(environment["threads"])
    CACHES.clear()  # logits that were computed in other conditions
    try:
        with setting(
            KDLIB_PRECISION=asked,
            KDLIB_COMPILE=compiled,
            KDLIB_DETERMINISTIC="1" if on_gpu else "0",
        ):
            yield device
    finally:
        torch.set_num_threads(threads)


# --- comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A recorded run beside the same run, trained again.

    Attributes:
        recorded: None for an ancestor without a committed record.
        alike: whether the training should repeat the recorded bits, see ``repeats``; and so should
            those of its ancestors.
        since: the first epoch whose row of the log differs; None where all are equal.
        columns: the largest difference in each column of the log that differs.
        weights: the epochs whose weights differ; None where they cannot be compared.
        others: other parts of the summary that differ, such as the teachers.
    """

    run: Run
    recorded: Recorded | None
    trained: Trained
    alike: bool
    since: int | None = None
    columns: Mapping[str, float] = field(default_factory=dict)
    weights: tuple[int, ...] | None = ()
    others: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return self.since is None and not (self.weights or self.others)


def compare(recorded: Recorded, trained: Trained, alike: bool = True) -> Comparison:
    """Compare log, fingerprints of weights, and the rest of two records of a run.

    Columns and parts that the committed record does not have do not count.
    """
    since, columns = None, {}
    for old, new in zip_longest(recorded.rows, trained.rows, fillvalue={}):
        for name in [n for n in old or new if n != "seconds" and _differ(old.get(n), new.get(n))]:
            since = since or (old or new)["epoch"]
            distance = abs(old.get(name, math.inf) - new.get(name, math.inf))
            distance = math.inf if math.isnan(distance) else distance
            columns[name] = max(columns.get(name, 0.0), distance)
    weights, before, now = None, recorded.summary["weights"], trained.summary["weights"]
    # Before records had the curve, it lay beside the weights and was hashed with them.
    if not recorded.run.method.curve or "curve" in recorded.summary:
        weights = tuple(sorted(int(e) for e in before if before[e] != now.get(e)))
    parts = recorded.summary.keys() - MEASURED
    return Comparison(
        run=recorded.run,
        recorded=recorded,
        trained=trained,
        alike=alike and repeats(recorded.summary, trained.summary["environment"]),
        since=since,
        columns=columns,
        weights=weights,
        others=tuple(sorted(p for p in parts if recorded.summary[p] != trained.summary.get(p))),
    )


def _differ(old: float | None, new: float | None) -> bool:
    return old != new and not (old != old and new != new)  # two values that are no number are equal


def repeats(summary: Mapping, here: Mapping) -> bool:
    """Whether a training on the machine ``here`` should repeat the recorded bits.

    Not on a GPU: a record does not say whether its kernels were the same in every run. Older
    records lack some parts of the description; these do not count.
    """
    machines = [*summary.get("earlier_environments", ()), summary["environment"]]
    same = all(m[part] == here[part] for m in machines for part in DECIDING if part in m)
    return same and here["device"].endswith("CPU")


# --- training again -------------------------------------------------------------------------------


def retrain(
    recorded: Recorded, records: Mapping[str, Recorded], deadline: Deadline | None = None
) -> Iterator[Comparison]:
    """Train a recorded run and its ancestors again, parents first; compare each with its record.

    Works in the present store: what it has is not trained again. An ancestor without a record is
    trained like the run, and the run's summary names its weights.

    Args:
        records: the committed records by the id of their run.

    Raises OutOfTime at the deadline.
    """
    unlike: set[str] = set()  # runs that another machine has trained, and their students
    for run in recorded.ancestry:
        own = records.get(run.id)
        if own:
            keep, logits = {*run.keep, *own.run.keep}, run.save_logits or own.run.save_logits
            run = replace(run, keep=tuple(keep), save_logits=logits)
        with as_recorded((own or recorded).environment) as device:
            (trained,) = train([run], device, weights=True, deadline=deadline)
        alike = not any(parent.id in unlike for parent, _ in run.parents)
        found = compare(own, trained, alike) if own else Comparison(run, None, trained, alike)
        if not found.alike:
            unlike.add(run.id)
        yield found
