"""Read which runs a notebook declares, without training them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import kdlib
from kdbook.cli.cells import run_cells
from kdbook.cli.notebooks import Notebook
from kdlib.engine.train import RunChain
from kdlib.errors import DataError
from kdlib.runs import Run
from kdlib.store import Trained


class Declared(NamedTuple):
    """What a notebook passes to ``train``: the runs, and what it does with each result.

    ``weights`` as for ``train``: runs of which only a record exists are trained again.
    """

    runs: list[Run | RunChain]
    then: Callable[[Trained], object] | None = None
    weights: bool = False


class TrainCalled(Exception):
    """A notebook has called ``train``; the exception carries what it passed."""


def declared_runs(notebook: Notebook, **parameters) -> list[Run | RunChain]:
    """The runs that a notebook passes to ``train``, as ``declared`` finds them."""
    return declared(notebook, **parameters).runs


def declared(notebook: Notebook, **parameters) -> Declared:
    """What a notebook passes to ``train``; no runs if it does not train.

    Executes the notebook's cells up to this call. ``parameters`` replace the notebook's own.

    Raises ValueError if no executed cell calls ``train``.
    """

    def stop(runs, *, then=None, weights=False, **options):
        rows = runs.values() if isinstance(runs, Mapping) else [runs]
        raise TrainCalled(Declared([run for row in rows for run in row], then, weights))

    if not notebook.trains:
        return Declared([])
    train, kdlib.train = kdlib.train, stop
    try:
        # A cell may show images of a data set that is not downloaded yet: skip its error.
        run_cells(notebook, parameters, skipped=DataError)
    except TrainCalled as call:
        return call.args[0]
    finally:
        kdlib.train = train
    raise ValueError(
        f"{notebook.path} contains 'train(', but none of its cells calls train. "
        f"Import it with 'from kdlib import train' and call it at the top level of a cell."
    )
