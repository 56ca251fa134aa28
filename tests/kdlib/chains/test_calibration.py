"""Calibration: which distortion of a data set a chain of runs uses."""

import pytest

from kdlib import KD, CrossEntropy, Recipe, Run, store, train
from kdlib.chains.calibration import Calibration, OnDistorted, distorted


@pytest.mark.parametrize(("accuracies", "chosen"), [((60, 59, 57), 1), ((60, 62, 52), 0)])
def test_the_distortion_is_chosen_whose_drop_is_nearest(tiny, accuracies, chosen):
    calibration = Calibration(tiny(epochs=1), ["+blur1", "+noise0.1"], drop=2.81)
    summary = {"weights": {}, "teachers": {}, "seconds": 0, "environment": {}}
    for run, top1 in zip(calibration.runs, accuracies, strict=True):
        store.write_record(run, [{"epoch": 1, "test_top1": top1}], summary)
    assert calibration.drops().tolist() == [60 - top1 for top1 in accuracies[1:]]
    assert calibration.choose() == calibration.distortions[chosen]


def test_a_run_moves_to_distorted_images_with_all_its_teachers(tiny):
    teacher = tiny(model="resnet14-x0.25")
    first = tiny(method=KD(teacher, at=1))
    student = tiny(method=KD(teacher), start=first, keep=(1,))
    moved = distorted(student, "+blur1")
    assert moved.data == "digits+blur1"
    assert moved.method == KD(distorted(teacher, "+blur1"))
    assert moved.start == distorted(first, "+blur1")
    assert moved.start.method.teacher.data == "digits+blur1"
    assert moved.keep == (1,)
    assert (moved.recipe, moved.seed, moved.images) == (
        student.recipe, student.seed, student.images,
    )  # fmt: skip
    assert student.data == teacher.data == "digits"
    with pytest.raises(ValueError, match="is distorted already"):
        distorted(moved, "+noise0.1")


def test_students_follow_their_calibration(tiny, epochs_trained):
    teacher = tiny(epochs=1, model="resnet14-x0.25")
    calibration = Calibration(teacher, ("+blur1", "+noise0.3"), drop=1)
    student = tiny(epochs=1, method=KD(teacher))
    rows = train({"clean": [student], "distorted": [OnDistorted(student, calibration)]})
    chosen = calibration.choose()
    (result,) = rows["distorted"]
    assert result.run == distorted(student, chosen)
    assert rows["clean"][0].run == student
    # each run of the calibration once, the student on the chosen data alone
    trained = [run for run, _ in epochs_trained]
    assert sorted(trained) == sorted(
        r.id for r in (*calibration.runs, student, distorted(student, chosen))
    )
    epochs_trained.clear()
    again = train([OnDistorted(student, calibration)])
    assert again[0].run == result.run
    assert epochs_trained == []


def test_the_result_may_be_a_run_of_the_calibration_itself(tiny):
    teacher = tiny(epochs=1)
    calibration = Calibration(teacher, ("+blur1", "+noise0.3"), drop=1)
    (result,) = train([OnDistorted(teacher, calibration)])
    assert result.run == distorted(teacher, calibration.choose())


def test_a_forecast_counts_the_calibration_and_one_student():
    recipe = Recipe(2, 32, 0.1)
    teacher = Run("cifar100", "resnet32", recipe)
    student = Run("cifar100", "resnet14", recipe, CrossEntropy())
    calibration = Calibration(teacher, ("+blur1", "+noise0.3"), drop=1)
    data = [run.data for run in OnDistorted(student, calibration).estimate()]
    assert data == ["cifar100", "cifar100+blur1", "cifar100+noise0.3", "cifar100+blur1"]
