"""Train the networks of one profile and write every table and figure of the book."""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from kdbook.cli.forecast import table
from kdbook.cli.notebooks import ROOT, all_notebooks
from kdbook.profiles import PROFILES, Profile, open_profile
from kdlib import files
from kdlib.engine.pool import PARALLEL
from kdlib.errors import KdlibError, UnknownName

DESCRIPTION = f"""\
{__doc__}

Finished work is kept: if a call is interrupted, the same command continues it."""
EPILOG = """\
profiles:
{profiles}

examples:
  ./run_all.sh                            the whole book on the data set digits
  ./run_all.sh --list                     all notebooks with exhibit and expected time
  ./run_all.sh --only rco/table1          one exhibit
  ./run_all.sh --profile course           on CIFAR and MNIST; three commands download them first:
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
  KDLIB_VENV            folder of the Python environment (default: the active environment if it
                        has all packages, else .venv/)
  KDLIB_PARALLEL, KDLIB_KEEP_ROUTE
                        the same as --parallel and --keep-route
  KDLIB_COMPILE         compile the students on a GPU: never, always, or auto (default: runs of
                        50,000 steps or more)
  KDLIB_DETERMINISTIC   1: use the same GPU kernels in every run; two equal runs on one machine then
                        agree in every bit, but training is slower
"""


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def parse() -> argparse.Namespace:
    """Parse and check the command line; ``profile`` of the result is the opened profile."""
    parser = _parser()
    arguments = parser.parse_args()
    arguments.data = dict(_pair(parser, text) for text in arguments.data)
    for option in ("parallel", "keep_route"):  # the notebooks read these variables
        if number := getattr(arguments, option):
            os.environ[f"KDLIB_{option.upper()}"] = str(number)
    try:
        positive(os.environ.get("KDLIB_PARALLEL") or "1")
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
            "dest": "profile_name", "metavar": "PROFILE", "default": "smoke",
            "help": "smoke (default), course or paper; see below",
        },
        "--only": {
            "metavar": "EXHIBITS", "default": "",
            "help": "run these exhibits, separated by commas, and the scorecard if one of them "
            "changes",
        },
        "--data": {
            "action": "append", "default": [], "metavar": "NAME=DATA",
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


def _pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    """Split NAME=DATA, with the path of a folder made absolute."""
    name, separator, data = text.partition("=")
    if not (separator and data):
        parser.error(f"--data {text}: write NAME=DATA, such as cifar100=folder:PATH")
    if data.startswith("folder:"):
        data = f"folder:{Path(data.removeprefix('folder:')).expanduser().resolve()}"
    return name, data


def _checked(arguments: argparse.Namespace) -> Profile:
    """The opened profile. Wrong names and unreadable folders raise before anything starts."""
    if arguments.executor == "slurm" and not importlib.util.find_spec(
        "snakemake_executor_plugin_slurm"
    ):
        raise ValueError(
            "--executor slurm needs a plugin of Snakemake. Install it with "
            "pip install -c constraints.txt -e '.[slurm]'"
        )
    known = [n.exhibit for n in all_notebooks()]
    for exhibit in filter(None, arguments.only.split(",")):
        if exhibit not in known:
            raise UnknownName("exhibit", exhibit, known)
    return open_profile(arguments.profile_name, data=arguments.data)


def list_notebooks(profile_name: str) -> None:
    rows = [("exhibit", "notebook", f"time ({profile_name})", "title")]
    for n in all_notebooks():
        rows.append((n.exhibit, str(n.path.relative_to(ROOT)), n.cost[profile_name], n.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # no spaces after the titles
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def gpus() -> list[str]:
    """Names of the visible GPUs for ``CUDA_VISIBLE_DEVICES``."""
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in shown.split(",") if name]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return re.findall(r"^GPU (\d+):", done.stdout, re.MULTILINE)


def snakemake(arguments: argparse.Namespace) -> list[str]:
    """The Snakemake command that runs all jobs."""
    settings = {
        "profile": arguments.profile.name,
        "folder": arguments.profile.folder,
        "only": arguments.only or None,
        "data": json.dumps(arguments.data) if arguments.data else None,
        "seeds": ",".join(map(str, arguments.profile.seeds)) if arguments.by_seed else None,
    }
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *("--directory", str(ROOT)),
        *("--workflow-profile", str(ROOT / "workflow" / arguments.executor)),
    ]
    if arguments.executor == "slurm":
        command += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
    else:
        # One notebook trains many students on a GPU at the same time: give it a whole GPU.
        cores, devices = os.cpu_count() or 1, gpus()
        jobs = arguments.jobs or len(devices) or min(cores, 4)
        os.environ["KDLIB_GPUS"] = ",".join(devices)
        settings["threads"] = max(1, cores // jobs)
        command += ["--cores", str(settings["threads"] * jobs), "--resources", f"gpu={jobs}"]
    pairs = [f"{key}={value}" for key, value in settings.items() if value is not None]
    return [*command, "--config", *pairs]


def run(command: list[str], log: Path) -> int:
    """Run Snakemake. On Ctrl-C or SIGTERM, interrupt all jobs and wait until they have stopped."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise


def dry_run(command: list[str], data: dict[str, str]) -> int:
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    if plan.returncode:
        print(plan.stdout + plan.stderr, file=sys.stderr)
        return plan.returncode
    jobs = set(re.findall(r"^rule (\w+):", plan.stdout + plan.stderr, re.MULTILINE))
    for notebook in (named := [n for n in all_notebooks() if n.job in jobs]):
        print(f"would run {notebook.exhibit}: {notebook.title}")
    if not named:
        print("Nothing to do: every notebook is up to date.")
    print(f"""
The full cost of each profile, from an empty store. Each run is counted once. A greedy search is
counted as four training stages, but it can take eight. An epoch is one pass over the training
images. Peer epochs train a second network together with the student. Teacher passes are forward
passes of the teachers over the training images, first without and then with the cache of their
logits.

{table(PROFILES, data)}

A route is a teacher's checkpoints along its training, and its logits. Routes need most of the disk
space; the option --keep-route reduces it.""")
    return 0


def main() -> int:
    arguments = parse()
    profile = arguments.profile
    if arguments.list:
        list_notebooks(profile.name)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command, started = snakemake(arguments), time.monotonic()
    if arguments.dry_run:
        return dry_run(command, arguments.data)
    results, log = files.results() / profile.folder, files.home() / "logs" / "snakemake.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    substitutes = "".join(f", with {pair}" for pair in profile.substitutes)
    print(f"Profile {profile.name} ({profile.description}){substitutes}.", flush=True)
    try:
        status = run(command, log)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished work is kept. The same command continues from here.")
        return 130
    if status:
        print(
            f"Some jobs failed, so the scorecard was not written. Lines with ✗ above name the "
            f"failed notebooks. Their copies up to the error are the files *.failed.ipynb in "
            f"{results / 'notebooks'}. Snakemake's messages are in {log}",
            file=sys.stderr,
        )
        return status
    if "Nothing to be done" in log.read_text():
        print("Nothing to do: every notebook is up to date.")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"""
Done in {minutes} min {seconds} s.
  scorecard   {results / "scorecard.html"}
  tables      {results}/<paper>/<exhibit>/table.md, with the figures in the same folder
  notebooks   {results / "notebooks"}, executed
Next: {"./run_all.sh --profile course on a GPU, or " if profile.name == "smoke" else ""}\
{Path(sys.executable).parent / "jupyter"} lab notebooks/00_start_here.ipynb""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
