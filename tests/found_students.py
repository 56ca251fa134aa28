"""A tiny search for students inside their teacher, for several test files."""

from dataclasses import replace

from kdlib import CrossEntropy, FoundStudent, GateSearch, Recipe, Run, load_data
from kdlib.engine.state import trained_modules

MODEL = "densenet-bc-16-4"
TEACHER = Run("digits", MODEL, Recipe(2, 16, 0.05), images=128)
PLAIN = CrossEntropy()


def search(epochs=6, seed=0, **settings):
    """A search; with these settings it reaches its budget in its third epoch of eight steps."""
    settings = {"budget": 0.5, "strength": 0.2, "weight": 10.0, **settings}
    method, recipe = GateSearch(TEACHER, **settings), Recipe(epochs, 16, 0.02)
    return replace(TEACHER, recipe=recipe, method=method, start=TEACHER, seed=seed)


def chain(method=PLAIN, held=0.0, **settings):
    """A search, and the training of the network that it finds."""
    student = replace(TEACHER, method=method, seed=5)
    return FoundStudent(search(**settings), student, held)


def modules_of(trained):
    """The trained modules of a search: ``student``, without its gates, and ``gates``."""
    run = trained.run
    return trained_modules(run, run.recipe.epochs, load_data(run.data).first(run.images))
