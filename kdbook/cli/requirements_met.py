"""Exit with 0 if this Python environment satisfies pyproject.toml, with 1 if it does not.

With ``--installed-here``: exit with 0 if the installed packages are those of this checkout. This
file is run by its path, before the packages are installed, so it imports none of them.
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
    try:
        met = installed_here() if "--installed-here" in sys.argv else not missing()
    except ImportError:
        met = False
    sys.exit(not met)
