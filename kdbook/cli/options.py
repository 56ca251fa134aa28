"""The command line of run_all: its options, checked before anything starts."""

import argparse
import importlib.util
import os
from pathlib import Path

import torch

from kdbook.cli.notebooks import CHAPTERS, SCORECARD, Notebook, all_notebooks, label
from kdbook.profiles import PROFILES, Profile, open_profile
from kdlib.engine.capture import wants_capture
from kdlib.engine.device import PARALLEL, prepare
from kdlib.engine.precision import asked_precision
from kdlib.errors import KdlibError, UnknownName

DESCRIPTION = """\
Train the networks of one profile and write every table and figure of the book.

Finished work is kept: if a call is interrupted, the same command continues it."""
EPILOG = """\
profiles:
{profiles}

examples:
  ./run_all.sh                            the whole book on the data set digits
  ./run_all.sh --list                     all notebooks with exhibit and expected time
  ./run_all.sh --only rco/table1          one exhibit
  ./run_all.sh --only "rco, stc/table1"   all exhibits of a chapter, and one more
  ./run_all.sh --minutes 8                eight minutes of the book; again to go on
  ./run_all.sh --verify kr/figure5        check a recorded run of this exhibit
  ./run_all.sh --profile laptop           on CIFAR at 16x16 and MNIST, on a CPU
  ./run_all.sh --profile course           on CIFAR and MNIST. Before either of these two, three
                                          commands download the data sets:
                                            python -m kdlib.data cifar10
                                            python -m kdlib.data cifar100
                                            python -m kdlib.data mnist
  ./run_all.sh --profile course --data cifar100=folder:~/photos
                                          your own images in place of CIFAR-100; the folder has
                                          {{train,test}}/<class>/*.png or .jpg

environment variables:
  KDLIB_HOME            folder of trained weights (default: runs/)
  KDLIB_RESULTS         folder of results (default: results/)
  KDLIB_DATA            folder of downloaded data sets (default: data/)
  KDLIB_VENV            folder of the Python environment (default: that of the Python on PATH if it
                        has all packages, else .venv/)
  KDLIB_PARALLEL, KDLIB_KEEP_ROUTE
                        the same as --parallel and --keep-route
  KDLIB_COMPILE         compile the students on a GPU: never, always, or auto (default: runs of
                        50,000 steps or more)
  KDLIB_PRECISION       precision of training and labels: float32, bfloat16, or on a GPU float16
                        (default: half precision on a GPU, and on a CPU where it is faster)
  KDLIB_CAPTURE         never: no CUDA graphs, which is slower
  KDLIB_DETERMINISTIC   1: use the same GPU kernels in every run; two equal runs on one machine then
                        agree in every bit, but training is slower
"""


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def natural(text: str) -> int:
    """Parse a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def minutes(text: str) -> float:
    """Parse a number of minutes above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return number


def replacement(text: str) -> tuple[str, str]:
    """Split NAME=DATA, with the path of a folder made absolute, since notebooks run elsewhere."""
    name, _, data = text.partition("=")
    if not (name and data):
        raise argparse.ArgumentTypeError(f"write NAME=DATA, such as cifar100=folder:PATH: {text!r}")
    if data.startswith("folder:"):
        data = f"folder:{Path(data.removeprefix('folder:')).expanduser().resolve()}"
    return name, data


def chosen(only: str | None) -> list[Notebook]:
    """The notebooks of these exhibits; all but the scorecard for None.

    Args:
        only: names separated by commas: of exhibits (``rco/table1``), of chapters (``rco``), or of
            notebooks (``notebooks/rco/02_table1.ipynb``).

    Raises UnknownName for an unknown name, ValueError where ``only`` holds none.
    """
    notebooks = {n.exhibit: n for n in all_notebooks()}
    if only is None:
        return [n for n in notebooks.values() if n.exhibit != SCORECARD]
    names = [*filter(None, map(str.strip, only.split(",")))]
    if not names:
        raise ValueError("--only names no exhibit. Without --only all exhibits are taken.")
    return [*{n.exhibit: n for name in names for n in _named(name, notebooks)}.values()]


def _named(name: str, notebooks: dict[str, Notebook]) -> list[Notebook]:
    if name in notebooks:
        return [notebooks[name]]
    chapter = name.removeprefix("./").removeprefix("notebooks/").rstrip("/")
    found = [
        n
        for n in notebooks.values()
        if n.name == label(Path(name)) or n.path == Path(name).resolve()
    ] or [
        n
        for n in notebooks.values()
        if n.exhibit.partition("/")[0] == chapter and n.exhibit != SCORECARD
    ]
    if not found:
        raise UnknownName("exhibit or chapter", name, [*notebooks, *CHAPTERS])
    return found


def check_environment(gpu: bool) -> None:
    """Raise ValueError for a wrong value of a variable, before any process starts.

    Args:
        gpu: whether the training has a GPU.
    """
    prepare(torch.device("cpu"))
    asked_precision(gpu)
    wants_capture()


def parse() -> argparse.Namespace:
    """Parse and check the command line.

    ``profile`` of the result is the opened profile; with ``--verify`` there is none.
    """
    parser = _parser()
    arguments = parser.parse_args()
    arguments.data = dict(arguments.data)
    if arguments.verify is not None:  # the profile is a folder of results then
        if arguments.only:
            parser.error("--only: name the exhibits after --verify")
        return arguments
    arguments.profile_name = arguments.profile_name or "smoke"
    for option in ("parallel", "keep_route"):  # the notebooks read these variables
        if number := getattr(arguments, option):
            os.environ[f"KDLIB_{option.upper()}"] = str(number)
    try:
        positive(os.environ.get("KDLIB_PARALLEL") or "1")
        check_environment(arguments.executor == "slurm" or torch.cuda.is_available())
        arguments.profile = _checked(arguments)
    except argparse.ArgumentTypeError as error:
        parser.error(f"KDLIB_PARALLEL: {error}")
    except (KdlibError, ValueError) as error:
        parser.error(str(error))
    return arguments


def _parser() -> argparse.ArgumentParser:
    profiles = "\n".join(f"  {name:7}{p.description}" for name, p in PROFILES.items())
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        description=DESCRIPTION,
        epilog=EPILOG.format(profiles=profiles),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options = {
        "--profile": {
            "dest": "profile_name", "metavar": "PROFILE",
            "help": "smoke (default), laptop, course or paper; see below",
        },
        "--only": {
            "metavar": "EXHIBITS",
            "help": "run these exhibits, separated by commas, and the scorecard if one of them "
            "changes; the name of a chapter, such as rco, stands for all its exhibits; the path of "
            "a notebook for its exhibit",
        },
        "--data": {
            "action": "append", "type": replacement, "default": [], "metavar": "NAME=DATA",
            "help": "use the data set DATA in place of the paper's data set NAME; repeat the "
            "option for several data sets",
        },
        "--jobs": {
            "type": positive, "metavar": "N",
            "help": "run N notebooks at the same time (default: one per GPU; without a GPU one per "
            "CPU core, at most 4)",
        },
        "--by-seed": {
            "action": "store_true",
            "help": "train each seed of a notebook in a separate job before the notebook runs; for "
            "several GPUs or nodes",
        },
        "--executor": {
            "choices": ["local", "slurm"], "default": "local",
            "help": "where jobs run: on this machine (default) or on a SLURM cluster",
        },
        "--minutes": {
            "type": minutes, "metavar": "N",
            "help": "stop after N minutes with everything saved, and render the exhibits whose "
            "runs are complete; the same command goes on. Needs no Jupyter and no Snakemake",
        },
        "--parallel": {
            "type": positive, "metavar": "N",
            "help": f"train N students of a notebook in parallel (default: {PARALLEL['cpu']} on a "
            f"CPU, {PARALLEL['cuda']} on a GPU; fewer if memory runs out)",
        },
        "--keep-route": {
            "type": positive, "metavar": "N",
            "help": "save disk space: of a teacher whose checkpoints RCO uses, keep only every "
            "N-th and every tenth epoch (default: 1, all epochs). Table 6 then lacks some "
            "anchor intervals, "
            "and greedy search has fewer anchors to choose from. Results go to a separate folder",
        },
        "--verify": {
            "nargs": "*", "metavar": "EXHIBIT",
            "help": "train a short recorded run of each EXHIBIT (default: of any) and its teachers "
            "again, from the record alone, in an empty store, and compare every bit. An id of a "
            "run names this run; all takes all runs; --minutes N as many as there is time for; "
            "--profile the records in this folder of results (default: all but smoke). Exit "
            "status: 0 equal; 1 different; 2 not verified; 3 different, but the machine has "
            "another description, so that is expected",
        },
        "--seed": {
            "type": natural, "metavar": "N",
            "help": "with --verify: choose the same runs again",
        },
        "--list": {
            "action": "store_true", "help": "list the notebooks with their expected time and exit",
        },
        "--dry-run": {
            "action": "store_true",
            "help": "show which notebooks would run and the cost of each profile, and exit",
        },
    }  # fmt: skip
    for option, settings in options.items():
        parser.add_argument(option, **settings)
    return parser


def _checked(arguments: argparse.Namespace) -> Profile:
    """The opened profile. Wrong names and unreadable folders raise before anything starts."""
    if arguments.minutes and (arguments.executor == "slurm" or arguments.by_seed):
        raise ValueError("--minutes trains on this machine: leave out --executor and --by-seed.")
    if arguments.executor == "slurm" and not importlib.util.find_spec(
        "snakemake_executor_plugin_slurm"
    ):
        raise ValueError(
            "--executor slurm needs a plugin of Snakemake. Install it with "
            "pip install -c constraints.txt -e '.[slurm]'"
        )
    chosen(arguments.only)
    return open_profile(arguments.profile_name, data=arguments.data)
