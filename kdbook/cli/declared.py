"""Read which runs a notebook declares, without training them."""

import contextlib
import json
from collections.abc import Mapping

import kdlib
from kdbook.cli.notebooks import Notebook
from kdlib.engine.train import RunChain
from kdlib.errors import DataError
from kdlib.runs import Run


class TrainCalled(Exception):
    """A notebook has called ``train``; the exception carries the runs."""


def declared_runs(notebook: Notebook, **parameters) -> list[Run | RunChain]:
    """Return the runs that a notebook passes to ``train``; an empty list if it does not train.

    Executes the notebook's cells up to this call. ``parameters`` replace the notebook's own.

    Raises ValueError if no executed cell calls ``train``.
    """

    def stop(runs, **options):
        rows = runs.values() if isinstance(runs, Mapping) else [runs]
        raise TrainCalled([run for row in rows for run in row])

    if not notebook.trains:
        return []
    code = [c for c in json.loads(notebook.path.read_text())["cells"] if c["cell_type"] == "code"]
    namespace, train, kdlib.train = {}, kdlib.train, stop
    try:
        for cell in code:
            tags = cell["metadata"].get("tags", [])
            if "install" not in tags:
                # A cell may show images of a data set that is not downloaded yet: skip its error.
                with contextlib.redirect_stdout(None), contextlib.suppress(DataError):
                    exec("".join(cell["source"]), namespace)
                namespace |= parameters if "parameters" in tags else {}
    except TrainCalled as call:
        return call.args[0]
    finally:
        kdlib.train = train
    raise ValueError(
        f"{notebook.path} contains 'train(', but none of its cells calls train. "
        f"Import it with 'from kdlib import train' and call it at the top level of a cell."
    )
