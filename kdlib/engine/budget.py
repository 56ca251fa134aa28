"""What training costs, counted before it starts."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from kdlib.data import count_views
from kdlib.methods.distill import Anchor
from kdlib.runs import Run


@dataclass(frozen=True)
class Sweeps:
    """A teacher checkpoint's passes over the training images.

    Attributes:
        live: with a teacher that runs beside every student in every epoch.
        banked: the expected number where labels of one image and view are computed once.
    """

    live: int
    banked: float


def label_sweeps(runs: Iterable[Run]) -> dict[Anchor, Sweeps]:
    """Sweeps of every checkpoint that labels some of these runs.

    After k epochs of different plans a fraction 1 - (1 - 1/V)^k of an image's V views has been
    seen; epochs of one plan, that is of one seed and number, see the same ones.
    """
    asked: dict[Anchor, list[tuple]] = defaultdict(list)
    for run in runs:
        for epoch in range(run.recipe.epochs):
            if (anchor := run.method.labeller(epoch)) is not None:
                plan = (run.data, run.images, run.seed, run.epochs_before + epoch, run.recipe.batch)
                asked[anchor].append((plan, run.method.live))
    sweeps = {}
    for anchor, epochs in asked.items():
        live = sum(is_live for _, is_live in epochs)  # features are never banked
        plans = {plan for plan, is_live in epochs if not is_live}
        views = count_views(anchor[0].data)
        seen = views * (1 - (1 - 1 / views) ** len(plans))
        sweeps[anchor] = Sweeps(len(epochs), live + seen)
    return sweeps


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
