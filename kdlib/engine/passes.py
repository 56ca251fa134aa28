"""How often teachers label the training images, counted before training begins."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from kdlib.data import count_views
from kdlib.runs import Checkpoint, Run


@dataclass(frozen=True)
class TeacherPasses:
    """Passes of one teacher checkpoint over the training images.

    Attributes:
        uncached: with a teacher that runs beside every student in every epoch.
        cached: the expected number where the logits of one image and view are computed once.
        features: the part of both for methods whose steps run the teacher (``runs_teacher``): no
            cache replaces it. STC runs only the back of the teacher, which counts as a whole pass.
    """

    uncached: int
    cached: float
    features: int

    def saves(self, share: float) -> bool:
        """Whether a cache saves at least this share of the passes that compute logits."""
        return self.cached - self.features <= (1 - share) * (self.uncached - self.features)


def teacher_passes(runs: Iterable[Run]) -> dict[Checkpoint, TeacherPasses]:
    """Passes of every checkpoint that teaches some of these runs.

    After k epochs with different plans a share 1 - (1 - 1/V)^k of the V views of an image has been
    used. Epochs with the same plan, that is of one seed and number, use the same views.
    """
    uncached: dict[Checkpoint, int] = Counter()
    features: dict[Checkpoint, int] = Counter()
    plans: dict[tuple, set] = defaultdict(set)
    for run in runs:
        method = run.method
        for epoch in range(run.recipe.epochs):
            if (checkpoint := method.teacher_at(epoch)) is None:
                continue
            uncached[checkpoint] += method.runs_teacher + method.needs_logits
            features[checkpoint] += method.runs_teacher
            if method.needs_logits:
                plan = (run.seed, run.epochs_before + epoch)
                plans[checkpoint, run.dataset, run.images].add(plan)
    cached: dict[Checkpoint, float] = Counter(features)
    for (checkpoint, data, _), different in plans.items():
        views = count_views(data)
        cached[checkpoint] += views * (1 - (1 - 1 / views) ** len(different))
    return {c: TeacherPasses(uncached[c], cached[c], features[c]) for c in uncached}
