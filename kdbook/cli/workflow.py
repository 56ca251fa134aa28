"""The Snakemake command that runs the notebooks, and its process."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from kdbook.cli.notebooks import ROOT
from kdbook.cli.options import chosen


def gpus() -> dict[str, str]:
    """The visible GPUs: their models, by their names for ``CUDA_VISIBLE_DEVICES``."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        found = dict(re.findall(r"^GPU (\d+): (.*?)(?: \(|$)", done.stdout, re.MULTILINE))
    except (OSError, subprocess.CalledProcessError):
        found = {}
    if (shown := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return {name: found.get(name, f"GPU {name}") for name in shown.split(",") if name}
    return found


def jobs_and_threads(asked: int | None) -> tuple[int, int]:
    """How many processes train at the same time, and the threads of each; sets ``$KDLIB_GPUS``.

    One process trains many students on a GPU at the same time, so it gets a whole GPU.
    """
    cores, devices = os.cpu_count() or 1, gpus()
    os.environ["KDLIB_GPUS"] = ",".join(devices)
    jobs = min(asked or cores, len(devices)) if devices else asked or min(cores, 4)
    return jobs, max(1, cores // jobs)


def snakemake(arguments: argparse.Namespace) -> list[str]:
    """The Snakemake command that runs all jobs."""
    only = ",".join(n.exhibit for n in chosen(arguments.only)) if arguments.only else None
    settings = {
        "profile": arguments.profile.name,
        "folder": arguments.profile.folder,
        "only": only,
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
        jobs, settings["threads"] = jobs_and_threads(arguments.jobs)
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
