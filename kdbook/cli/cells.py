"""Execute the code of a notebook in this process, without Jupyter."""

import contextlib
import json

from kdbook.cli.notebooks import Notebook


def run_cells(notebook: Notebook, parameters: dict, skipped: type[Exception] | tuple = ()) -> None:
    """Execute all code cells but those that install packages. What they print is not shown.

    Args:
        parameters: replace the values in the notebook's parameters cell.
        skipped: errors after which the next cell is executed. Other errors are raised.
    """
    namespace = {"__name__": "__main__"}
    for cell in json.loads(notebook.path.read_text())["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "install" in tags:
            continue
        code = compile("".join(cell["source"]), str(notebook.path), "exec")
        with contextlib.redirect_stdout(None), contextlib.suppress(skipped):
            exec(code, namespace)
        if "parameters" in tags:
            namespace |= parameters
