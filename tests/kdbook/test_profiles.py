"""Profiles: what they scale and replace, and which epochs their runs keep."""

from dataclasses import replace

import pytest
import torch

from kdbook.kept_epochs import RCO_ANCHORS
from kdbook.profiles import PROFILES, Profile, open_profile
from kdbook.small_networks import PAIRS
from kdlib import KD, STC, CrossEntropy, build_model, load_data
from kdlib.errors import UnknownName
from kdlib.methods import AttentionTransfer, OneStage

SMALL = Profile(
    name="small",
    epoch_scale=1 / 20,
    seeds=(0, 1),
    datasets={"cifar100": "digits"},
    models={"resnet50": "resnet8"},
    images={"cifar100": 100},
    evidence=False,
)
SMOKE, LAPTOP, COURSE, PAPER = (PROFILES[n] for n in ("smoke", "laptop", "course", "paper"))


@pytest.fixture(autouse=True)
def whole_routes(monkeypatch):
    monkeypatch.delenv("KDLIB_KEEP_ROUTE", raising=False)


@pytest.mark.parametrize(("paper", "here"), [(240, 12), (10, 1), (1, 1), (31, 2), (60, 3)])
def test_epochs_are_scaled_to_one_at_least(paper, here):
    assert SMALL.scale_epochs(paper) == SMALL.scale_iterations(paper) == here
    assert PAPER.scale_epochs(paper) == PAPER.scale_iterations(paper) == paper


def test_iterations_can_have_a_scale_of_their_own():
    profile = replace(SMALL, iteration_scale=1 / 100)
    assert profile.scale_iterations(20_000) == 200
    assert profile.scale_epochs(240) == 12


@pytest.mark.parametrize(("limit", "asked", "used"), [(5, None, 5), (5, 9, 5), (None, 9, 9)])
def test_measurements_can_be_limited_to_some_images(limit, asked, used):
    assert replace(SMALL, probed=limit).limit_images(asked) == used
    assert PAPER.limit_images() is None


def test_a_recipe_scales_its_milestones_and_keeps_the_rest():
    recipe = SMALL.recipe(240, milestones=(60, 120, 180), batch=64, lr=0.05, weight_decay=1e-4)
    assert (recipe.epochs, recipe.milestones) == (12, (3, 6, 9))
    assert (recipe.batch, recipe.lr, recipe.weight_decay) == (64, 0.05, 1e-4)


@pytest.mark.parametrize(
    ("profile", "data", "epochs", "milestone"),
    [(SMOKE, "mnist", 6, 3), (SMOKE, "cifar10", 1, 1), (PAPER, "mnist", 10, 5)],
)
def test_a_small_replacement_of_a_data_set_is_repeated(profile, data, epochs, milestone):
    recipe = profile.recipe(10, milestones=(5,), data=data, batch=64, lr=0.05)
    assert (recipe.epochs, recipe.milestones) == (epochs, (milestone,))  # mnist: 18·10/30


def test_a_paper_may_have_values_of_its_own():
    rco, stc = (open_profile("laptop", paper=paper) for paper in ("rco", "stc"))
    assert rco.scale_epochs(240) == 24
    assert stc.scale_epochs(500) == 10
    assert stc.folder == rco.folder == "laptop"
    assert rco.recipe(240, batch=64, lr=0.01).lr == 0.05
    assert stc.recipe(500, batch=64, lr=0.01).lr == 0.01
    assert rco.dataset("cifar100+noise0.1") == "cifar10+half+noise0.1"
    assert rco.run("cifar100", "resnet50", rco.recipe(240, batch=64, lr=0.05)).images == 10_000
    assert stc.dataset("cifar100") == "cifar100+half"
    assert rco.settings("cifar100").loc["data set", "laptop"] == "cifar10+half"
    assert open_profile("paper", paper="stc") == PAPER


@pytest.mark.parametrize(
    ("largest", "batch", "lr"), [(None, 128, 0.1), (64, 64, 0.05), (128, 128, 0.1), (500, 128, 0.1)]
)
def test_a_smaller_batch_has_a_smaller_rate_in_proportion(largest, batch, lr):
    recipe = replace(SMALL, batch=largest).recipe(10, batch=128, lr=0.1)
    assert (recipe.batch, recipe.lr) == (batch, lr)


def test_a_run_is_named_as_in_the_paper():
    recipe = SMALL.recipe(240, batch=64, lr=0.05)
    teacher = SMALL.run("cifar100", "resnet50", recipe, keep=(40, 120))
    assert (teacher.data, teacher.model, teacher.images) == ("digits", "resnet8", 100)
    assert teacher.keep == (2, 6)
    student = SMALL.run("mnist", "resnet14", recipe, KD(teacher), seed=1)
    assert (student.data, student.model, student.seed) == ("mnist", "resnet14", 1)
    assert student.method.teacher == teacher


def test_only_a_profile_that_changes_nothing_is_faithful(photos):
    assert open_profile("paper").faithful
    assert open_profile("paper", seeds=range(5)).faithful
    assert not COURSE.faithful
    assert not SMOKE.faithful
    assert not replace(PAPER, axis_limit=2).faithful
    assert not open_profile("paper", data=f"cifar10=folder:{photos()}").faithful
    assert COURSE.evidence
    assert not SMOKE.evidence


def test_smoke_needs_no_download():
    smoke = open_profile()
    assert smoke.name == "smoke"
    assert {smoke.dataset(paper) for paper in ("cifar10", "cifar100", "mnist")} == {"digits"}
    assert smoke.dataset("cifar100+blur1") == "digits+blur1"


def test_laptop_halves_the_images_of_cifar_and_of_what_replaces_it(photos):
    assert LAPTOP.dataset("cifar10+noise0.1") == "cifar10+half+noise0.1"
    assert LAPTOP.dataset("mnist") == "mnist"
    own = open_profile("laptop", data={"cifar100": f"folder:{photos()}"})
    assert own.dataset("cifar100+blur1").startswith("photos@")
    assert own.dataset("cifar100+blur1").endswith("+half+blur1")
    recipe = own.recipe(240, batch=64, lr=0.05)
    assert own.run("cifar100+blur1", "resnet50", recipe).images == 15_000
    assert own.run("mnist", "lenet", recipe).images is None
    assert LAPTOP.scale == "reduced"
    assert len(LAPTOP.grid_seeds) == 3


# --- the reader's choices -------------------------------------------------------------------------


def test_seeds_can_be_chosen():
    assert open_profile("smoke", seeds=range(5)).seeds == (0, 1, 2, 3, 4)
    assert open_profile("smoke", seeds=[7]).seeds == (7,)


def test_data_sets_can_be_replaced(photos):
    folder = photos()
    by_text = open_profile("course", data=f"cifar100=folder:{folder},mnist=digits")
    assert by_text.dataset("cifar100").startswith("photos@")
    assert by_text.dataset("mnist") == "digits"
    assert by_text.dataset("cifar10") == "cifar10"
    assert by_text.folder == "course+" + "+".join(by_text.substitutes)
    by_mapping = open_profile("course", data={"cifar100": f"folder:{folder}", "mnist": "digits"})
    assert by_mapping == by_text
    smoke = open_profile("smoke", data={"cifar100": f"folder:{folder}"})
    assert smoke.dataset("cifar100").startswith("photos@")
    assert smoke.dataset("cifar10") == "digits"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("cifar1000=digits", UnknownName, r"cifar1000.*cifar10"),
        ({"cifar1000": "digits"}, UnknownName, r"cifar1000.*cifar10"),
        ("cifar100=digit", UnknownName, r"'digit'.*digits"),
        ({"cifar100": "digit"}, UnknownName, r"'digit'.*digits"),
        ("cifar100=", ValueError, r"Write NAME=DATA"),
        ("cifar100:digits", ValueError, r"Write NAME=DATA"),
        ("cifar100=digits,", ValueError, r"Write NAME=DATA"),
    ],
)
def test_a_wrong_replacement_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        open_profile("smoke", data=data)


def test_settings_stand_beside_the_papers():
    networks, epochs = {"teacher": "resnet50"}, {"teacher epochs": [10, 240]}
    table = SMALL.settings("cifar100", networks=networks, epochs=epochs, others={"alpha": 0.3})
    assert table.loc["data set"].tolist() == ["cifar100", "digits"]
    assert table.loc["teacher"].tolist() == ["resnet50", "resnet8"]
    assert table.loc["teacher epochs"].tolist() == ["10, 240", "1, 12"]
    assert table.loc["alpha"].tolist() == [0.3, 0.3]
    assert table.loc["seeds", "small"] == 2
    assert "100" in table.loc["training images", "small"]
    paper = PAPER.settings("mnist", "cifar10", epochs={"epochs": 164}, ours=["data set"])
    assert paper.loc["data set"].tolist() == ["mnist (ours)", "mnist"]
    assert paper.loc["data set 2"].tolist() == ["cifar10", "cifar10"]
    assert paper.loc["training images"].tolist() == ["all", "all"]
    assert paper.loc["epochs"].tolist() == ["164", "164"]
    course = COURSE.settings(iterations=20_000)
    assert course.loc["iterations"].tolist() == [20_000, 2000]
    smoke = SMOKE.settings("mnist", epochs={"epochs": 10}, repeats_of="mnist", grid=True)
    assert smoke.loc["epochs"].tolist() == ["10", "6"]
    assert smoke.loc["seeds", "smoke"] == 1


# --- routes ---------------------------------------------------------------------------------------


def teacher_recipe(profile):
    """The scaled recipe of RCO's teacher."""
    return profile.recipe(240, batch=64, lr=0.05)


def test_a_thinned_route_has_every_nth_epoch_and_the_papers_anchors():
    paper = replace(PAPER, keep_route=7)
    route = paper.route_epochs(teacher_recipe(paper))
    assert route == tuple(e for e in range(1, 241) if e % 7 == 0 or e % 10 == 0)
    assert tuple(range(10, 241, 10)) == RCO_ANCHORS
    assert [gap for gap in (1, 2, 4, 7, 10, 20, 60) if paper.has_anchor_gap(gap)] == [7, 10, 20, 60]
    assert PAPER.has_anchor_gap(1)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("thinned", [3, 240, 1000])
def test_a_thinned_route_has_all_fixed_anchors_of_the_paper(name, thinned):
    profile = replace(PROFILES[name], keep_route=thinned)
    recipe = teacher_recipe(profile)
    route = profile.route_epochs(recipe)
    anchors = {30, 100, 180, 80, 160, *range(10, 241, 10), *range(20, 241, 20), 60, 120, 240}
    assert {profile.scale_epochs(anchor) for anchor in anchors} <= set(route)
    assert list(route) == sorted(set(route))
    assert route[-1] == recipe.epochs


def test_a_run_keeps_its_route_and_logits_on_request():
    recipe = SMALL.recipe(80, batch=64, lr=0.05)
    plain = SMALL.run("cifar100", "resnet50", recipe, keep=(40,))
    routed = SMALL.run("cifar100", "resnet50", recipe, keep=(40,), route=True)
    assert (plain.keep, plain.save_logits) == ((2,), False)
    assert (routed.keep, routed.save_logits) == ((1, 2, 3, 4), True)
    assert routed.id == plain.id


def test_the_environment_thins_the_route(monkeypatch):
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", "8")
    paper = open_profile("paper")
    assert paper.keep_route == 8
    assert paper.folder == "paper+keep-route=8"


@pytest.mark.parametrize("value", ["1", ""])
def test_a_route_that_is_not_thinned_stays_faithful(monkeypatch, value):
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", value)
    assert open_profile("paper") == PAPER
    assert open_profile("paper").faithful


@pytest.mark.parametrize("value", ["0", "-2", "1.5", "ten", " ", "4 epochs", "²"])
def test_a_thinning_that_is_no_number_of_epochs_is_refused(monkeypatch, value):
    monkeypatch.setenv("KDLIB_KEEP_ROUTE", value)
    with pytest.raises(ValueError, match=f"KDLIB_KEEP_ROUTE is {value!r}.*1 or more"):
        open_profile("paper")


# --- students that a figure follows ---------------------------------------------------------------


def followed(profile, epochs=500, model="resnet20", method=STC, keep=(), **settings):
    """A student, described as in every notebook."""
    recipe = profile.recipe(epochs, (150, 300, 400), batch=128, lr=0.1)
    teacher = profile.run("cifar10", "resnet56", recipe)
    made = CrossEntropy() if method is CrossEntropy else method(teacher, **settings)
    return profile.run("cifar10", model, recipe, made, keep=keep)


def test_the_students_of_the_cut_keep_every_50th_epoch_of_the_paper():
    paper = tuple(range(50, 501, 50))
    assert followed(PAPER).keep == paper
    assert followed(PAPER, keep=(3, 50)).keep == (3, *paper)
    for profile in (COURSE, SMOKE):
        run = followed(profile)
        assert set(run.keep) == {profile.scale_epochs(epoch) for epoch in paper}
        assert run.keep[-1] == run.recipe.epochs


def test_a_shorter_run_keeps_only_its_own_epochs():
    assert followed(PAPER, epochs=164).keep == (50, 100, 150)
    assert followed(COURSE, epochs=164).keep[-1] <= 16


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_student_that_no_figure_follows_keeps_its_last_weights_alone(profile):
    assert followed(profile, model="resnet56").keep == ()
    for method in (KD, AttentionTransfer, CrossEntropy, lambda t: OneStage(STC(t), gap=1)):
        assert followed(profile, method=method).keep == ()


# --- small networks, grids of networks ------------------------------------------------------------

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
def test_small_pairs_need_an_adapter_where_the_papers_pairs_do(student, teacher, cut):
    recipe = SMOKE.recipe(500, batch=128, lr=0.1)
    method = STC(SMOKE.run("cifar10", "resnet56", recipe), cut=cut)
    size = load_data("digits").size

    def adapters(names, channels, size):
        with torch.device("meta"):
            ours, theirs = (build_model(name, 10, channels).eval() for name in names)
            return method.aux_modules(ours, theirs, torch.empty(2, channels, size, size)).keys()

    expected = {"adapter"} if student == "wrn-16-1" else set()
    assert adapters((student, teacher), 3, 32) == expected
    assert adapters(map(SMOKE.model, (student, teacher)), 1, size) == expected


def test_small_pairs_are_smaller_than_those_of_the_paper():
    def params(name):
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(name, 10).parameters())

    assert all(params(small) < 0.5 * params(paper) for paper, small in PAIRS.items())
    assert {name for pair in STC_PAIRS for name in pair} == PAIRS.keys()
    assert all(SMOKE.model(student) != SMOKE.model(teacher) for student, teacher in STC_PAIRS)


@pytest.mark.parametrize(("limit", "run"), [(None, (4, 6, 8, 10)), (2, (4, 6)), (9, (4, 6, 8, 10))])
def test_a_grid_can_be_limited_on_each_axis(limit, run):
    profile = replace(SMALL, axis_limit=limit)
    assert profile.limit_axis((4, 6, 8, 10)) == run
    assert profile.limit_axis(iter([4, 6, 8, 10])) == run


def test_a_grid_can_have_fewer_seeds():
    assert replace(SMALL, seeds=(7, 8)).grid_seeds == (7, 8)
    assert replace(SMALL, seeds=(7, 8), seeds_of_grid=1).grid_seeds == (7,)
