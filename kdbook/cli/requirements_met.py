"""Exit with 0 if this Python environment satisfies pyproject.toml; else print what it lacks.

The exit status is then 1. With ``--installed-here``: exit with 0 if the installed packages are
those of this checkout. This file is run by its path, before the packages are installed, so it
imports none of them.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def missing() -> list[str]:
    """Requirements that the environment does not satisfy, those of the extra ``test`` included."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unmet = []
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        requirement = Requirement(line)
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                unmet.append(line)
        except PackageNotFoundError:
            unmet.append(line)
    return unmet


def installed_here() -> bool:
    """Whether kdlib and kdbook are installed from this checkout."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    specs = [find_spec(package) for package in ("kdlib", "kdbook")]
    return all(spec and Path(spec.origin).resolve().parents[1] == ROOT for spec in specs)


if __name__ == "__main__":
    if "--installed-here" in sys.argv:
        sys.exit(not installed_here())
    try:
        lacks = missing()
    except ImportError as error:
        lacks = [error.name]
    if lacks:
        print(", ".join(lacks))
    sys.exit(bool(lacks))
