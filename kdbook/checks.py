"""Checks of a training notebook: whether its networks have learned at all.

A failed check withholds verdicts (``Exhibit.check``), in no profile does it stop the notebook.
Means are over seeds, at the last epoch.
"""

from collections.abc import Iterable, Mapping, Sequence

from kdbook.exhibits import Exhibit
from kdlib.data import load_data
from kdlib.store import Trained

Results = Iterable[Trained | None]


def teacher_above_student(
    exhibit: Exhibit, teacher: Results, student: Results, rows: Iterable[str] | None = None
) -> None:
    """Check that the teacher is more accurate than the student that learns from labels.

    Args:
        rows: those that learn from this teacher; None for all.
    """
    above, below = _accuracy(teacher), _accuracy(student)
    text = f"The teacher ({above:.1f} %) is above the student from labels ({below:.1f} %)."
    exhibit.check(text, above > below, rows)


def above_chance(exhibit: Exhibit, results: Mapping[str, Results], all_rows: bool = False) -> None:
    """Check for each row that its networks are more accurate than guessing, 1 / classes.

    Args:
        all_rows: whether a failure concerns all rows: the names in ``results`` are no rows.
    """
    for row, trained in results.items():
        some = [t for t in trained if t]
        if some:
            chance = 100 / load_data(some[0].run.dataset, "test").classes
            text = f"{row} ({_accuracy(some):.1f} %) is above chance ({chance:.1f} %)."
            exhibit.check(text, _accuracy(some) > chance, None if all_rows else [row])


def within_budget(
    exhibit: Exhibit,
    costs: Mapping[str, Sequence[float]],
    budget: float,
    unit: str,
    all_rows: bool = False,
) -> None:
    """Check for each row that none of its costs, one for each seed, exceeds the budget.

    A row without costs is skipped: its runs failed. ``all_rows`` as in ``above_chance``.
    """
    for row, several in costs.items():
        if several:
            text = f"{row}: at most {max(several):g} {unit}, within the budget of {budget:g}."
            exhibit.check(text, max(several) <= budget, None if all_rows else [row])


def _accuracy(results: Results) -> float:
    values = [t.final["test_top1"] for t in results if t]
    return sum(values) / len(values) if values else float("nan")
