"""What training costs, counted before it starts."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from kdlib.data import count_views
from kdlib.methods.distill import Anchor
from kdlib.runs import Run


@dataclass(frozen=True)
class TeacherPasses:
    """A teacher checkpoint's passes over the training images.

    Attributes:
        live: with a teacher that runs beside every student in every epoch.
        banked: the expected number where labels of one image and view are computed once.
        features: those among both of a method whose teacher is ``live``; no bank replaces them. One
            of which only the back runs, as in STC, counts whole.
    """

    live: int
    banked: float
    features: int

    def worth(self, share: float) -> bool:
        """Whether a bank saves at least so much of the passes for labels."""
        return self.banked - self.features <= (1 - share) * (self.live - self.features)


def teacher_passes(runs: Iterable[Run]) -> dict[Anchor, TeacherPasses]:
    """TeacherPasses of every checkpoint that labels some of these runs.

    After k epochs of different plans a fraction 1 - (1 - 1/V)^k of an image's V views has been
    seen; epochs of one plan, that is of one seed and number, see the same ones.
    """
    live: dict[Anchor, int] = Counter()
    features: dict[Anchor, int] = Counter()
    plans: dict[tuple, set] = defaultdict(set)
    for run in runs:
        for epoch in range(run.recipe.epochs):
            if (anchor := run.method.teacher_at(epoch)) is None:
                continue
            live[anchor] += run.method.live + run.method.labelled
            features[anchor] += run.method.live
            if run.method.labelled:
                plans[anchor, run.data, run.images].add((run.seed, run.epochs_before + epoch))
    banked: dict[Anchor, float] = Counter(features)
    for (anchor, data, _), different in plans.items():
        views = count_views(data)
        banked[anchor] += views * (1 - (1 - 1 / views) ** len(different))
    return {a: TeacherPasses(live[a], banked[a], features[a]) for a in live}


def ancestry(runs: Iterable[Run]) -> list[Run]:
    """These runs and all that they learn or start from, each once, the oldest first."""
    found: dict[str, Run] = {}

    def visit(run: Run) -> None:
        if run.id not in found:
            for parent in {teacher.id: teacher for teacher, _ in run.parents}.values():
                visit(parent)
            found[run.id] = run

    for run in runs:
        visit(run)
    return list(found.values())
