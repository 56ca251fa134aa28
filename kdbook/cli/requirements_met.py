"""Exit 0 if this Python environment satisfies pyproject.toml, 1 if not.

With ``--installed-here``: if the installed kdlib is the one of this checkout.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def missing() -> list[str]:
    """Requirements, the test extra's included, that the environment does not satisfy."""
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
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    spec = find_spec("kdlib")
    return spec is not None and Path(spec.origin).resolve().parent.parent == ROOT


if __name__ == "__main__":
    try:
        met = installed_here() if "--installed-here" in sys.argv else not missing()
    except ImportError:
        met = False
    sys.exit(not met)
