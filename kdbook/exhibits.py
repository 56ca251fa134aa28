"""Exhibit: one table or figure of one paper, with our numbers beside the published ones."""

import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure

from kdbook import figures, provenance, wording
from kdbook.claims import Verdict, as_table, judge
from kdbook.contrasts import interval, possible
from kdbook.profile import Profile
from kdbook.published import all_claims, paper_cells, published, unit_of
from kdlib import files, store
from kdlib.engine.graph import ancestry
from kdlib.errors import UnknownName
from kdlib.store import Trained

NO_EVIDENCE = "smoke run: no evidence"
RECONSTRUCTED = (
    "Some verdicts are on our reading of a part that the paper's text has lost or leaves open "
    "(`docs/decisions.md`)."
)
# Exhibits of this book. The papers publish no numbers to compare with them.
OWN = (
    *("book/start_here", "book/methods"),
    *("stc/cut", "search/control", "kr/figure2", "kr/ablation"),
)


class Exhibit:
    """Collects the cells of one exhibit, then shows, judges and records them.

    Args:
        name: ``<paper>/<table or figure>``, such as ``rco/table2``.
        profile: the profile of its runs.

    Raises UnknownName where no paper has such an exhibit.
    """

    def __init__(self, name: str, profile: Profile):
        if name not in (known := exhibit_names()):
            raise UnknownName("exhibit", name, known)
        self.name, self.profile = name, profile
        self.cells: dict[tuple[str, str], dict[int | None, float]] = {}
        self.failed: dict[str, list[str | tuple[str, str]] | None] = {}
        self.used: dict[str, Trained] = {}
        self.started = time.time()
        self._judged: list[Verdict] | None = None  # None: cells were added since the last verdicts

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
        """Add one cell, with one value for the seed of each result.

        Args:
            results: trained runs. None is skipped: it is a run that failed.
            value: a column of the log, read at the last epoch (no epoch is chosen by the test
                set); or a function of a result; or values by seed.

        Raises ValueError where a seed gets two different values.
        """
        if isinstance(value, str):
            read = lambda trained: trained.final[value]  # noqa: E731
        elif isinstance(value, Mapping):
            read = lambda trained: value[trained.run.seed]  # noqa: E731
        else:
            read = value
        for trained in filter(None, results):
            self.add_runs(trained)
            cell, seed = self.cells.setdefault((row, column), {}), trained.run.seed
            number = float(read(trained))
            if cell.setdefault(seed, number) != number:
                raise ValueError(
                    f"{self.name}: the cell ({row}, {column}) gets two values for seed {seed}, "
                    f"{cell[seed]} and {number}. Add one run for each seed."
                )
        self._judged = None

    def count(self, row: str, column: str, value: float) -> None:
        """Add one cell that is counted, not trained. It is valid in every profile."""
        self.cells[row, column] = {None: float(value)}
        self._judged = None

    def check(
        self, text: str, passed: bool, rows: Iterable[str | tuple[str, str]] | None = None
    ) -> None:
        """Add a check of the experiment itself, such as "the teacher is above its student".

        Where it fails, the experiment cannot test the claims on ``rows`` (None: on all rows), and
        there is no verdict on them. ``rows`` may name cells (row, column) as well.
        """
        before = self.failed.pop(text, [])
        if not passed:
            all_rows = rows is None or before is None
            self.failed[text] = None if all_rows else [*dict.fromkeys([*before, *rows])]
        self._judged = None

    def add_runs(self, *results: Trained | None) -> None:
        """Add runs and all their teachers to the provenance of this exhibit; None is skipped."""
        results = [trained for trained in results if trained]
        self.used |= {trained.run.id: trained for trained in results}
        for run in ancestry(trained.run for trained in results):
            if run.id not in self.used and (record := store.find_record(run)):
                self.used[run.id] = record

    # --- showing ----------------------------------------------------------------------------------

    def long_table(self) -> pd.DataFrame:
        """One row per cell: the paper's value, then mean, spread, 95 % interval and n of ours.

        ``counted`` says whether our value is counted instead of trained.
        """
        paper = paper_cells(self.name)
        rows = []
        for row, column in dict.fromkeys([*paper, *self.cells]):
            cell = self.cells.get((row, column), {})
            values = np.array(list(cell.values()))
            unit, (low, high) = unit_of(self.name, column), interval(values)
            if not possible(low, high, unit):
                low = high = np.nan
            rows.append(
                {
                    "row": row,
                    "column": column,
                    "unit": unit,
                    "paper": paper.get((row, column), {}).get(None, np.nan),
                    "ours": values.mean() if len(values) else np.nan,
                    "spread": values.std(ddof=1) if len(values) > 1 else np.nan,
                    "low": low,
                    "high": high,
                    "n": len(values),
                    "counted": None in cell,
                }
            )
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """The paper's rows, with its number beside ours: mean ± spread over seeds (n)."""
        ours = "ours" if self.profile.faithful else f"ours, {self.profile.name}"
        long = self.long_table()
        wide: dict[tuple[str, str], dict[str, str]] = {}
        for cell in long.itertuples():
            head = cell.column.replace("_", " ")
            if cell.unit.lower() not in cell.column:
                head += f" ({cell.unit})"
            if not np.isnan(cell.paper):
                wide.setdefault((head, "paper"), {})[cell.row] = f"{cell.paper:.6g}"
            if cell.n:
                wide.setdefault((head, ours), {})[cell.row] = wording.cell_text(cell)
        return pd.DataFrame(wide, index=list(dict.fromkeys(long.row))).fillna("–")

    def verdicts(self) -> pd.DataFrame:
        """The claims of this exhibit and our verdicts on them.

        ``power`` is the probability of a verdict for the claim if the paper's gap were true here.
        """
        return wording.verdict_table(self._verdicts())

    def _verdicts(self) -> list[Verdict]:
        if self._judged is None:
            self._judged = judge(self.name, self.cells, self.profile.scale, self.failed)
        return self._judged

    def figure(self, figure: Figure, data: pd.DataFrame, alt: str, name: str = "figure") -> None:
        """Save a figure as PNG and SVG, and its numbers as CSV.

        Args:
            data: the plotted numbers.
            alt: a description of the figure for readers who cannot see it.
        """
        self._stamp(figure)
        about = self.provenance() | {"alt": alt}
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()}
        for kind, metadata in (("png", text), ("svg", {"Description": alt, "Date": None})):
            buffer = io.BytesIO()
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
        """Save an animation as GIF and return its content.

        Args:
            draw: draws one frame on the cleared figure.
            alt: a description of the animation for readers who cannot see it.
            seconds: duration of one frame.
        """

        def draw_stamped(frame: Any) -> None:
            figure.clear()
            draw(frame)
            self._stamp(figure)

        with TemporaryDirectory() as folder:
            path = Path(folder) / "frames.gif"
            moving = FuncAnimation(figure, draw_stamped, list(frames), interval=1000 * seconds)
            moving.save(path, writer="pillow")
            content = path.read_bytes()
        self._write(f"{name}.gif", content, self.provenance() | {"alt": alt})
        return content

    @property
    def _is_evidence(self) -> bool:
        """Counted numbers are evidence in every profile, trained ones in some."""
        return self.profile.evidence or not self.used

    def _stamp(self, figure: Figure) -> None:
        if not self._is_evidence:
            figures.stamp(figure, NO_EVIDENCE)

    # --- recording --------------------------------------------------------------------------------

    def record(self) -> str:
        """Write table, verdicts and provenance, copy the records of all runs; return a footer.

        The footer names the checks that failed.

        Raises StoreError where the results folder cannot be written. No run is lost then.
        """
        about = self.provenance()
        if self.cells:
            warning = "" if self._is_evidence else f"\n**{NO_EVIDENCE}.**\n"
            if any(v.reconstruction and v.verdict != "not run" for v in self._verdicts()):
                warning += f"\n{RECONSTRUCTED}\n"
            title = f"# {self.name}, profile {self.profile.folder}, {about['data'] or 'no data'}\n"
            text = f"{title}{warning}\n{wording.markdown(self.table())}\n"
            self._write("table.csv", self.long_table().to_csv(index=False), about)
            self._write("table.md", text, about)
            self._write("verdicts.csv", as_table(self._verdicts()).to_csv(index=False), about)
        for trained in self.used.values():
            store.copy_record(trained, files.results() / self.profile.folder / "records")
        return (
            f"{self.name} · commit {about['commit']} · profile {self.profile.folder} · "
            f"data {about['data'] or 'none'} · seeds {about['seeds']} · {about['device']} · "
            f"{about['wall_seconds']:.0f} s"
            + "".join(f"\n{wording.failure_text(*failure)}" for failure in self.failed.items())
        )

    def provenance(self) -> dict:
        """The notebook, the profile, the commit, the runs and the versions of this exhibit."""
        return {
            "exhibit": self.name,
            "notebook": provenance.notebook_of(self.name).relative_to(files.ROOT).as_posix(),
            "profile": self.profile.name,
            "evidence": self.profile.evidence,
            "commit": provenance.current_commit(),
            **provenance.of_runs(self.used.values()),
            "wall_seconds": round(time.time() - self.started, 1),
            **provenance.of_machine(),
        }

    def _write(self, name: str, content: bytes | str, about: dict) -> None:
        provenance.write(self.folder / name, content, about)


def exhibit_names() -> list[str]:
    """All tables and figures with published values or claims, and the exhibits of this book."""
    with_claims = {claim["exhibit"] for claim in all_claims()}
    return sorted(with_claims | set(published().exhibit) | set(OWN))
