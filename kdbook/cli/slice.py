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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache

import torch
from matplotlib import pyplot as plt

from kdbook.cli import STARTED
from kdbook.cli.cells import run_cells
from kdbook.cli.declared import Declared, declared
from kdbook.cli.notebooks import SCORECARD, Notebook, all_notebooks
from kdbook.cli.options import chosen
from kdbook.cli.workflow import gpus, jobs_and_threads
from kdbook.remaining import Followed, Known, epochs_left, follow, is_rendered
from kdlib import build_model, count_cost, files, load_data, store
from kdlib.engine.deadline import Deadline
from kdlib.engine.device import asked_parallel, environment, pick_device
from kdlib.runs import Run

# The share of the time that is kept for rendering, and its least and largest number of seconds.
RENDERING, LEAST, MOST = 0.15, 10, 120


def run_slice(arguments: argparse.Namespace) -> int:
    """Train for ``arguments.minutes`` at most, and render; the exit status of the program."""
    deadline = Deadline(60 * arguments.minutes - (time.monotonic() - STARTED))
    profile = arguments.profile
    parameters = {"profile_name": profile.name, "data": arguments.data or None}
    jobs, threads = jobs_and_threads(arguments.jobs)
    torch.set_num_threads(threads)  # as in the processes that train: the same bits
    notebooks = chosen(arguments.only)
    end = datetime.now() + timedelta(seconds=deadline.left)
    print(
        f"Profile {profile.name} until {end:%H:%M:%S} on {device(jobs, threads)}: "
        f"{', '.join(n.exhibit for n in notebooks) if arguments.only else 'all exhibits'}.",
        flush=True,
    )
    scorecard = all_notebooks()[-1]
    notebooks = [n for n in notebooks if n.exhibit != SCORECARD]
    found = {n.exhibit: declared(n, **parameters) for n in notebooks}

    standing, trained = follow_all(found), True
    if any(followed.unfinished for followed in standing.values()):
        trained = train(notebooks, parameters, deadline, jobs, threads)
    standing = follow_all(found)
    complete = [n for n in notebooks if not standing[n.exhibit].unfinished]
    waiting = [n for n in complete if not is_rendered(n.exhibit, profile, standing[n.exhibit])]
    rendered = [n for n in waiting if deadline.left > 0 and render(n, parameters)]
    if rendered and deadline.left > 0:
        render(scorecard, parameters)
    report_exhibits(notebooks, complete)
    if late := [n.exhibit for n in waiting if n not in rendered]:
        print(f"Not rendered yet: {', '.join(late)}.")
    if not trained:
        print("Training failed: the message above says why.", file=sys.stderr)
        return 1
    report_left(standing, jobs * asked_parallel(None, pick_device()))
    print(f"Results are in {files.results() / profile.folder}.")
    return 0


def device(jobs: int, threads: int) -> str:
    """The devices of a slice, in words."""
    if models := [*gpus().values()]:
        return ", ".join(models[:jobs])
    return f"the CPU (processes: {jobs}, threads in each: {threads})"


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
    command += ["--parent", str(os.getpid())]
    for name, value in parameters.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.setdefault("KDLIB_PROGRESS", "lines")
    environment.setdefault("KDLIB_COMPILE", "never")  # it takes minutes
    workers: list[subprocess.Popen] = []
    with passing_on(workers, deadline):
        for _ in range(jobs):  # in sessions of their own: the terminal's Ctrl-C is passed on
            workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
        codes = {worker.wait() for worker in workers}
    stopped = {-signal.SIGTERM} if deadline.left <= 0 else set()  # before it could save anything
    return not codes - {0} - stopped


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


def follow_all(found: dict[str, Declared]) -> dict[str, Followed]:
    """By exhibit, how far its runs have come."""
    known: Known = {}
    return {exhibit: follow(d.runs, known, d.weights) for exhibit, d in found.items()}


def _work(runs: Mapping[Run, int]) -> float:
    """Multiply-accumulates of so many epochs of each run, roughly: the student's steps alone."""
    return sum(epochs * _epoch(r.model, r.dataset, r.images) for r, epochs in runs.items())


@cache
def _epoch(model: str, dataset: str, count: int | None) -> float:
    images = load_data(dataset).first(count)
    network = build_model(model.partition("@")[0], images.classes, images.channels, seed=0)
    return 3.0 * len(images) * count_cost(network, images.size).macs


def seconds_for(left: Mapping[Run, int], trained: Iterable[Run], students: int) -> float | None:
    """Seconds for so many epochs of each run, from what complete runs took on this device.

    Args:
        trained: complete runs; None is returned where this device has trained none of them.
        students: that train at a time.
    """
    here = environment(pick_device(), torch.float32)["device"]
    records = [found for run in trained if (found := store.find_record(run))]
    records = [r for r in records if r.summary["environment"]["device"] == here]
    if not records:
        return None
    done = _work({r.run: r.epochs for r in records})
    seconds = sum(r.summary["seconds"] for r in records)
    return seconds * _work(left) / done / max(1, min(students, len(left)))


def report_exhibits(notebooks: list[Notebook], complete: list[Notebook]) -> None:
    """Print which exhibits have all their runs, and which do not."""
    names = ", ".join(n.exhibit for n in complete)
    print(f"{len(complete)} of {len(notebooks)} exhibits are complete{': ' * bool(names)}{names}.")
    if missing := [n.exhibit for n in notebooks if n not in complete]:
        print(f"Not complete: {', '.join(missing)}.")


def report_left(standing: dict[str, Followed], students: int) -> None:
    """Print what failed, what is left, and about how long it takes."""
    every = {run.id: run for f in standing.values() for run in f.runs}  # parents first
    left = {run.id: run for f in standing.values() for run in f.unfinished}
    failed = [run for run in left.values() if store.failure_path(run).exists()]
    blocked = {run.id for run in failed}
    for run in left.values():
        if any(parent.id in blocked for parent, _ in run.parents):
            blocked.add(run.id)
    for run in failed:
        print(
            f"{run} failed: its loss was not finite. Slices do not train it again; to try again, "
            f"remove {store.failure_path(run)}."
        )
    epochs = {run: epochs_left(run) for run in left.values() if run.id not in blocked}
    if not epochs:
        print(f"Nothing is left to train{' but what failed' * bool(failed)}.")
        return
    seconds = seconds_for(epochs, (run for run in every.values() if run.id not in left), students)
    about = "how long is not known yet"
    if seconds is not None:
        about = f"about {clock(seconds)}, as complete runs took"
    more = " and what chains find later" if any(f.awaited for f in standing.values()) else ""
    print(f"Left: {len(epochs):,} runs with {sum(epochs.values()):,} epochs{more}; {about}.")
    print("The same command goes on.")


def clock(seconds: float) -> str:
    """Hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
