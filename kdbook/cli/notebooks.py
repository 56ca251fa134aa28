"""The notebooks of the book in reading order, with their metadata."""

import argparse
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

# Not from kdlib.files: kdlib imports torch, and most programs here do not need it.
ROOT = Path(__file__).resolve().parents[2]
SCORECARD = "book/scorecard"
CHAPTERS = ["book", "rco", "stc", "search", "kr"]
UNITS = {"min": 60, "h": 3600, "day": 86_400}


@dataclass(frozen=True)
class Notebook:
    """A notebook of the book.

    Attributes:
        exhibit: the table or figure that it reproduces, such as ``rco/table1``.
        cost: expected time by profile name; an estimate is marked as one.
        trains: whether a code cell calls ``train``.
    """

    path: Path
    exhibit: str
    title: str
    cost: dict[str, str]
    trains: bool

    @property
    def name(self) -> str:
        """Folder and file name, such as ``rco/02_table1``: progress lines show it."""
        return label(self.path)

    @property
    def job(self) -> str:
        """Name of the notebook's job in the Snakefile."""
        return self.exhibit.replace("/", "_")

    def seconds(self, profile_name: str) -> int:
        """Expected time in seconds; 0 if the cost names no time, as in "the same"."""
        time = rf"(under )?(\d+|a|two) ({'|'.join(UNITS)})"
        if not (found := re.search(time, self.cost[profile_name])):
            return 0
        under, number, unit = found.groups()
        seconds = UNITS[unit] * ({"a": 1, "two": 2}.get(number) or int(number))
        return seconds // 2 if under else seconds


def label(path: Path) -> str:
    """Folder and file name of a notebook, such as ``rco/02_table1``."""
    return f"{path.parent.name}/{path.stem}"


def all_notebooks() -> list[Notebook]:
    """All notebooks in reading order; the scorecard is the last."""
    found = []
    for path in [*ROOT.glob("notebooks/[0-9]*.ipynb"), *ROOT.glob("notebooks/*/[0-9]*.ipynb")]:
        content = json.loads(path.read_text())
        about = content["metadata"]["kdlib"]
        code = ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]
        trains = any(re.search(r"\btrain\(", source) for source in code)
        found.append(Notebook(path, about["exhibit"], about["title"], about["cost"], trains))

    def place(notebook: Notebook) -> tuple:
        chapter = notebook.exhibit.partition("/")[0]
        return notebook.exhibit == SCORECARD, CHAPTERS.index(chapter), notebook.path.name

    return sorted(found, key=place)


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of a program that works on one notebook.

    Adds the option ``--set NAME=JSON``; ``parameters`` of the result is a dictionary of all pairs.
    """
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=JSON",
        help="value of a notebook parameter; repeat the option for several parameters",
    )  # fmt: skip
    arguments = parser.parse_args()
    pairs = (pair.partition("=") for pair in arguments.set)
    arguments.parameters = {name: json.loads(value) for name, _, value in pairs}
    return arguments


def code_hash() -> str:
    """Hash of the files, besides the notebook, that decide the content of an exhibit.

    The command line is not among them: it starts a notebook and does not change its numbers.
    """
    code = [p for package in ("kdlib", "kdbook") for p in ROOT.glob(f"{package}/**/*.py")]
    code = [path for path in code if not path.is_relative_to(ROOT / "kdbook" / "cli")]
    digest = hashlib.sha256()
    for path in sorted([*code, *ROOT.glob("results/published/*")]):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
