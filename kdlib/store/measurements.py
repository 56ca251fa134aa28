"""Measurements: small tables computed from trained models, and kept beside their records."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

from kdlib import files
from kdlib.models.architecture import MARK, file_of, load_architecture
from kdlib.store.records import Trained
from kdlib.store.weights import folder

if TYPE_CHECKING:
    import pandas as pd

# Names of the measurement files that this process has read or written, by the id of their run.
_used: dict[str, set[str]] = defaultdict(set)
# The code of every function that was measured in this process, by name and version.
_measured: dict[tuple[str, int], CodeType] = {}


def measure(
    trained: Trained | Sequence[Trained], fn: Callable[..., pd.DataFrame], **options
) -> pd.DataFrame:
    """``fn(trained, **options)``, a small table, computed once and kept beside the run's record.

    The key is the function's name and its ``version`` (an attribute, 1 where there is none), the
    options, and the last weights of the run and of its teachers. If you change the result of a
    function, raise its version.

    Args:
        trained: one run; or several for ``fn(first, second, …, **options)``, whose table is kept
            beside the first.
        options: plain JSON.

    Raises ValueError for a lambda, and for two functions with one name and version.
    """
    several = [trained] if isinstance(trained, Trained) else list(trained)
    first = several[0].run
    key = (getattr(fn, "__name__", "<lambda>"), getattr(fn, "version", 1))
    if key[0] == "<lambda>" or _measured.setdefault(key, fn.__code__) != fn.__code__:
        raise ValueError(
            f"Version {key[1]} of {key[0]} names no measurement, or another one. Give the function "
            f"a name of its own, or a new number as its attribute `version`."
        )
    name = measurement_name(several, *key, options)
    own = folder(first) / name
    _used[first.id].add(name)
    for path in files.own_or_committed(own, f"{first.id}.{name}"):
        try:
            return _read_table(path.read_text())
        except (OSError, ValueError, KeyError, TypeError):
            continue  # absent or damaged: computed again
    text = json.dumps(fn(*several, **options).to_dict(orient="split", index=False))
    files.write_atomic(own, text)
    return _read_table(text)


def measurement_name(several: Sequence[Trained], function: str, version: int, options: dict) -> str:
    """The name of the file that holds a measurement."""
    weights = [
        [t.summary["weights"][str(t.run.recipe.epochs)], t.summary["teachers"]] for t in several
    ]
    key = json.dumps([function, version, options, weights], sort_keys=True)
    return f"measure-{function}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def copy_record(trained: Trained, destination: Path) -> None:
    """Copy a record from the store, and the measurements of it that this process has used.

    Where the model is an architecture that a search has found, its file is copied as well.
    """
    run = trained.run
    if MARK in run.model:
        architecture = load_architecture(run.model)
        files.write_atomic(destination / file_of(run.model), architecture.text)
    for name in ("record.jsonl", *sorted(_used[run.id])):
        if (path := folder(run) / name).exists():
            target = f"{run.id}.jsonl" if name == "record.jsonl" else f"{run.id}.{name}"
            files.write_atomic(destination / target, path.read_bytes())


def _read_table(text: str) -> pd.DataFrame:
    import pandas as pd  # training needs no pandas

    return pd.DataFrame(**json.loads(text))
