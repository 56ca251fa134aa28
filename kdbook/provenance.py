"""Provenance: the commit, the runs, the data, the device and the versions behind a file."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from kdlib import files
from kdlib.data import display_name
from kdlib.store import Trained

PACKAGES = ("torch", "numpy", "pandas", "scikit-learn", "matplotlib", "scipy")
# Files outside this list do not change the numbers of an exhibit.
SOURCES = ("kdlib", "kdbook", "notebooks", "results/published")


def of_runs(results: Collection[Trained]) -> dict:
    """Ids, seeds, data, devices, training time and memory of runs."""
    runs = [trained.run for trained in results]
    environments = [trained.summary["environment"] for trained in results]
    return {
        "runs": sorted(run.id for run in runs),
        "seeds": sorted({run.seed for run in runs}),
        "data": ", ".join(sorted({display_name(run.data) for run in runs})),
        "data_sets": sorted({run.dataset for run in runs}),
        "device": ", ".join(sorted({e["device"] for e in environments})) or "none needed",
        "training_seconds": round(sum(t.summary["seconds"] for t in results), 1),
        "peak_memory_mb": max((e["peak_memory_mb"] for e in environments), default=0),
    }


def of_machine() -> dict:
    """Versions of Python and of the packages, and the present time."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def current_commit() -> str:
    """The commit of the checkout, with ``+`` where ``SOURCES`` differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", files.ROOT, *words]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            return ""

    changed = git("status", "--porcelain", "--", *SOURCES)
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def notebook_of(exhibit: str) -> Path:
    """Path of the notebook of an exhibit; its name begins with a number."""
    paper, _, name = exhibit.partition("/")
    folder = files.ROOT / "notebooks"
    found = [*folder.glob(f"{paper}/[0-9]*_{name}.ipynb"), *folder.glob(f"[0-9]*_{name}.ipynb")]
    return found[0] if found else folder / f"{exhibit}.ipynb"


def write(path: Path, content: bytes | str, about: dict) -> None:
    """Write a file, and beside it ``<name>.json`` with ``about`` and the hash of the file.

    Raises StoreError where the folder cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    about = about | {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    files.write_atomic(path, content)
    files.write_atomic(path.with_name(f"{path.name}.json"), json.dumps(about, indent=1) + "\n")
