"""Committed records: the runs that they describe, which exhibit uses them, and a choice of some."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from kdbook.profiles import PROFILES
from kdlib import files, methods
from kdlib.engine.graph import ancestry
from kdlib.errors import StoreError, UnknownName
from kdlib.runs import Method, Recipe, Run

CLASSES = {"Run": Run, "Recipe": Recipe} | {
    name: kind
    for name, kind in vars(methods).items()
    if isinstance(kind, type) and issubclass(kind, Method)
}
# A short run is one of the first quarter, by its cost, and of the first few.
QUARTER, FEW = 4, 3


def rebuild(description: Any) -> Any:
    """The object that ``kdlib.description.describe`` has described. Runs no code but kdlib's.

    Raises ValueError for a class that kdlib does not have.
    """
    if isinstance(description, list):
        return tuple(map(rebuild, description))
    if not isinstance(description, dict):
        return description
    if (kind := description["kind"]) not in CLASSES:
        raise ValueError(f"kdlib has no {kind}")
    return CLASSES[kind](**{k: rebuild(v) for k, v in description.items() if k != "kind"})


@dataclass(frozen=True, eq=False)
class Recorded:
    """A committed record.

    Attributes:
        run: rebuilt from the record's description; it keeps what the recorded run has kept.
        rows, summary: as in ``Trained``.
    """

    path: Path
    run: Run
    rows: list[dict]
    summary: dict

    @cached_property
    def ancestry(self) -> list[Run]:
        """The run's ancestors, parents first, and the run."""
        return ancestry([self.run])

    @property
    def environment(self) -> dict:
        return self.summary["environment"]

    def seconds(self, records: Mapping[str, "Recorded"], done: Iterable[str] = ()) -> float:
        """Seconds that the run and its ancestors took, as recorded, but those that are done.

        An ancestor without a record counts as many seconds for an epoch as the run itself.
        """
        own = self.summary["seconds"] / len(self.rows)
        return sum(
            records[run.id].summary["seconds"] if run.id in records else own * run.recipe.epochs
            for run in self.ancestry
            if run.id not in {*done}
        )


def read(path: Path) -> Recorded:
    """A committed record. Raises StoreError where it is damaged or describes another run."""
    try:
        head, *rows, last = map(json.loads, path.read_text().splitlines())
        summary = last["summary"]
        keep, logits = (*map(int, summary["weights"]),), "logits" in summary
        run = rebuild(head["run"] | {"keep": keep, "save_logits": logits})
        if not run.id == head["id"] == path.stem:
            raise ValueError(f"it describes the run {run.id}")
        expected = math.ceil(summary.get("stopped_after", run.recipe.epochs))
        if [row["epoch"] for row in rows] != list(range(1, expected + 1)):
            raise ValueError("epochs are missing")
        return Recorded(path, run, rows, summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be trained again: {error}.") from error


class Records:
    """The records of some folders of results.

    Args:
        profile: the folder of a profile, or a profile's name for all its folders; None for every
            folder with records, but those of a profile that is no evidence.

    Attributes:
        by_id: the records by the id of their run.
        by_exhibit: the ids of the runs with a record, by exhibit.

    Raises UnknownName where no such folder has records, StoreError for a damaged record.
    """

    def __init__(self, profile: str | None = None):
        folders = sorted({path.parent.parent for path in files.results().glob("*/records/*.jsonl")})
        self.folders = [folder for folder in folders if _belongs(folder.name, profile)]
        if not self.folders:
            names = [folder.name for folder in folders]
            if profile and names:
                raise UnknownName("folder of results with records", profile, names)
            raise StoreError(f"{files.results()} has no folder with records.")
        paths = (path for folder in self.folders for path in sorted(folder.glob("records/*.jsonl")))
        self.by_id = {path.stem: read(path) for path in paths}
        self.by_exhibit: dict[str, set[str]] = defaultdict(set)
        for folder in self.folders:
            for path in folder.glob("*/*/*.json"):
                about = json.loads(path.read_text())
                self.by_exhibit[about["exhibit"]] |= self.by_id.keys() & {*about["runs"]}

    def exhibits_of(self, run: Run) -> list[str]:
        """The exhibits that use a run."""
        return sorted(exhibit for exhibit, ids in self.by_exhibit.items() if run.id in ids)

    def of(self, name: str, exhibits: Iterable[str]) -> list[Recorded]:
        """The records of an exhibit, or the record of the run with this id; sorted by id.

        Raises UnknownName where ``exhibits``, the names of all exhibits, do not have the name;
        StoreError for an exhibit without records.
        """
        if name in self.by_id:
            return [self.by_id[name]]
        if name not in exhibits:
            raise UnknownName("exhibit or recorded run", name, exhibits)
        if not self.by_exhibit.get(name):
            where = " and ".join(map(str, self.folders))
            others = ", ".join(sorted(e for e, ids in self.by_exhibit.items() if ids)) or "none"
            raise StoreError(
                f"{name} has no records in {where}, so nothing can be trained again. "
                f"Exhibits with records: {others}."
            )
        return [self.by_id[run_id] for run_id in sorted(self.by_exhibit[name])]

    def a_short_one(self, among: Iterable[Recorded], random: Random) -> Recorded:
        """One of the least costly of these records, at random."""
        by_cost = sorted(among, key=lambda r: (r.seconds(self.by_id), r.run.id))
        return random.choice(by_cost[: max(FEW, len(by_cost) // QUARTER)])

    def shuffled(self, among: Iterable[Recorded], random: Random) -> list[Recorded]:
        """All of these records at random, each once, a short one first."""
        found = sorted({r.run.id: r for r in among}.values(), key=lambda r: r.run.id)
        first = self.a_short_one(found, random)
        random.shuffle(found)
        return [first, *(record for record in found if record is not first)]


def _belongs(folder: str, profile: str | None) -> bool:
    name = folder.partition("+")[0]
    if profile is None:
        return name not in PROFILES or PROFILES[name].evidence
    return profile in (folder, name)
