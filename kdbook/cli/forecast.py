"""What a profile will train, read off the notebooks before anything is trained.

python workflow/forecast.py [PROFILE ...]      all profiles without arguments
"""

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import book
from declared import asked_for

import kdlib
from kdbook.profiles import PROFILES
from kdlib.engine.passes import ancestry, teacher_passes
from kdlib.runs import Run

# What one epoch of a route adds to weights: half-precision logits of 10,000 images, 100 classes.
ROUTE_LOGITS = 2_000_000


def declared(notebook: book.Notebook, **parameters) -> list[Run]:
    """The runs of a notebook's call of ``train``, those of a search as it foresees them."""
    runs: list[Run] = []
    for item in asked_for(notebook, **parameters):
        runs += [item] if isinstance(item, Run) else item.estimate()
    return runs


@dataclass(frozen=True)
class Forecast:
    """What a set of runs costs, each counted once, and their teachers with them.

    Attributes:
        students, teachers: how many runs.
        student_epochs, teacher_epochs: passes over the training images that train them.
        live, banked: passes of teachers that label, beside every student or with the label bank.
        route: bytes of the largest teacher's route, weights and logits.
        disk: bytes of all weights kept, and of logits along routes.
    """

    students: int
    teachers: int
    student_epochs: int
    teacher_epochs: int
    live: int
    banked: float
    route: int
    disk: int


def forecast(runs: Iterable[Run]) -> Forecast:
    runs = list(runs)
    everything = ancestry(runs)
    labelling = {t.id for run in everything for t, _ in run.teachers}
    teachers = [run for run in everything if run.id in labelling]
    students = [run for run in everything if run.id not in labelling]
    sweeps = teacher_passes(students).values()
    kept, routes = _kept(runs)
    disk = {
        run.id: len(kept[run.id] | {run.recipe.epochs}) * _bytes(run.model)
        + (run.id in routes) * run.recipe.epochs * ROUTE_LOGITS
        for run in everything
    }
    return Forecast(
        students=len(students),
        teachers=len(teachers),
        student_epochs=sum(run.recipe.epochs for run in students),
        teacher_epochs=sum(run.recipe.epochs for run in teachers),
        live=sum(s.live for s in sweeps),
        banked=sum(s.banked for s in sweeps),
        route=max((disk[run] for run in routes), default=0),
        disk=sum(disk.values()),
    )


def _kept(runs: Iterable[Run]) -> tuple[dict[str, set[int]], set[str]]:
    """Kept epochs by run, its own and those that others learn or start from; runs with a route."""
    kept: dict[str, set[int]] = defaultdict(set)
    routes, visited, pending = set(), set(), list(runs)
    while pending:
        run = pending.pop()
        kept[run.id].update(run.keep)
        routes |= {run.id} if run.route else set()
        for parent, epoch in () if run.id in visited else run.parents:
            kept[parent.id].add(epoch)
            pending.append(parent)
        visited.add(run.id)
    return kept, routes


@cache
def _bytes(model: str) -> int:
    network = kdlib.build_model(model, classes=100, seed=0)
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def table(profiles: Iterable[str], data: dict | None = None) -> str:
    """One line per profile."""
    heads = ("profile", "students", "epochs", "teachers", "epochs", "sweeps live", "banked")
    heads += ("a route", "all on disk")
    rows = [heads]
    for profile in profiles:
        runs = [run for n in book.notebooks() for run in declared(n, profile=profile, data=data)]
        f = forecast(runs)
        counts = (
            f.students,
            f.student_epochs,
            f.teachers,
            f.teacher_epochs,
            f.live,
            round(f.banked),
        )
        sizes = (f"{size / 1e9:,.1f} GB" for size in (f.route, f.disk))
        rows.append((profile, *(f"{count:,}" for count in counts), *sizes))
    widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
    return "\n".join(
        "  ".join(cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in pairs)
        for pairs in (enumerate(zip(row, widths, strict=True)) for row in rows)
    )


if __name__ == "__main__":
    print(table(sys.argv[1:] or PROFILES))
