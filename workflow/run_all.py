"""Regenerate the tables and figures of one profile, resuming where the last call stopped."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import book

ROOT = book.ROOT
PROFILES = {
    "smoke": "scikit-learn's digits, minutes on two CPU cores; proves the pipeline, no claim",
    "course": "CIFAR at a tenth of the epochs; made for one T4-class GPU",
    "paper": "the papers' own settings; made for a data-centre GPU",
}
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
environment (default .venv).
"""


def parse() -> argparse.Namespace:
    profiles = "\n".join(f"  {name:8}{what}" for name, what in PROFILES.items())
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
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and stop")
    arguments = parser.parse_args()
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse wrong names here, with the closest right ones, before anything starts."""
    from kdlib.errors import UnknownName

    slurm = "snakemake_executor_plugin_slurm"
    if arguments.executor == "slurm" and importlib.util.find_spec(slurm) is None:
        parser.error("SLURM needs a plugin: pip install -c constraints.txt -e '.[slurm]'")
    try:
        if arguments.profile not in PROFILES:
            raise UnknownName("profile", arguments.profile, PROFILES)
        known = [n.exhibit for n in book.notebooks()]
        for exhibit in (arguments.only or "").split(","):
            if exhibit and exhibit not in known:
                raise UnknownName("exhibit", exhibit, known)
        for pair in arguments.data:
            _, separator, data = pair.partition("=")
            if not (separator and data):
                parser.error(f"--data {pair!r} does not read as NAME=folder:PATH")
            if data.startswith("folder:") and not _folder(data).is_dir():
                parser.error(f"--data {pair}: there is no folder {_folder(data)}")
    except UnknownName as error:
        parser.error(str(error))


def _folder(data: str) -> Path:
    return Path(data.removeprefix("folder:")).expanduser().resolve()


def list_notebooks(profile: str) -> None:
    rows = [("exhibit", "notebook", f"cost ({profile})", "title")]
    for n in book.notebooks():
        rows.append((n.exhibit, str(n.path.relative_to(ROOT)), n.cost[profile], n.title))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]
        )


def gpus() -> int:
    """How many GPUs the driver shows; asking torch would take seconds."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return done.stdout.count("GPU ")


def snakemake(arguments: argparse.Namespace) -> list[str]:
    """The command that runs the graph."""
    cores, devices = os.cpu_count() or 1, gpus()
    jobs = arguments.jobs or devices or min(cores, 4)
    data = ",".join(
        f"{name}=folder:{_folder(own)}" if own.startswith("folder:") else f"{name}={own}"
        for name, _, own in (pair.partition("=") for pair in arguments.data)
    )
    threads = max(1, cores // jobs)
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *(
            "--directory",
            str(ROOT),
            "--workflow-profile",
            str(ROOT / "workflow" / arguments.executor),
        ),
        *("--config", f"profile={arguments.profile}", f"threads={threads}"),
        *(f"{key}={value}" for key, value in (("data", data), ("only", arguments.only)) if value),
    ]
    if arguments.executor == "local":
        command += ["--cores", str(threads * jobs), "--resources", f"gpu={jobs}"]
    return command


def dry_run(command: list[str]) -> int:
    plan = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    if plan.returncode:
        print(plan.stdout + plan.stderr, file=sys.stderr)
        return plan.returncode
    jobs = set(re.findall(r"^rule (\w+):", plan.stdout + plan.stderr, re.MULTILINE))
    named = [n for n in book.notebooks() if book.job_name(n.exhibit) in jobs]
    print(
        "\n".join(f"would run {n.exhibit}: {n.title}" for n in named) or "There is nothing to do."
    )
    return 0


def main() -> int:
    arguments = parse()
    if arguments.list:
        list_notebooks(arguments.profile)
        return 0
    command, started = snakemake(arguments), time.monotonic()
    results = Path(os.environ.get("KDLIB_RESULTS") or ROOT / "results") / arguments.profile
    log = Path(os.environ.get("KDLIB_HOME") or ROOT / "runs") / "logs" / "snakemake.log"
    if arguments.dry_run:
        return dry_run(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"Profile {arguments.profile}: {PROFILES[arguments.profile]}.", flush=True)
    try:
        with log.open("w") as file:
            status = subprocess.run(command, stderr=file).returncode
    except KeyboardInterrupt:
        print("\nInterrupted. What is finished is kept; the same command goes on from there.")
        return 130
    if status:
        print(f"Some notebooks failed; the rest is done. What happened: {log}", file=sys.stderr)
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
