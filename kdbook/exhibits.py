"""Exhibit: one table or figure of one paper, our numbers beside the published ones."""

import hashlib
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure

from kdbook import figures
from kdbook.claims import Verdict, all_claims, as_table, interval, judge, paper_cells, published
from kdbook.profiles import Profile
from kdlib import files, store
from kdlib.data import display_name
from kdlib.errors import UnknownName
from kdlib.store import Trained

NO_EVIDENCE = "smoke run: no evidence"
RECONSTRUCTED = "By a reconstruction: the paper's formulas are lost (`docs/decisions.md`, KR)."
# Exhibits of the book itself: nothing is published to compare them with.
OWN = ("book/start_here", "stc/cut", "search/control", "kr/figure2", "kr/ablation")
PACKAGES = ("torch", "numpy", "pandas", "scikit-learn", "matplotlib", "scipy")


class Exhibit:
    """Collects the cells of one exhibit, then shows, judges and records them.

    Args:
        name: ``<paper>/<table or figure>``, such as ``rco/table2``.
        profile: the profile in which its runs were made.

    Raises UnknownName where no paper has such an exhibit.
    """

    def __init__(self, name: str, profile: Profile):
        if name not in (known := exhibit_names()):
            raise UnknownName("exhibit", name, known)
        self.name, self.profile = name, profile
        self.cells: dict[tuple[str, str], dict[int | None, float]] = {}
        self.used: dict[str, Trained] = {}
        self.started = time.time()

    @property
    def folder(self) -> Path:
        return files.results() / self.profile.folder / self.name

    # --- collecting -------------------------------------------------------------------------------

    def add(
        self,
        row: str,
        column: str,
        results: Iterable[Trained | None],
        value: str | Callable[[Trained], float] | Mapping[int, float],
    ) -> None:
        """One cell, one value per seed: a column of the last epoch's log, what a function says of
        each result, or a mapping of seeds.

        The last epoch is what counts; nothing is chosen by the test set. None, for what failed, is
        passed over.
        """
        if isinstance(value, str):
            read = lambda trained: trained.final[value]  # noqa: E731
        elif isinstance(value, Mapping):
            read = lambda trained: value[trained.run.seed]  # noqa: E731
        else:
            read = value
        for trained in filter(None, results):
            self.uses(trained)
            cell, number = self.cells.setdefault((row, column), {}), float(read(trained))
            if cell.setdefault(trained.run.seed, number) != number:
                raise ValueError(f"{row}, {column} has two values of seed {trained.run.seed}.")

    def count(self, row: str, column: str, value: float) -> None:
        """One cell that is counted, not trained: it holds in every profile."""
        self.cells[row, column] = {None: float(value)}

    def uses(self, *results: Trained) -> None:
        """Name runs as part of this exhibit's provenance, their teachers included."""
        for trained in results:
            self.used[trained.run.id] = trained
            for teacher, _ in trained.run.parents:
                if teacher.id not in self.used and (record := store.find_record(teacher)):
                    self.uses(record)

    # --- showing ----------------------------------------------------------------------------------

    def long_table(self) -> pd.DataFrame:
        """Every cell in a row: the paper's value, our mean, spread, 95 % interval and n, and
        whether ours was counted instead of trained."""
        paper = paper_cells(self.name)
        units = published()[published().exhibit == self.name].groupby("column").unit.first()
        rows = []
        for row, column in dict.fromkeys([*paper, *self.cells]):
            values = np.array(list(self.cells.get((row, column), {}).values()))
            low, high = interval(values)
            rows.append(
                {
                    "row": row,
                    "column": column,
                    "unit": units.get(column, ""),
                    "paper": paper.get((row, column), {}).get(None, np.nan),
                    "ours": values.mean() if len(values) else np.nan,
                    "spread": values.std(ddof=1) if len(values) > 1 else np.nan,
                    "low": low,
                    "high": high,
                    "n": len(values),
                    "counted": None in self.cells.get((row, column), {}),
                }
            )
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """Rows as in the paper, the paper's number beside ours: mean ± spread over seeds (n)."""
        long = self.long_table()
        wide: dict[tuple[str, str], dict[str, str]] = {}
        for cell in long.itertuples():
            head = cell.column.replace("_", " ")
            if cell.unit.lower() not in cell.column:
                head += f" ({cell.unit})"
            if not np.isnan(cell.paper):
                wide.setdefault((head, "paper"), {})[cell.row] = _number(cell.paper)
            if cell.n:
                wide.setdefault((head, self._ours), {})[cell.row] = _measured(cell)
        return pd.DataFrame(wide, index=list(dict.fromkeys(long.row))).fillna("–")

    @property
    def _ours(self) -> str:
        return "ours" if self.profile.faithful else f"ours, {self.profile.name}"

    @property
    def _verdicts(self) -> list[Verdict]:
        return judge(self.name, self.cells, self.profile.faithful)

    def verdicts(self) -> pd.DataFrame:
        """The claims of this exhibit and what our numbers say of them."""
        table = as_table(self._verdicts)
        shown = pd.DataFrame(
            {
                "claim": [claimed(v) for v in self._verdicts],
                "kind": table.kind,
                "ours": [_bounded(v) for v in self._verdicts],
                "paper": table.paper.map(lambda x: "" if np.isnan(x) else f"{x:.4g}"),
                "n": table.n,
                "verdict": [worded(v) for v in self._verdicts],
            }
        )
        return shown.set_index("claim")

    def figure(self, figure: Figure, data: pd.DataFrame, alt: str, name: str = "figure") -> None:
        """Save a figure as PNG, SVG and the CSV of what it plots, and show it where there is one.

        Args:
            data: the plotted numbers.
            alt: what the figure shows, for who cannot see it.
        """
        if self.used and not self.profile.evidence:
            figures.stamp(figure, NO_EVIDENCE)
        about = self.provenance() | {"alt": alt}
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
            metadata = text if kind == "png" else {"Description": alt, "Date": None}
            figure.savefig(buffer, format=kind, metadata=metadata)
            self._write(f"{name}.{kind}", buffer.getvalue(), about)
        self._write(f"{name}.csv", data.to_csv(index=False), about)

    def animation(
        self,
        figure: Figure,
        draw: Callable[[Any], None],
        frames: Iterable,
        alt: str,
        name: str = "animation",
        seconds: float = 0.6,
    ) -> bytes:
        """Save as GIF what ``draw`` makes of the figure for every frame, and return it.

        Args:
            alt: what it shows, for who cannot see it.
            seconds: of one frame.
        """

        def draw_stamped(frame: Any) -> None:
            figure.clear()
            draw(frame)
            if self.used and not self.profile.evidence:
                figures.stamp(figure, NO_EVIDENCE)

        with TemporaryDirectory() as folder:
            path = Path(folder) / "frames.gif"
            moving = FuncAnimation(figure, draw_stamped, list(frames), interval=1000 * seconds)
            moving.save(path, writer="pillow")
            content = path.read_bytes()
        self._write(f"{name}.gif", content, self.provenance() | {"alt": alt})
        return content

    # --- recording --------------------------------------------------------------------------------

    def record(self) -> str:
        """Write table, verdicts, provenance and the records of all runs used; return the footer.

        Raises StoreError where the results folder cannot be written; the runs are safe all the
        same.
        """
        about = self.provenance()
        if self.cells:
            warning = "" if self.profile.evidence or not self.used else f"\n**{NO_EVIDENCE}.**\n"
            if any(verdict.reconstruction for verdict in self._verdicts):
                warning += f"\n{RECONSTRUCTED}\n"
            title = f"# {self.name}, profile {self.profile.folder}, {about['data'] or 'no data'}\n"
            self._write("table.csv", self.long_table().to_csv(index=False), about)
            self._write("table.md", f"{title}{warning}\n{_markdown(self.table())}\n", about)
            self._write("verdicts.csv", as_table(self._verdicts).to_csv(index=False), about)
        records = files.results() / self.profile.folder / "records"
        for trained in self.used.values():
            store.copy_record(trained.run, records)
        return (
            f"{self.name} · commit {about['commit']} · profile {self.profile.folder} · "
            f"data {about['data'] or 'none'} · seeds {about['seeds']} · {about['device']} · "
            f"{about['wall_seconds']:.0f} s"
        )

    def provenance(self) -> dict:
        """Where this exhibit's files come from."""
        runs = [trained.run for trained in self.used.values()]
        environments = [trained.summary["environment"] for trained in self.used.values()]
        return {
            "exhibit": self.name,
            "notebook": notebook_of(self.name).relative_to(files.ROOT).as_posix(),
            "profile": self.profile.name,
            "evidence": self.profile.evidence,
            "commit": current_commit(),
            "runs": sorted(self.used),
            "seeds": sorted({run.seed for run in runs}),
            "data": ", ".join(sorted({display_name(run.data) for run in runs})),
            "data_sets": sorted({run.data for run in runs}),
            "device": ", ".join(sorted({e["device"] for e in environments})) or "none needed",
            "training_seconds": round(sum(t.summary["seconds"] for t in self.used.values()), 1),
            "peak_memory_mb": max((e["peak_memory_mb"] for e in environments), default=0),
            "wall_seconds": round(time.time() - self.started, 1),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _write(self, name: str, content: bytes | str, about: dict) -> None:
        """A file and, beside it, its provenance with the file's hash."""
        content = content.encode() if isinstance(content, str) else content
        about = about | {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        files.write_atomic(self.folder / name, content)
        files.write_atomic(self.folder / f"{name}.json", json.dumps(about, indent=1) + "\n")


def exhibit_names() -> list[str]:
    """All tables and figures that have published values or claims, and the book's own."""
    claimed = {claim["exhibit"] for claim in all_claims()}
    return sorted(claimed | set(published().exhibit) | set(OWN))


def notebook_of(exhibit: str) -> Path:
    """Where the notebook of an exhibit lies, by the number it has in reading order."""
    paper, _, name = exhibit.partition("/")
    found = sorted((files.ROOT / "notebooks").glob(f"{paper}/[0-9]*_{name}.ipynb"))
    found += sorted((files.ROOT / "notebooks").glob(f"[0-9]*_{name}.ipynb"))
    return found[0] if found else files.ROOT / "notebooks" / f"{exhibit}.ipynb"


def current_commit() -> str:
    """The commit at work, with ``+`` where code or notebooks differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", files.ROOT, *words]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git on this machine
            return ""

    changed = git("status", "--porcelain", "--", "kdlib", "notebooks", "results/published")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _measured(cell) -> str:
    """Ours as text: a count as it is, a measured mean ± spread over seeds and how many."""
    if cell.counted:
        return _number(cell.ours) if cell.ours == int(cell.ours) else f"{cell.ours:.5g}"
    digits = 2 if abs(cell.ours) >= 1 else 3
    if cell.n == 1:
        return f"{cell.ours:.{digits}f} (1)"
    return f"{cell.ours:.{digits}f} ± {cell.spread:.{digits}f} ({cell.n})"


def _bounded(verdict: Verdict) -> str:
    if np.isnan(verdict.estimate):
        return ""
    text = f"{verdict.estimate:+.3g}"
    if verdict.kind == "value":
        text += " from paper"
    return text if np.isnan(verdict.low) else f"{text} [{verdict.low:+.3g}, {verdict.high:+.3g}]"


def claimed(verdict: Verdict) -> str:
    """The claim's sentence; of a value, also which."""
    if verdict.kind != "value":
        return verdict.says
    return f"{verdict.says.rstrip('.')}: {verdict.id.split('/', 3)[3]}"


def worded(verdict: Verdict) -> str:
    """The verdict and, where it is of the direction only, on which side our estimate lies."""
    only = verdict.verdict
    if verdict.reconstruction and only == "direction only":
        only = "reconstruction, direction only"
    if verdict.verdict != "direction only" or verdict.as_claimed not in (True, False):
        return only
    if verdict.as_claimed:
        side = "as claimed"
    elif verdict.kind == "equal":
        side = "not equal"
    elif verdict.estimate == 0:
        side = "a tie"
    else:
        side = "weaker than claimed" if verdict.estimate > 0 else "opposite"
    return f"{only}: {side}"


def _markdown(table: pd.DataFrame) -> str:
    heads = ["", *(" · ".join(column) for column in table.columns)]
    rows = [[str(row), *map(str, values)] for row, *values in table.itertuples()]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
