"""Checks of a training notebook: whether its networks have learned at all.

A failed check withholds verdicts (``Exhibit.check``), in no profile does it stop the notebook.
Means are over seeds, at the last epoch.

A check compares means and asks for no interval. It asks about the networks that were trained, not
about all networks that could be trained: was this teacher better than this student? Their numbers
are known. A bound would mostly ask for the number of seeds: with two seeds, a teacher that is two
points better has a lower bound below zero. A check can only take verdicts away, so it cannot make
wrong verdicts more frequent. ``docs/verdicts.md`` says the same to the reader.
"""

from collections.abc import Iterable, Mapping, Sequence

from kdbook.exhibits import Exhibit
from kdlib.data import load_data
from kdlib.store import Trained

Concerned = Iterable[str | tuple[str, str]]  # rows, or cells (row, column)
Results = Iterable[Trained | None]


def teacher_above_student(
    exhibit: Exhibit, teacher: Results, student: Results, rows: Concerned | None = None
) -> None:
    """Check that the teacher is more accurate than the student that learns from labels.

    The two are paired by seed: a seed that lacks one of them is left out.

    Args:
        rows: those that learn from this teacher; None for all.
    """
    above, below = _by_seed(teacher), _by_seed(student)
    seeds = sorted(above.keys() & below.keys())
    gaps = [above[seed] - below[seed] for seed in seeds]
    text = (
        f"The teacher ({_mean(above, seeds):.1f} %) is above the student from labels "
        f"({_mean(below, seeds):.1f} %); seeds: {sum(g > 0 for g in gaps)} of {len(seeds)}."
    )
    exhibit.check(text, sum(gaps) > 0, rows)


def above_chance(
    exhibit: Exhibit,
    results: Mapping[str, Results],
    all_rows: bool = False,
    columns: Iterable[str] = (),
) -> None:
    """Check for each row that its networks are more accurate than guessing, 1 / classes.

    Args:
        all_rows: whether a failure concerns all rows: the names in ``results`` are no rows.
        columns: the columns that a failure concerns; none for all.
    """
    for row, trained in results.items():
        if some := [t for t in trained if t]:
            chance = 100 / load_data(some[0].run.dataset, "test").classes
            mean = _mean(_by_seed(some))
            text = f"{row} ({mean:.1f} %) is above chance ({chance:.1f} %)."
            exhibit.check(text, mean > chance, _concerned(row, all_rows, columns))


def within_budget(
    exhibit: Exhibit,
    costs: Mapping[str, Sequence[float]],
    budget: float,
    unit: str,
    all_rows: bool = False,
    columns: Iterable[str] = (),
    at_least: float = 0.0,
) -> None:
    """Check for each row that none of its costs, one for each seed, exceeds the budget.

    A row without costs is skipped: its runs failed. ``all_rows``, ``columns`` as in
    ``above_chance``.

    Args:
        at_least: the share of the budget that each cost must use. A network that costs less than
            its rivals is not compared with them at one budget.
    """
    for row, several in costs.items():
        if several:
            low, high = min(several), max(several)
            text = f"{row}: at most {high:g} {unit}, within the budget of {budget:g}."
            if at_least:
                text = f"{row}: {low:.4g} to {high:.4g} {unit}, {100 * at_least:g} to 100 % of the "
                text += f"budget of {budget:.4g}."
            passed = at_least * budget <= low and high <= budget
            exhibit.check(text, passed, _concerned(row, all_rows, columns))


def _concerned(row: str, all_rows: bool, columns: Iterable[str]) -> Concerned | None:
    return None if all_rows else [(row, column) for column in columns] or [row]


def _by_seed(results: Results) -> dict[int, float]:
    return {t.run.seed: t.final["test_top1"] for t in results if t}


def _mean(values: Mapping[int, float], seeds: Iterable[int] | None = None) -> float:
    chosen = [values[seed] for seed in (values if seeds is None else seeds)]
    return sum(chosen) / len(chosen) if chosen else float("nan")
