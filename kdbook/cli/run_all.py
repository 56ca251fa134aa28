"""Train the networks of one profile and write every table and figure of the book."""

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from kdbook.cli.forecast import table
from kdbook.cli.notebooks import ROOT, all_notebooks
from kdbook.cli.options import parse
from kdbook.cli.slice import run_slice
from kdbook.cli.verify import NOT_VERIFIED, run_verify
from kdbook.cli.workflow import run, snakemake
from kdbook.profiles import PROFILES
from kdlib import files
from kdlib.errors import KdlibError

NEXT = "./run_all.sh --profile laptop on a CPU or --profile course on a GPU, or "


def list_notebooks(profile_name: str) -> None:
    rows = [("exhibit", "notebook", f"time ({profile_name})", "title")]
    for n in all_notebooks():
        rows.append((n.exhibit, str(n.path.relative_to(ROOT)), n.cost[profile_name], n.title))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # no spaces after the titles
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


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
    times = "\n".join(f"{name:8}{profile.cost}" for name, profile in PROFILES.items())
    print(f"""
The expected time of the whole book:

{times}

The full cost of each profile, from an empty store. Each run is counted once. A greedy search is
counted as four training stages, but it can take eight. An epoch is one pass over the training
images. Peer epochs train a second network together with the student. Teacher passes are forward
passes of the teachers over the training images, first without and then with the cache of their
logits.

{table(PROFILES, data)}

A route is a teacher's checkpoints along its training, and its logits. Routes need most of the disk
space; the option --keep-route reduces it.""")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Verify recorded runs; the exit status. The folder of the training is removed in any case."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_verify(arguments)
    except KdlibError as error:
        print(error, file=sys.stderr)
        return NOT_VERIFIED
    except KeyboardInterrupt:
        print("\nInterrupted. The same command begins again.", file=sys.stderr)
        return 130


def main() -> int:
    arguments = parse()
    if arguments.verify is not None:
        return verify(arguments)
    profile = arguments.profile
    if arguments.list:
        list_notebooks(profile.name)
        return 0
    if arguments.minutes and not arguments.dry_run:
        try:
            return run_slice(arguments)
        except KdlibError as error:
            print(error, file=sys.stderr)
            return 1
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
Next: {NEXT if profile.name == "smoke" else ""}\
{Path(sys.executable).parent / "jupyter"} lab notebooks/00_start_here.ipynb""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
