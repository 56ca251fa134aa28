"""The runs that notebooks declare, and the cost of these runs."""

import nbformat
import pytest

import kdlib
from kdbook.cli import notebooks
from kdbook.cli.declared import declared
from kdbook.cli.forecast import estimated_runs, forecast
from kdlib import KD, KDGAN, FoundStudent, GateSearch, MutualLearning, Recipe
from kdlib.methods import OneStage


def test_notebooks_want_the_same_checkpoints_of_a_run(monkeypatch, tmp_path):
    """If one notebook asks for more checkpoints, the run of another is trained again.

    The runs are known before the data sets are downloaded.
    """
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    wanted = {}
    for profile_name in ("laptop", "course", "paper"):
        for notebook in notebooks.all_notebooks():
            pending = estimated_runs(notebook, profile_name=profile_name)
            for run in pending:
                wanted.setdefault(run.id, set()).add((run.keep, run.save_logits))
                pending += {parent.id: parent for parent, _ in run.parents}.values()
    assert {run: wishes for run, wishes in wanted.items() if len(wishes) > 1} == {}


def test_a_thinner_route_needs_less_disk(monkeypatch):
    notebook = next(n for n in notebooks.all_notebooks() if n.exhibit == "rco/table7")
    whole = forecast(estimated_runs(notebook, profile_name="paper"))
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", "10")
    thinned = forecast(estimated_runs(notebook, profile_name="paper"))
    assert whole.route > 8 * thinned.route
    assert whole.student_epochs == thinned.student_epochs
    assert whole.cached < whole.uncached / 2


@pytest.fixture
def networks(tiny):
    """The size on disk of some runs, in networks of ``tiny``."""
    return lambda *runs: forecast(runs).disk / forecast([tiny()]).disk


def test_every_run_and_checkpoint_is_counted_once(tiny, networks):
    teacher = tiny(epochs=6)
    students = [tiny(epochs=4, method=KD(teacher, at=2), seed=seed) for seed in (0, 1)]
    routed = tiny(epochs=4, method=OneStage(KD(teacher), gap=2))
    counted = forecast([*students, routed, students[0]])
    assert (counted.students, counted.student_epochs) == (3, 12)
    assert (counted.teachers, counted.teacher_epochs) == (1, 6)
    assert counted.uncached == 12
    assert counted.peer_epochs == counted.route == 0
    assert networks(*students, routed) == 3 + 3  # the teacher keeps epochs 2, 4 and 6


def test_teachers_that_learn_from_a_teacher_need_its_passes(tiny):
    middle = tiny(epochs=3, method=KD(tiny(epochs=2)))
    counted = forecast([tiny(epochs=4, method=KD(middle))])
    assert (counted.students, counted.teachers) == (1, 2)
    assert counted.uncached == 3 + 4


def test_a_second_network_is_counted_and_a_copied_teacher_makes_no_passes(tiny, networks):
    recipe, teacher = Recipe(1, 24, 0.05), tiny(epochs=3)
    game = tiny(epochs=4, method=KDGAN(teacher=teacher, discriminator=recipe, copy=recipe))
    mutual = tiny(epochs=5, method=MutualLearning("resnet8-x0.25", recipe))
    counted = forecast([game, mutual])
    assert counted.student_epochs == counted.peer_epochs == 9
    assert counted.uncached == counted.cached == 0
    assert networks(game, mutual) == 1 + 2 + 2


def test_a_student_that_is_not_found_yet_counts_as_its_teacher(tiny, networks):
    search = tiny(method=GateSearch(tiny(), budget=0.5), start=tiny())
    chain = FoundStudent(search, tiny(epochs=3)).estimate()
    assert forecast(chain).student_epochs == 2 + 3
    assert networks(*chain) == 3


# --- declared -------------------------------------------------------------------------------------


@pytest.fixture
def declaring(tmp_path):
    """What a notebook with these cells declares: ``declaring(source, …)``."""

    def read(*sources, **parameters):
        cells = [nbformat.v4.new_code_cell(source) for source in ("assert False", *sources)]
        cells[0].metadata.tags, cells[1].metadata.tags = ["install"], ["parameters"]
        path = tmp_path / "a.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return declared(notebooks.Notebook(path, "", "", {}, trains=True), **parameters)

    return read


def test_runs_are_read_with_the_given_parameters_and_nothing_is_trained(declaring, capsys):
    train = kdlib.train
    rows = "train({'a': [seeds, 1], 'b': [2]}); assert False"
    cells = ("seeds = 0", "from kdlib import train; print(seeds)", rows)
    assert declaring(*cells) == ([0, 1, 2], None, False)
    assert declaring(*cells, seeds=7).runs == [7, 1, 2]
    assert kdlib.train is train
    assert capsys.readouterr().out == ""


def test_missing_data_stops_a_cell_but_not_the_notebook(declaring):
    missing = "import kdlib; kdlib.load_data('cifar10')"
    assert declaring("", missing, "import kdlib; kdlib.train([3])").runs == [3]


def test_what_a_notebook_asks_for_is_read_with_its_runs(declaring):
    found = declaring("", "import kdlib; kdlib.train([3], weights=True, then=print, partial=True)")
    assert found == ([3], print, True)


def test_a_notebook_that_never_calls_train_is_an_error(declaring):
    with pytest.raises(ValueError, match="none of its cells calls train"):
        declaring("", "# train(runs)")
