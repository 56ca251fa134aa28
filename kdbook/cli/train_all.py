"""Train all that the notebooks of some exhibits declare, in one process, for some seconds.

python -m kdbook.cli.train_all SECONDS EXHIBIT [EXHIBIT ...] [--set NAME=JSON ...]

The runs of all exhibits are trained together, so that a GPU has many students at a time. At the end
of the time, at SIGTERM or Ctrl-C, every run is saved. Needs neither Jupyter nor Snakemake.
"""

import argparse
import contextlib
import os
import signal
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable

from kdbook.cli.gpu_slot import gpu_slot
from kdbook.cli.notebooks import Notebook, all_notebooks, parse_arguments

# One exhibit of each paper with its main claim; their runs are trained before all others.
HEADLINES = ("kr/table1", "stc/table1", "rco/table2", "search/table1")


def train_all(notebooks: Iterable[Notebook], deadline, **parameters) -> None:
    """Train the runs of these notebooks, and make their measurements as the runs end.

    Runs whose loss was not finite before are not tried again. Raises OutOfTime at the deadline.
    """
    import kdlib
    from kdbook.cli.declared import declared
    from kdlib.errors import OutOfTime
    from kdlib.runs import Run

    runs, measurements = {False: [], True: []}, defaultdict(list)
    for notebook in notebooks:
        found = declared(notebook, **parameters)
        runs[found.weights] += found.runs
        for run in found.runs if found.then else ():
            if isinstance(run, Run):
                measurements[run.id].append(found.then)

    def then(trained) -> None:
        for measurement in measurements[trained.run.id]:
            try:
                measurement(trained)
            except OutOfTime:
                raise
            except Exception:  # the notebook meets it again, and says so
                traceback.print_exc()

    for weights, items in runs.items():
        kdlib.train(items, weights=weights, partial=True, deadline=deadline, then=then, retry=False)


def end_with(parent: int) -> None:
    """Send this process SIGTERM when its parent is gone, as after ``kill -9``."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("exhibits", nargs="+")
    parser.add_argument("--parent", type=int, metavar="PID", help="end with this parent process")
    arguments = parse_arguments(parser)
    if arguments.parent:
        end_with(arguments.parent)
    notebooks = {n.exhibit: n for n in all_notebooks()}
    wanted = [notebooks[exhibit] for exhibit in arguments.exhibits]
    headlines = [n for n in wanted if n.exhibit in HEADLINES]
    with gpu_slot():
        # torch reads which GPUs are visible, so it is imported after the slot is held.
        from kdlib.engine.deadline import Deadline
        from kdlib.errors import OutOfTime

        deadline = Deadline(arguments.seconds - (time.monotonic() - started))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: deadline.stop_now())
        with contextlib.suppress(OutOfTime):
            for together in filter(None, (headlines, wanted)):
                train_all(together, deadline, **arguments.parameters)


if __name__ == "__main__":
    main()
