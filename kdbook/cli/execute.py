"""Execute one notebook with papermill, and accept it only if it ran whole.

python workflow/execute.py NOTEBOOK OUTPUT [--set NAME=JSON ...]
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import book
import gpu_slot
import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config


def execute(notebook: Path, output: Path, parameters: dict) -> float:
    """Write the executed copy to ``output`` and return the seconds it took.

    A copy that failed lies beside it as ``<name>.failed.ipynb``.

    Raises:
        ValueError: a parameter that the notebook does not have.
        papermill.PapermillExecutionError: a cell raised.
        RuntimeError: the notebook did not run to its end.
    """
    known = papermill.inspect_notebook(str(notebook))
    if unknown := parameters.keys() - known.keys():
        raise ValueError(f"{notebook.name} has no parameter {', '.join(sorted(unknown))}.")
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_suffix(".failed.ipynb")
    with tempfile.TemporaryDirectory() as sockets:
        # Unix sockets: no ports to race for when several kernels start at once. They get a folder
        # of their own, since the default is one name for all kernels of a working directory.
        transport = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        papermill.execute_notebook(
            str(notebook),
            str(failed),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            progress_bar=False,
            start_timeout=180,
            config=Config({"KernelManager": transport}),
        )
    content = nbformat.read(failed, as_version=4)
    about = content.metadata.papermill
    if about.get("end_time") is None or about.get("exception"):
        raise RuntimeError(f"{notebook.name} did not run to its end.")
    # Copies are committed: where they lay on this machine is nobody's business.
    about.update(input_path=notebook.name, output_path=output.name)
    nbformat.write(content, failed)
    os.replace(failed, output)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    arguments = book.parse(parser)
    name = arguments.notebook.stem
    print(f"  … {arguments.notebook.parent.name}/{name}", flush=True)
    try:
        with gpu_slot.gpu_slot():
            seconds = execute(arguments.notebook, arguments.output, arguments.parameters)
    except DeadKernelError as error:
        print(f"  ✗ {name}: the kernel died, as it does when memory runs out", flush=True)
        sys.exit(str(error))
    except papermill.PapermillExecutionError as error:
        print(f"  ✗ {name}: {error.ename}: {error.evalue}", flush=True)
        sys.exit(
            f"{error}\nThe notebook up to there: {arguments.output.with_suffix('.failed.ipynb')}"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"  ✓ {arguments.notebook.parent.name}/{name} · {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
