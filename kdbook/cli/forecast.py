"""Count the training of a profile before it starts; the runs are read from the notebooks.

python -m kdbook.cli.forecast [PROFILE ...]      all profiles if none is given
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from kdbook.cli.declared import declared_runs
from kdbook.cli.notebooks import Notebook, all_notebooks
from kdbook.profiles import PROFILES
from kdlib import build_model
from kdlib.engine.graph import ancestry
from kdlib.engine.passes import teacher_passes
from kdlib.methods import KDGAN
from kdlib.methods.peers import WithPeer
from kdlib.runs import Run

# Bytes of the logits that a teacher saves after each epoch: 10,000 images, 100 classes, float16.
SAVED_LOGITS = 2_000_000


def estimated_runs(notebook: Notebook, **parameters) -> list[Run]:
    """The runs of a notebook; for a chain, the runs that it is estimated to need."""
    runs: list[Run] = []
    for item in declared_runs(notebook, **parameters):
        runs += [item] if isinstance(item, Run) else item.estimate()
    return runs


@dataclass(frozen=True)
class Forecast:
    """Cost of a set of runs and of all runs that they learn or start from, each counted once.

    Attributes:
        students, teachers: numbers of runs.
        student_epochs, teacher_epochs: passes over the training images to train them.
        peer_epochs: passes that train a second network along with the student, as DML, Rocket
            Launching and KDGAN do. KDGAN's discriminator is small and not counted.
        uncached, cached: forward passes of teachers over the training images, if the teacher runs
            beside every student, and with the cache of the teachers' logits.
        route: bytes of weights and logits of the largest teacher that saves logits.
        disk: bytes of all weights and logits that are kept.
    """

    students: int
    teachers: int
    student_epochs: int
    teacher_epochs: int
    peer_epochs: int
    uncached: int
    cached: float
    route: int
    disk: int


def forecast(runs: Iterable[Run]) -> Forecast:
    everything = ancestry(runs)
    taught_by = {teacher.id for run in everything for teacher, _ in run.teachers}
    epochs = {run.id: run.recipe.epochs for run in everything}
    passes = teacher_passes(everything).values()
    disk = {run.id: _kept_bytes(run) for run in everything}
    return Forecast(
        students=len(epochs.keys() - taught_by),
        teachers=len(taught_by),
        student_epochs=sum(epochs[run] for run in epochs.keys() - taught_by),
        teacher_epochs=sum(epochs[run] for run in taught_by),
        peer_epochs=sum(epochs[run.id] for run in everything if _peer(run)),
        uncached=sum(p.uncached for p in passes),
        cached=sum(p.cached for p in passes),
        route=max((disk[run.id] for run in everything if run.save_logits), default=0),
        disk=sum(disk.values()),
    )


def _peer(run: Run) -> str | None:
    """Name of the network that the method trains along with the student."""
    method = run.method
    while inner := getattr(method, "inner", None):
        method = inner
    if isinstance(method, WithPeer):
        return method.peer
    return method.teacher.model if isinstance(method, KDGAN) else None


def _kept_bytes(run: Run) -> int:
    checkpoints = len({*run.keep, run.recipe.epochs})
    networks = sum(_bytes(model) for model in (run.model, _peer(run)) if model)
    return checkpoints * networks + run.save_logits * run.recipe.epochs * SAVED_LOGITS


@cache
def _bytes(model: str) -> int:
    # The architecture behind the @ is not found yet; it is at most as large as its base.
    network = build_model(model.partition("@")[0], classes=100, seed=0)
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


COLUMNS = (
    *("profile", "students", "epochs", "peer epochs", "teachers", "epochs"),
    *("teacher passes", "cached", "largest route", "disk"),
)


def table(profile_names: Iterable[str], data: dict | None = None) -> str:
    """A text table with one line per profile."""
    rows = [COLUMNS]
    for profile_name in profile_names:
        parameters = {"profile_name": profile_name, "data": data}
        f = forecast(run for n in all_notebooks() for run in estimated_runs(n, **parameters))
        counts = (
            *(f.students, f.student_epochs, f.peer_epochs, f.teachers, f.teacher_epochs),
            *(f.uncached, round(f.cached)),
        )
        sizes = (f"{size / 1e9:,.1f} GB" for size in (f.route, f.disk))
        rows.append((profile_name, *(f"{count:,}" for count in counts), *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in pairs)
        for pairs in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


if __name__ == "__main__":
    print(table(sys.argv[1:] or PROFILES))
