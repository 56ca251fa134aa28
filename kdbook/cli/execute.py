"""Execute one notebook with papermill; write the copy only if every cell ran.

python -m kdbook.cli.execute NOTEBOOK OUTPUT [--set NAME=JSON ...]
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from kdbook.cli.gpu_slot import gpu_slot
from kdbook.cli.notebooks import label, parse_arguments


def execute(notebook: Path, output: Path, parameters: dict) -> float:
    """Write the executed copy to ``output`` and return the time in seconds.

    While it runs, the copy is called ``<name>.running.ipynb``. If a cell fails, the copy is kept
    beside ``output`` as ``<name>.failed.ipynb``.

    Raises:
        ValueError: the notebook has no such parameter.
        papermill.PapermillExecutionError: a cell raised an error.
        RuntimeError: the notebook stopped before its last cell.
    """
    known = papermill.inspect_notebook(str(notebook))
    if unknown := parameters.keys() - known.keys():
        raise ValueError(
            f"{notebook.name} has no parameter {', '.join(sorted(unknown))}. "
            f"Its parameters are: {', '.join(known)}."
        )
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    running, failed = (output.with_suffix(f".{state}.ipynb") for state in ("running", "failed"))
    failed.unlink(missing_ok=True)  # of an earlier call
    try:
        _run(notebook, running, parameters)
        content = nbformat.read(running, as_version=4)
        about = content.metadata.papermill
        if about.get("end_time") is None or about.get("exception"):
            raise RuntimeError(f"{notebook.name} stopped before its last cell. See {failed}.")
    except Exception:
        if running.exists():
            os.replace(running, failed)
        raise
    except KeyboardInterrupt:
        running.unlink(missing_ok=True)
        raise
    # Executed copies are committed, so they must not contain paths of this machine.
    about.update(input_path=notebook.name, output_path=output.name)
    nbformat.write(content, running)
    os.replace(running, output)
    return time.monotonic() - started


def _run(notebook: Path, copy: Path, parameters: dict) -> None:
    with tempfile.TemporaryDirectory() as sockets:
        # Several kernels start at the same time and would compete for TCP ports: use Unix sockets.
        # By default all kernels of a folder share one socket name: use a new folder for each.
        transport = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        papermill.execute_notebook(
            str(notebook),
            str(copy),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            progress_bar=False,
            start_timeout=180,
            config=Config({"KernelManager": transport}),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parse_arguments(parser)
    name = label(arguments.notebook)
    print(f"  … {name}", flush=True)
    try:
        with gpu_slot():
            seconds = execute(arguments.notebook, arguments.output, arguments.parameters)
    except DeadKernelError as error:
        print(f"  ✗ {name}: the kernel stopped; a usual cause is too little memory", flush=True)
        sys.exit(str(error))
    except papermill.PapermillExecutionError as error:
        print(f"  ✗ {name}: {error.ename}: {error.evalue}", flush=True)
        copy = arguments.output.with_suffix(".failed.ipynb")
        sys.exit(f"{error}\nThe notebook up to this cell: {copy}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"  ✓ {name} · {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
