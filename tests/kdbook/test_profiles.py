from dataclasses import replace

import pytest
import torch

from kdbook.profiles import FOLLOWED, PROFILES, RCO_ROUTE, Profile, open_profile
from kdlib import KD, STC, CrossEntropy, build_model, load_data, stand_ins
from kdlib.errors import UnknownName
from kdlib.methods import AttentionTransfer, OneStage

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


def test_a_data_set_that_a_small_one_stands_in_for_is_repeated():
    smoke, paper = PROFILES["smoke"], PROFILES["paper"]
    recipe = smoke.recipe(10, milestones=(5,), data="mnist", batch=64, lr=0.05)
    assert (recipe.epochs, recipe.milestones) == (30, (15,))  # 60·10/20
    plain = smoke.recipe(10, milestones=(5,), data="cifar10", batch=64, lr=0.05)
    assert (plain.epochs, plain.milestones) == (1, (1,))
    recipe = paper.recipe(10, milestones=(5,), data="mnist", batch=64, lr=0.05)
    assert (recipe.epochs, recipe.milestones) == (10, (5,))


def test_iterations_shrink_as_epochs_do():
    assert PROFILES["paper"].iterations(20_000) == 20_000
    assert PROFILES["course"].iterations(20_000) == 2000
    assert SMALL.iterations(1) == 1
    table = PROFILES["course"].settings(training_iterations=20_000)
    assert table.loc["training iterations"].tolist() == [20_000, 2000]


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


# --- routes ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_thinning(monkeypatch):
    monkeypatch.delenv("KDLIB_KEEP_ROUTE", raising=False)


def teachers(profile):
    """The recipe of RCO's teacher, as run."""
    return profile.recipe(240, batch=64, lr=0.05)


@pytest.mark.parametrize("name", PROFILES)
def test_a_route_is_every_epoch_where_it_is_not_thinned(name):
    profile = open_profile(name)
    recipe = teachers(profile)
    assert profile.route(recipe) == tuple(range(1, recipe.epochs + 1))


def test_a_thinned_route_holds_every_so_many_epochs_and_the_papers_anchors():
    paper = replace(PROFILES["paper"], keep_route=7)
    route = paper.route(teachers(paper))
    assert route == tuple(e for e in range(1, 241) if e % 7 == 0 or e % 10 == 0)
    assert tuple(range(10, 241, 10)) == RCO_ROUTE


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("thinned", [3, 240, 1000])
def test_however_thin_a_route_holds_all_fixed_anchors_of_the_paper(name, thinned):
    profile = replace(PROFILES[name], keep_route=thinned)
    recipe = teachers(profile)
    route = profile.route(recipe)
    anchors = {30, 100, 180, 80, 160, *range(10, 241, 10), *range(20, 241, 20), 60, 120, 240}
    assert {profile.epochs(anchor) for anchor in anchors} <= set(route)
    assert list(route) == sorted(set(route))
    assert route[-1] == recipe.epochs


def test_a_route_ends_with_its_teacher():
    profile = replace(SMALL, keep_route=2)
    assert profile.route(profile.recipe(100, batch=64, lr=0.05)) == (1, 2, 3, 4, 5)
    assert replace(SMALL, keep_route=9).route(profile.recipe(20, batch=64, lr=0.05)) == (1,)


def test_a_run_keeps_its_route_where_it_is_asked_to():
    recipe = SMALL.recipe(80, batch=64, lr=0.05)
    plain = SMALL.run("cifar100", "resnet50", recipe, keep=(40,))
    routed = SMALL.run("cifar100", "resnet50", recipe, keep=(40,), route=True)
    assert (plain.keep, plain.route) == ((2,), False)
    assert (routed.keep, routed.route) == ((1, 2, 3, 4), True)
    assert routed.id == plain.id


def test_the_route_is_thinned_from_outside(monkeypatch):
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", "8")
    paper = open_profile("paper")
    assert paper.keep_route == 8
    run = paper.run("cifar100", "resnet50", teachers(paper), route=True)
    assert run.keep == tuple(e for e in range(1, 241) if e % 8 == 0 or e % 10 == 0)
    assert paper.folder == "paper+keep-route=8"


@pytest.mark.parametrize("value", ["1", ""])
def test_a_route_that_is_not_thinned_stays_faithful(monkeypatch, value):
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", value)
    assert open_profile("paper").keep_route == 1
    assert open_profile("paper").faithful


@pytest.mark.parametrize("value", ["0", "-2", "1.5", "ten", " ", "4 epochs", "²"])
def test_a_thinning_that_is_no_number_of_epochs_is_refused(monkeypatch, value):
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", value)
    with pytest.raises(ValueError, match=f"KDLIB_KEEP_ROUTE is {value!r}.*1 or more"):
        open_profile("paper")


# --- students that a figure follows ---------------------------------------------------------------


def followed(profile, epochs=500, model="resnet20", method=STC, **settings):
    """A student as every notebook would ask for it."""
    recipe = profile.recipe(epochs, (150, 300, 400), batch=128, lr=0.1)
    teacher = profile.run("cifar10", "resnet56", recipe)
    made = CrossEntropy() if method is CrossEntropy else method(teacher, **settings)
    return profile.run("cifar10", model, recipe, made)


def test_the_students_of_the_cut_keep_every_50th_of_the_papers_epochs():
    paper = tuple(range(50, 501, 50))
    assert followed(PROFILES["paper"]).keep == paper
    for name in ("course", "smoke"):
        run = followed(PROFILES[name])
        assert set(run.keep) == {PROFILES[name].epochs(epoch) for epoch in paper}
        assert run.keep[-1] == run.recipe.epochs
    assert followed(PROFILES["smoke"]).keep == tuple(sorted({round(e / 20) for e in paper}))


@pytest.mark.parametrize("name", PROFILES)
def test_all_collaborations_of_one_network_keep_the_same(name):
    profile = PROFILES[name]
    expected = followed(profile).keep
    for settings in ({"cut": 1}, {"target": "truth"}, {"kd_weight": 0.9}, {"alpha": 0.5}):
        assert followed(profile, **settings).keep == expected


def test_no_more_is_kept_than_a_shorter_run_has():
    run = followed(PROFILES["paper"], epochs=164)
    assert run.keep == (50, 100, 150)
    assert followed(PROFILES["course"], epochs=164).keep[-1] <= 16


@pytest.mark.parametrize("name", PROFILES)
def test_what_no_figure_follows_keeps_its_last_weights_alone(name):
    profile = PROFILES[name]
    assert followed(profile, model="resnet56").keep == ()
    assert followed(profile, method=KD).keep == ()
    assert followed(profile, method=AttentionTransfer).keep == ()
    assert followed(profile, method=CrossEntropy).keep == ()
    assert followed(profile, method=lambda teacher: OneStage(STC(teacher), gap=1)).keep == ()


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("method", [CrossEntropy, KD])
def test_rcos_figure_5_still_follows_every_epoch(name, method):
    profile = PROFILES[name]
    run = followed(profile, 240, "mobilenetv2-t4-w0.35", method)
    assert run.keep == tuple(range(1, run.recipe.epochs + 1))
    assert ("mobilenetv2-t4-w0.35", method) in FOLLOWED


def test_what_is_asked_for_is_kept_beside_what_a_figure_follows():
    paper = PROFILES["paper"]
    recipe = paper.recipe(500, batch=128, lr=0.1)
    method = STC(paper.run("cifar10", "resnet56", recipe))
    run = paper.run("cifar10", "resnet20", recipe, method, keep=(3, 50))
    assert run.keep == (3, *range(50, 501, 50))


# --- stand-ins ------------------------------------------------------------------------------------

STC_PAIRS = [
    ("resnet20", "resnet56"),
    ("resnet20", "wrn-40-1"),
    ("vgg13", "wrn-46-4"),
    ("wrn-16-1", "wrn-16-2"),
    ("resnet20", "resnet110"),
    ("resnet56", "resnet110"),
]


@pytest.mark.parametrize(("student", "teacher"), STC_PAIRS)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_small_pairs_fit_each_other_where_the_papers_do(student, teacher, cut):
    smoke = PROFILES["smoke"]
    recipe = smoke.recipe(500, batch=128, lr=0.1)
    method = STC(smoke.run("cifar10", "resnet56", recipe), cut=cut)
    size = load_data("digits").size

    def shapes(name, channels, size):
        with torch.device("meta"):
            model = build_model(name, 10, channels).eval()
            return model, torch.empty(2, channels, size, size)

    found = []
    for rename, channels, pixels in ((lambda name: name, 3, 32), (smoke.model, 1, size)):
        (ours, x), (theirs, _) = (shapes(rename(n), channels, pixels) for n in (student, teacher))
        found.append(method.parts(ours, theirs, x).keys())
    assert found[0] == found[1] == ({"adapter"} if student == "wrn-16-1" else set())


def test_small_pairs_are_smaller_than_those_of_the_paper_and_keep_their_order():
    def params(name):
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(name, 10).parameters())

    for paper, small in stand_ins.PAIRS.items():
        assert params(small) < 0.5 * params(paper)
    assert {name for pair in STC_PAIRS for name in pair} == stand_ins.PAIRS.keys()
    for student, teacher in STC_PAIRS:
        assert PROFILES["smoke"].model(student) != PROFILES["smoke"].model(teacher)


# --- grids of networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "run"), [(None, (4, 6, 8, 10)), (2, (4, 6)), (9, (4, 6, 8, 10))])
def test_a_grid_is_thinned_along_each_axis(axis, run):
    profile = replace(SMALL, axis=axis)
    assert profile.along((4, 6, 8, 10)) == run
    assert profile.along(iter([4, 6, 8, 10])) == run


def test_a_thinned_grid_takes_one_seed():
    assert replace(SMALL, axis=2).grid_seeds == (0,)
    assert replace(SMALL, axis=2, seeds=(7, 8)).grid_seeds == (7,)
    assert replace(SMALL, axis=None, seeds=(7, 8)).grid_seeds == (7, 8)


def test_a_thinned_grid_is_not_faithful():
    assert not replace(PROFILES["paper"], axis=2).faithful
    assert PROFILES["paper"].grid_seeds == PROFILES["paper"].seeds
