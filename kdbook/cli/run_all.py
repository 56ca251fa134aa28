"""Regenerate the tables and figures of one profile, resuming where the last call stopped."""

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

import book

from kdbook.profiles import PROFILES, Profile, open_profile
from kdlib import files
from kdlib.errors import KdlibError, UnknownName

ROOT = book.ROOT
EPILOG = """\
profiles:
{profiles}

examples:
  ./run_all.sh                                    the whole book on digits
  ./run_all.sh --list                             notebooks, exhibits and expected cost
  ./run_all.sh --only rco/table1                  one exhibit (several: separated by commas)
  ./run_all.sh --profile course                   on CIFAR; python -m kdlib.data cifar100
                                                  fetches it
  ./run_all.sh --data cifar100=folder:~/photos    another data set in place of CIFAR-100, laid out
                                                  as {{train,test}}/<class>/*.png or .jpg

Everything finished is kept, so an interrupted call goes on where it stopped. KDLIB_HOME names the
store of weights (default runs/), KDLIB_RESULTS the results (default results/), KDLIB_VENV the
environment (default .venv). KDLIB_PARALLEL is what --lanes sets. On a GPU, KDLIB_COMPILE = never or
always overrules when students are compiled (auto: runs of 50,000 steps or more), and
KDLIB_DETERMINISTIC = 1 takes the same kernels in every run: slower, two runs agree in every bit.
"""


def parse() -> argparse.Namespace:
    profiles = "\n".join(f"  {name:8}{profile.says}" for name, profile in PROFILES.items())
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        description=__doc__,
        epilog=EPILOG.format(profiles=profiles),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", default="smoke", help="smoke (default), course or paper")
    parser.add_argument("--only", metavar="EXHIBIT", help="these exhibits only, then the scorecard")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=DATA",
        help="what stands in for a data set; may be given several times",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, help="notebooks at a time (default: by cores or GPUs)")
    parser.add_argument(
        "--by-seed", action="store_true",
        help="train each seed of a notebook in a job of its own first, for several GPUs or nodes",
    )  # fmt: skip
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--lanes", type=int, metavar="N",
        help="students side by side in a notebook (default: one on a CPU, on a GPU as many as "
        "memory and measured speed allow)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-route", type=int, metavar="N",
        help="of a teacher whose route is learned from keep only every N-th of the paper's epochs, "
        "besides every tenth (default 1: all); Table 6 loses gaps that are not kept, greedy search "
        "its anchors between; results go to a folder of their own",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would run, what it costs, and stop"
    )
    arguments = parser.parse_args()
    arguments.data = dict(_pair(parser, text) for text in arguments.data)
    for option in ("lanes", "keep_route"):  # for the notebooks, wherever they run
        if (number := getattr(arguments, option)) is None:
            continue
        if number < 1:
            parser.error(f"--{option.replace('_', '-')} {number}: it takes 1 or more.")
        os.environ[f"KDLIB_{option.upper()}"] = str(number)
    lanes = os.environ.get("KDLIB_PARALLEL") or "1"
    if not (lanes.isdecimal() and int(lanes)):
        parser.error(f"KDLIB_PARALLEL={lanes}: it takes 1 or more.")
    try:
        arguments.book = _checked(arguments)
    except (KdlibError, ValueError) as error:
        parser.error(str(error))
    return arguments


def _pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    """A data set's name and what stands in for it, folders made absolute."""
    name, separator, data = text.partition("=")
    if not (separator and data):
        parser.error(f"--data {text!r} does not read as NAME=folder:PATH")
    if data.startswith("folder:"):
        data = f"folder:{Path(data.removeprefix('folder:')).expanduser().resolve()}"
    return name, data


def _checked(arguments: argparse.Namespace) -> Profile:
    """The profile; wrong names are refused and folders decoded before anything starts."""
    if arguments.executor == "slurm" and not importlib.util.find_spec(
        "snakemake_executor_plugin_slurm"
    ):
        raise ValueError("SLURM needs a plugin: pip install -c constraints.txt -e '.[slurm]'")
    known = [n.exhibit for n in book.notebooks()]
    for exhibit in filter(None, (arguments.only or "").split(",")):
        if exhibit not in known:
            raise UnknownName("exhibit", exhibit, known)
    return open_profile(arguments.profile, data=arguments.data)


def list_notebooks(profile: str) -> None:
    rows = [("exhibit", "notebook", f"cost ({profile})", "title")]
    for n in book.notebooks():
        rows.append((n.exhibit, str(n.path.relative_to(ROOT)), n.cost[profile], n.title))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]
        )


def gpus() -> list[str]:
    """The GPUs that may be used, as CUDA names them; asking torch would take seconds."""
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in shown.split(",") if name]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return re.findall(r"^GPU (\d+):", done.stdout, re.MULTILINE)


def snakemake(arguments: argparse.Namespace) -> list[str]:
    """The command that runs the graph."""
    settings = {
        "profile": arguments.profile,
        "folder": arguments.book.folder,
        "only": arguments.only,
        "data": json.dumps(arguments.data) if arguments.data else None,
        "seeds": ",".join(map(str, arguments.book.seeds)) if arguments.by_seed else None,
    }
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *("--directory", str(ROOT)),
        *("--workflow-profile", str(ROOT / "workflow" / arguments.executor)),
    ]
    if arguments.executor == "slurm":
        command += ["--jobs", str(arguments.jobs)] if arguments.jobs else []
    else:
        # A notebook trains many students at a time on a GPU: one each, for as long as it runs.
        cores, devices = os.cpu_count() or 1, gpus()
        jobs = arguments.jobs or len(devices) or min(cores, 4)
        os.environ["KDLIB_GPUS"] = ",".join(devices)
        settings["threads"] = max(1, cores // jobs)
        command += ["--cores", str(settings["threads"] * jobs), "--resources", f"gpu={jobs}"]
    pairs = [f"{key}={value}" for key, value in settings.items() if value is not None]
    return [*command, "--config", *pairs]


def run(command: list[str], log: Path) -> int:
    """Run the graph; on Ctrl-C or SIGTERM hand the interrupt on and wait until all have stopped."""
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
    named = [n for n in book.notebooks() if book.job_name(n.exhibit) in jobs]
    print(
        "\n".join(f"would run {n.exhibit}: {n.title}" for n in named) or "There is nothing to do."
    )
    import forecast  # it imports what trains: seconds that no other call needs

    print(f"""
What each profile trains if nothing is there yet: each run once, a search as four stages (it may
take eight). An epoch is a pass over the training images. TeacherPasses are a teacher's passes to label
them: live, with the teacher beside every student, and with the label bank.

{forecast.table(PROFILES, data)}

Most of the disk holds routes, teachers' checkpoints of every epoch; --keep-route thins them.""")
    return 0


def main() -> int:
    arguments = parse()
    if arguments.list:
        list_notebooks(arguments.profile)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command, started = snakemake(arguments), time.monotonic()
    if arguments.dry_run:
        return dry_run(command, arguments.data)
    results, log = files.results() / arguments.book.folder, files.home() / "logs" / "snakemake.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    stand_ins = "".join(f", with {pair}" for pair in arguments.book.stand_ins)
    print(f"Profile {arguments.profile} ({arguments.book.says}){stand_ins}.", flush=True)
    try:
        status = run(command, log)
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept; the same command goes on from there.")
        return 130
    if status:
        print(
            f"Not everything is done. Notebooks marked ✗ failed and lie beside the executed ones "
            f"as *.failed.ipynb; the scorecard was not renewed. Snakemake's own words: {log}",
            file=sys.stderr,
        )
        return status
    if "Nothing to be done" in log.read_text():
        print("There is nothing to do: every notebook is up to date.")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"""
Done in {minutes} min {seconds} s.
  scorecard   {results / "scorecard.html"}
  tables      {results}/<paper>/<exhibit>/table.md, figures beside them
  notebooks   {results / "notebooks"}, executed
Try next: {"./run_all.sh --profile course on a GPU, or " if arguments.profile == "smoke" else ""}\
{Path(sys.executable).parent / "jupyter"} lab notebooks/00_start_here.ipynb""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
