"""Records of trained runs: the description, one line per epoch, a summary."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib import files
from kdlib.errors import StoreError
from kdlib.models import Staged
from kdlib.runs import ENGINE_VERSION, Run
from kdlib.store.weights import folder, load_checkpoint, weights_path

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained run, as its record describes it.

    Attributes:
        rows: one dict per epoch: learning rate, mean training terms, test accuracy in %, …
        summary: fingerprints of the weights by epoch, of the teachers, environment, time.
        in_store: whether the record lies in the store, and not only among committed records.
    """

    run: Run
    rows: list[dict]
    summary: dict
    in_store: bool = True

    @cached_property
    def log(self) -> pd.DataFrame:
        """``rows`` as a table."""
        import pandas as pd  # training needs no pandas

        return pd.DataFrame(self.rows)

    @property
    def epochs(self) -> int:
        """Epochs that the run had: fewer than in its recipe where its method ended it early."""
        return len(self.rows)

    @property
    def epochs_used(self) -> float:
        """The same, where the last epoch counts by the share of its steps."""
        return self.summary.get("stopped_after", self.epochs)

    @property
    def final(self) -> dict:
        """The last epoch's row, and its ``test_error`` in %."""
        return self.rows[-1] | {"test_error": 100 - self.rows[-1]["test_top1"]}

    def model(self, epoch: int | None = None) -> Staged:
        """The network after ``epoch`` epochs (None: at the end), in eval mode, on the CPU.

        Raises StoreError where the store has no such weights, or damaged ones; where only a record
        is there, ``train([run], weights=True)`` makes them. Raises ValueError where the network
        does not work without its auxiliary modules, as that of a search.
        """
        if not self.run.method.standalone:
            raise ValueError(
                f"The student of {self.run} does not work without its auxiliary modules. "
                f"kdlib.chains.found.extract gives the network that a search found."
            )
        epoch = self.run.recipe.epochs if epoch is None else epoch
        model, found = load_checkpoint(self.run, epoch)
        if found != self.summary["weights"].get(str(epoch)):
            raise StoreError(
                f"{weights_path(self.run, epoch)} does not hold the weights that the record of "
                f"{self.run} names. `train([run], weights=True)` makes both again."
            )
        return model


def write_record(run: Run, rows: list[dict], summary: dict) -> None:
    head = {"id": run.id, "engine": ENGINE_VERSION, "run": run.description}
    lines = [json.dumps(line) for line in (head, *rows, {"summary": summary})]
    files.write_atomic(folder(run) / "record.jsonl", "\n".join(lines) + "\n")
    failure_path(run).unlink(missing_ok=True)


def failure_path(run: Run) -> Path:
    """The file with the error of a run whose loss was not finite, until it is trained again."""
    return folder(run) / "not-finite.txt"


def find_record(run: Run) -> Trained | None:
    """A run's record from the store, else from any profile's committed records.

    A damaged record is named in a warning and ignored, so that the run is trained again.
    """
    own = folder(run) / "record.jsonl"
    for path in files.own_or_committed(own, f"{run.id}.jsonl"):
        try:
            return _read_record(run, path, in_store=path == own)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{path} is damaged ({error}) and is ignored; {run} is trained again unless there "
                f"is another copy.",
                stacklevel=2,
            )
    return None


def require_record(run: Run) -> Trained:
    """As ``find_record``. Raises StoreError where there is no record."""
    if (found := find_record(run)) is None:
        raise StoreError(f"There is no record of {run}. `train([run], weights=True)` makes it.")
    return found


def _read_record(run: Run, path: Path, in_store: bool) -> Trained:
    head, *rows, last = map(json.loads, path.read_text().splitlines())
    if head["run"] != json.loads(json.dumps(run.description)):
        raise ValueError("it describes another run")
    expected = math.ceil(last["summary"].get("stopped_after", run.recipe.epochs))
    if [row["epoch"] for row in rows] != list(range(1, expected + 1)):
        raise ValueError("epochs are missing")
    return Trained(run, rows, last["summary"], in_store)
