import pytest

from kdlib import KD
from kdlib.errors import UnknownName
from kdlib.profiles import PROFILES, Profile, open_profile

SMALL = Profile(
    name="small",
    length=1 / 20,
    seeds=(0, 1),
    datasets={"cifar100": "digits"},
    models={"resnet50": "resnet8"},
    images=100,
    evidence=False,
)


@pytest.mark.parametrize(("paper", "here"), [(240, 12), (10, 1), (1, 1), (31, 2), (60, 3)])
def test_epochs_shrink_to_at_least_one(paper, here):
    assert SMALL.epochs(paper) == here
    assert PROFILES["paper"].epochs(paper) == paper


def test_a_recipe_shrinks_with_its_milestones_and_keeps_the_rest():
    recipe = SMALL.recipe(240, milestones=(60, 120, 180), batch=64, lr=0.05, weight_decay=1e-4)
    assert (recipe.epochs, recipe.milestones) == (12, (3, 6, 9))
    assert (recipe.batch, recipe.lr, recipe.weight_decay) == (64, 0.05, 1e-4)


def test_a_run_is_named_as_the_paper_names_it():
    recipe = SMALL.recipe(240, batch=64, lr=0.05)
    teacher = SMALL.run("cifar100", "resnet50", recipe, keep=(40, 120))
    assert (teacher.data, teacher.model, teacher.images) == ("digits", "resnet8", 100)
    assert teacher.keep == (2, 6)
    student = SMALL.run("mnist", "resnet14", recipe, KD(teacher), seed=1)
    assert (student.data, student.model, student.seed) == ("mnist", "resnet14", 1)
    assert student.method.teacher == teacher


def test_the_paper_profile_changes_nothing():
    paper = open_profile("paper")
    recipe = paper.recipe(240, milestones=(150, 180, 210), batch=64, lr=0.05)
    assert (recipe.epochs, recipe.milestones) == (240, (150, 180, 210))
    run = paper.run("cifar100", "resnet50", recipe)
    assert (run.data, run.model, run.images) == ("cifar100", "resnet50", None)


def test_only_what_changes_nothing_is_faithful(photos):
    assert open_profile("paper").faithful
    assert open_profile("paper", seeds=range(5)).faithful
    assert not open_profile("course").faithful
    assert not open_profile("smoke").faithful
    assert not open_profile("paper", data=f"cifar10=folder:{photos()}").faithful
    assert open_profile("course").evidence
    assert not open_profile("smoke").evidence


def test_smoke_needs_no_download():
    smoke = open_profile()
    assert smoke.name == "smoke"
    assert {smoke.dataset(paper) for paper in ("cifar10", "cifar100", "mnist")} == {"digits"}


def test_an_unknown_profile_names_the_closest():
    with pytest.raises(UnknownName, match=r"no profile 'papers'.*paper"):
        open_profile("papers")


def test_seeds_can_be_chosen():
    assert open_profile("smoke", seeds=range(5)).seeds == (0, 1, 2, 3, 4)
    assert open_profile("smoke", seeds=[7]).seeds == (7,)


def test_other_data_may_stand_in(photos):
    folder = photos()
    by_text = open_profile("course", data=f"cifar100=folder:{folder},mnist=digits")
    assert by_text.dataset("cifar100").startswith("photos@")
    assert by_text.dataset("mnist") == "digits"
    assert by_text.dataset("cifar10") == "cifar10"
    by_mapping = open_profile("course", data={"cifar100": f"folder:{folder}", "mnist": "digits"})
    assert by_mapping == by_text


def test_what_stands_in_replaces_the_profiles_own_choice(photos):
    smoke = open_profile("smoke", data={"cifar100": f"folder:{photos()}"})
    assert smoke.dataset("cifar100").startswith("photos@")
    assert smoke.dataset("cifar10") == "digits"


@pytest.mark.parametrize("data", ["cifar1000=digits", {"cifar1000": "digits"}])
def test_an_unknown_data_set_to_stand_in_for_is_named(data):
    with pytest.raises(UnknownName, match=r"cifar1000.*cifar10"):
        open_profile("smoke", data=data)


@pytest.mark.parametrize("data", ["cifar100=digit", {"cifar100": "digit"}])
def test_an_unknown_data_set_that_stands_in_is_named(data):
    with pytest.raises(UnknownName, match=r"'digit'.*digits"):
        open_profile("smoke", data=data)


@pytest.mark.parametrize("text", ["cifar100", "cifar100=", "cifar100:digits", "cifar100=digits,"])
def test_text_that_does_not_read_as_a_choice_of_data_is_refused(text):
    with pytest.raises((ValueError, UnknownName), match=r"NAME=DATA|no data set"):
        open_profile("smoke", data=text)


def test_settings_stand_beside_the_papers():
    table = SMALL.settings(data="cifar100", teacher="resnet50", teacher_epochs=[10, 240])
    assert table.loc["data"].tolist() == ["cifar100", "digits"]
    assert table.loc["teacher"].tolist() == ["resnet50", "resnet8"]
    assert table.loc["teacher epochs"].tolist() == ["10, 240", "1, 12"]
    assert table.loc["seeds", "small"] == 2
    assert "100" in table.loc["training images", "small"]
    paper = open_profile("paper").settings(data="mnist", epochs=164)
    assert paper.loc["training images"].tolist() == ["all", "all"]
    assert paper.loc["epochs"].tolist() == ["164", "164"]
