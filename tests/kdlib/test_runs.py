"""Runs: their descriptions and ids, and that making one reads no file."""

import json
import shutil
from dataclasses import replace

import pytest

from kdlib import KD, CrossEntropy, Recipe, Run, load_data, train
from kdlib.errors import DataError, StoreError, UnknownName
from kdlib.methods.route import multi_stage
from kdlib.runs import describe

RECIPE = Recipe(epochs=3, batch=32, lr=0.1)
RUN = Run("digits", "resnet8", RECIPE)
KD_OF_RUN = KD(RUN)


def test_the_id_of_a_run_never_changes():
    """With another id no stored run is found again; raise ENGINE_VERSION only on purpose."""
    assert Run("digits", "resnet8", Recipe(epochs=1, batch=32, lr=0.1)).id == "5f710f0d1877"


@pytest.mark.parametrize(
    "change",
    [
        *({"data": "mnist"}, {"model": "resnet14"}, {"seed": 1}, {"images": 100}, {"start": RUN}),
        *(
            {"recipe": replace(RECIPE, **change)}
            for change in (
                *({"epochs": 4}, {"batch": 16}, {"lr": 0.2}, {"milestones": (2,)}),
                *({"decay": 0.5}, {"momentum": 0.8}, {"weight_decay": 1e-4}),
            )
        ),
    ],
    ids=str,
)
def test_every_field_of_a_run_changes_its_id(change):
    other = replace(RUN, **change)
    assert other.id != RUN.id
    assert other != RUN


def test_every_field_of_a_method_and_of_its_teacher_changes_the_id():
    changes = [
        *({}, {"at": 1}, {"temperature": 4.0}, {"ce_weight": 0.1}, {"kd_weight": 0.9}),
        *({"teacher": replace(RUN, seed=1)}, {"teacher": replace(RUN, method=KD_OF_RUN)}),
    ]
    ids = {replace(RUN, method=replace(KD_OF_RUN, **change)).id for change in changes}
    assert len(ids) == len(changes)


def test_wishes_to_keep_weights_or_logits_are_not_part_of_a_run():
    kept = replace(RUN, keep=(1, 2), save_logits=True)
    assert kept == RUN
    assert kept.id == RUN.id
    assert replace(RUN, method=KD(kept)).id == replace(RUN, method=KD_OF_RUN).id


def test_equal_runs_have_equal_ids():
    whole, real = (replace(RUN, recipe=replace(RECIPE, lr=lr)) for lr in (1, 1.0))
    assert whole == real
    assert whole.id == real.id


def test_a_description_leaves_out_defaults():
    """A new field with a default then changes no id."""
    recipe = Recipe(3, 32, 0.1, (), 0.1, 0.9, 5e-4)
    assert Run("digits", "resnet8", recipe, CrossEntropy(), seed=0).id == RUN.id
    assert describe(RUN) == {
        "kind": "Run",
        "data": "digits",
        "model": "resnet8",
        "recipe": {"kind": "Recipe", "epochs": 3, "batch": 32, "lr": 0.1},
    }


def test_a_description_holds_all_ancestors():
    middle = replace(RUN, model="resnet14", method=KD(RUN, at=2))
    description = replace(RUN, seed=1, method=KD(middle)).description
    assert description["method"]["teacher"]["method"]["teacher"] == RUN.description
    assert description["method"]["teacher"]["method"]["at"] == 2
    assert json.loads(json.dumps(description)) == description


def test_a_start_is_part_of_the_id_and_its_epochs_come_before():
    first, second = multi_stage(replace(RUN, method=KD_OF_RUN), (1, 3))
    assert second.start == first
    assert second != replace(second, start=None)
    assert (first.epochs_before, second.epochs_before) == (0, 3)


# --- no file is read ------------------------------------------------------------------------------


def test_a_run_on_a_folder_is_named_by_the_content_of_the_folder(photos, tmp_path):
    folder = photos()
    moved = shutil.copytree(folder, tmp_path / "moved" / "photos")
    first, second = (replace(RUN, data=f"folder:{place}") for place in (folder, moved))
    assert first.data == f"folder:{folder}"
    assert first.dataset == second.dataset == f"photos@{first.dataset[-12:]}"
    assert first.id == second.id
    assert str(tmp_path) not in json.dumps(first.description)
    assert load_data(first.dataset).classes == 2


def test_a_run_on_a_missing_folder_can_be_made_but_not_named_or_trained(tmp_path):
    run = replace(RUN, data=f"folder:{tmp_path / 'missing'}")
    student = replace(run, seed=1, method=KD(run), start=run)
    assert student.teachers == [(run, 3)]
    assert KD(run, at=3) == KD(run)
    for read in (lambda: run.id, lambda: student.dataset, lambda: train([run])):
        with pytest.raises(DataError, match="missing"):
            read()
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_missing_architecture_can_be_made_and_named_but_not_trained():
    run = replace(RUN, model="resnet8@0123456789ab")
    assert run.id != RUN.id
    assert replace(run, method=KD(run)).id != run.id
    with pytest.raises(StoreError, match="architecture resnet8@0123456789ab"):
        train([run])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "digit"}, UnknownName, "digits"),
        ({"model": "resnet9"}, UnknownName, "resnet"),
        ({"model": "resnet9@0123456789ab"}, UnknownName, "resnet"),
        ({"keep": (4,)}, ValueError, r"\[4\] to keep are not within 3 epochs"),
        ({"keep": (0,)}, ValueError, r"\[0\] to keep"),
        ({"start": replace(RUN, model="resnet14")}, ValueError, "start must be a"),
        ({"start": replace(RUN, data="mnist")}, ValueError, "start must be a"),
    ],
)
def test_an_impossible_run_is_refused_when_it_is_made(change, error, message):
    with pytest.raises(error, match=message):
        replace(RUN, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(RECIPE, epochs=0), "at least one"),
        (lambda: replace(RECIPE, batch=0), "at least one"),
        (lambda: KD(RUN, at=0), "has the epochs 1 to 3, so not epoch 0"),
        (lambda: KD(RUN, at=4), "has the epochs 1 to 3, so not epoch 4"),
    ],
)
def test_impossible_epochs_and_batches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_two_spellings_of_a_folder_make_equal_runs(photos, monkeypatch):
    folder = photos()
    monkeypatch.chdir(folder.parent)
    one, *others = (
        Run(f"folder:{path}", "resnet8", RECIPE)
        for path in (folder, f"{folder}/../{folder.name}", folder.name)
    )
    assert all(other == one and other.id == one.id for other in others)
    assert Run(one.data, "resnet8", RECIPE, start=others[0]).start == one


def test_errors_of_a_run_on_a_missing_folder_read_no_file():
    missing = Run("folder:/nowhere", "resnet8", RECIPE)
    with pytest.raises(ValueError, match="start must be a"):
        replace(missing, model="resnet14", start=missing)
