"""What a notebook asks to be trained, found without training it."""

import contextlib
import json
from collections.abc import Mapping

import book

import kdlib
from kdlib.engine.train import Search
from kdlib.errors import DataError
from kdlib.runs import Run


class Declared(Exception):
    """Carries what a notebook asked for instead of training it."""


def asked_for(notebook: book.Notebook, **parameters) -> list[Run | Search]:
    """What a notebook's call of ``train`` is about; nothing where it calls it nowhere.

    Its cells are executed up to there, with these parameters in place of its own.
    """

    def stop(runs, **options):
        rows = runs.values() if isinstance(runs, Mapping) else [runs]
        raise Declared([run for row in rows for run in row])

    if not notebook.trains:
        return []
    code = [c for c in json.loads(notebook.path.read_text())["cells"] if c["cell_type"] == "code"]
    namespace, train, kdlib.train = {}, kdlib.train, stop
    try:
        for cell in code:
            tags = cell["metadata"].get("tags", [])
            if "install" not in tags:
                # prints go nowhere, nor do pictures of data that is not there yet
                with contextlib.redirect_stdout(None), contextlib.suppress(DataError):
                    exec("".join(cell["source"]), namespace)
                namespace |= parameters if "parameters" in tags else {}
    except Declared as asked:
        return asked.args[0]
    finally:
        kdlib.train = train
    raise ValueError(f"{notebook.path} speaks of train and did not call it.")
