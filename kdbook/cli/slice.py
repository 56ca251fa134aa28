"""Train and render a profile for some minutes; the same command goes on from there.

The training runs in processes of its own (``train_all``). This process starts and stops them, then
renders the exhibits whose runs are complete. Needs neither Jupyter nor Snakemake.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from matplotlib import pyplot as plt

from kdbook.cli.cells import run_cells
from kdbook.cli.declared import declared_runs
from kdbook.cli.notebooks import Notebook, all_notebooks
from kdbook.cli.workflow import jobs_and_threads
from kdbook.remaining import Followed, Known, epochs_left, follow, is_rendered
from kdlib import build_model, count_cost, files, load_data
from kdlib.engine.deadline import Deadline
from kdlib.engine.train import RunChain
from kdlib.runs import Run

# The share of the time that is kept for rendering, and its least and largest number of seconds.
RENDERING, LEAST, MOST = 0.15, 10, 120


def run_slice(arguments: argparse.Namespace) -> int:
    """Train for ``arguments.minutes`` at most, and render; the exit status of the program."""
    deadline, profile = Deadline(60 * arguments.minutes), arguments.profile
    parameters = {"profile_name": profile.name, "data": arguments.data or None}
    jobs, threads = jobs_and_threads(arguments.jobs)
    torch.set_num_threads(threads)  # as in the processes that train: the same bits
    *notebooks, scorecard = all_notebooks()
    chosen = {*arguments.only.split(",")} - {""}
    notebooks = [n for n in notebooks if n.exhibit in chosen or not chosen]
    declared = {n.exhibit: declared_runs(n, **parameters) for n in notebooks}

    started = time.monotonic()
    standing = follow_all(declared)
    before, trained = work_left(standing), True
    if any(followed.unfinished for followed in standing.values()):
        trained = train(notebooks, parameters, deadline, jobs, threads)
    seconds, standing = time.monotonic() - started, follow_all(declared)
    complete = [n for n in notebooks if not standing[n.exhibit].unfinished]
    waiting = [n for n in complete if not is_rendered(n.exhibit, profile, standing[n.exhibit])]
    rendered = [n for n in waiting if deadline.left > 0 and render(n, parameters)]
    if rendered and deadline.left > 0:
        render(scorecard, parameters)
    print(f"{len(complete)} of {len(notebooks)} exhibits are complete.")
    if late := [n.exhibit for n in waiting if n not in rendered]:
        print(f"Not rendered yet: {', '.join(late)}.")
    if not trained:
        print("Training failed: the message above says why.", file=sys.stderr)
        return 1
    report_left(standing, before, seconds)
    print(f"Results are in {files.results() / profile.folder}.")
    return 0


# --- training -------------------------------------------------------------------------------------


def train(
    notebooks: Iterable[Notebook], parameters: dict, deadline: Deadline, jobs: int, threads: int
) -> bool:
    """Train in processes of their own, until the time for rendering; whether all went well.

    Processes that share a store share the work. A GPU has one process with many students.
    """
    seconds = deadline.left - min(MOST, max(LEAST, RENDERING * deadline.left))
    command = [sys.executable, "-m", "kdbook.cli.train_all", str(seconds)]
    command += [n.exhibit for n in notebooks if n.trains]
    for name, value in parameters.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.setdefault("KDLIB_PROGRESS", "lines")
    environment.setdefault("KDLIB_COMPILE", "never")  # it takes minutes
    workers: list[subprocess.Popen] = []
    with passing_on(workers, deadline):
        workers += [subprocess.Popen(command, env=environment) for _ in range(jobs)]
        codes = [worker.wait() for worker in workers]
    return not any(codes)


@contextmanager
def passing_on(workers: list[subprocess.Popen], deadline: Deadline) -> Iterator[None]:
    """Pass SIGTERM and Ctrl-C on to the workers, which save what they have; then time is over."""

    def stop(*_) -> None:
        deadline.stop_now()
        for worker in workers:
            worker.terminate()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# --- rendering ------------------------------------------------------------------------------------


def render(notebook: Notebook, parameters: dict) -> bool:
    """Write the tables and figures of a notebook whose runs are complete; whether that succeeded.

    Executed copies of notebooks are not written: they need Jupyter.
    """
    started, folder = time.monotonic(), os.getcwd()
    try:
        os.chdir(notebook.path.parent)
        run_cells(notebook, parameters)
    except Exception as error:
        traceback.print_exc()
        print(f"  ✗ {notebook.name}: {type(error).__name__}: {error}", flush=True)
        return False
    finally:
        os.chdir(folder)
        plt.close("all")
    print(f"  ✓ {notebook.name} · {time.monotonic() - started:.0f} s", flush=True)
    return True


# --- what is left ---------------------------------------------------------------------------------


def follow_all(declared: dict[str, list[Run | RunChain]]) -> dict[str, Followed]:
    """By exhibit, how far its runs have come."""
    known: Known = {}
    return {exhibit: follow(items, known) for exhibit, items in declared.items()}


def work_left(standing: dict[str, Followed]) -> float:
    """Multiply-accumulates of all epochs that are left, roughly: the students' steps alone."""
    runs = {run.id: run for f in standing.values() for run in f.unfinished}
    return sum(epochs_left(r) * _epoch(r.model, r.dataset, r.images) for r in runs.values())


@cache
def _epoch(model: str, dataset: str, count: int | None) -> float:
    images = load_data(dataset).first(count)
    network = build_model(model.partition("@")[0], images.classes, images.channels, seed=0)
    return 3.0 * len(images) * count_cost(network, images.size).macs


def report_left(standing: dict[str, Followed], before: float, seconds: float) -> None:
    """Print what is left, and about how long it takes at the speed of this call."""
    runs = {run.id: run for f in standing.values() for run in f.unfinished}
    if not runs:
        print("Nothing is left to train.")
        return
    epochs, now = sum(map(epochs_left, runs.values())), work_left(standing)
    about = "the speed is not known yet"
    if before > now:
        about = f"about {clock(seconds * now / (before - now))} at the speed of this call"
    more = " and what chains find later" if any(f.awaited for f in standing.values()) else ""
    print(f"Left: {len(runs):,} runs with {epochs:,} epochs{more}; {about}.")
    print("The same command goes on.")


def clock(seconds: float) -> str:
    """Hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
