"""The notebooks of the book, in reading order, and what each says of itself."""

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCORECARD = "book/scorecard"
UNITS = {"min": 60, "h": 3600, "day": 86_400}


@dataclass(frozen=True)
class Notebook:
    """A notebook of the book.

    Attributes:
        exhibit: what it reproduces, such as ``rco/table1``.
        cost: expected time by profile, measured or said to be an estimate.
        trains: whether it calls ``train``.
    """

    path: Path
    exhibit: str
    title: str
    cost: dict[str, str]
    trains: bool

    def seconds(self, profile: str) -> int:
        """About what its cost says; 0 where that names no time, as in "the same"."""
        time = rf"(under )?(\d+|a|two) ({'|'.join(UNITS)})"
        if not (found := re.search(time, self.cost[profile])):
            return 0
        under, number, unit = found.groups()
        seconds = UNITS[unit] * ({"a": 1, "two": 2}.get(number) or int(number))
        return seconds // 2 if under else seconds


def notebooks() -> list[Notebook]:
    """All notebooks in reading order, the scorecard last."""
    found = []
    for path in [*ROOT.glob("notebooks/[0-9]*.ipynb"), *ROOT.glob("notebooks/*/[0-9]*.ipynb")]:
        content = json.loads(path.read_text())
        about = content["metadata"]["kdlib"]
        code = ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]
        trains = any(re.search(r"\btrain\(", source) for source in code)
        found.append(Notebook(path, about["exhibit"], about["title"], about["cost"], trains))
    chapters = ["book", "rco", "stc", "search", "kr"]
    return sorted(
        found,
        key=lambda n: (
            n.exhibit == SCORECARD, chapters.index(n.exhibit.partition("/")[0]), n.path.name,
        ),
    )  # fmt: skip


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a program that works on a notebook, its parameters as a dictionary."""
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON")
    arguments = parser.parse_args()
    pairs = (pair.partition("=") for pair in arguments.set)
    arguments.parameters = {name: json.loads(value) for name, _, value in pairs}
    return arguments


def job_name(exhibit: str) -> str:
    """The name of an exhibit's job in the graph."""
    return exhibit.replace("/", "_")


def code_hash() -> str:
    """Hash of everything besides the notebook that an exhibit is computed from."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("kdlib/**/*.py"), *ROOT.glob("results/published/*")]):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
