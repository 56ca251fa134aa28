"""Training: its arithmetic, its log, and the teachers of a run."""

from dataclasses import replace

import pytest
import torch
from helpers import batches, final_weights
from torch.nn import functional as F

from kdlib import KD, build_model, load_data, store, train
from kdlib.engine.logit_cache import folded
from kdlib.engine.plan import mix
from kdlib.engine.train import CACHES
from kdlib.errors import NotFinite
from kdlib.store import fingerprint

# --- arithmetic -----------------------------------------------------------------------------------


def plain_loop(run, teacher, temperature=5.0):
    """Distillation in plain PyTorch: the trained network and the mean loss of each epoch."""
    images, recipe = load_data("digits").first(run.images), run.recipe
    model = build_model(run.model, classes=10, channels=1, seed=mix("weights", run.seed)).train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=0.9,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, list(recipe.milestones), recipe.decay
    )
    history = [[] for _ in range(recipe.epochs)]
    for epoch, index, view in batches(run, images):
        while schedule.last_epoch < epoch:
            schedule.step()
        x = images.batch(index, view)
        logits, labels = model(x), images.labels[index]
        with torch.no_grad():
            taught = F.softmax(teacher(x) / temperature, 1)
        kl = (taught * (taught.log() - F.log_softmax(logits / temperature, 1))).sum(1).mean()
        loss = F.cross_entropy(logits, labels) + temperature**2 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history[epoch].append(loss.item())
    return model, [sum(losses) / len(losses) for losses in history]


@pytest.mark.parametrize("nesterov", [False, True])
def test_training_equals_a_plain_pytorch_loop(tiny, nesterov):
    teacher = train([tiny(model="resnet14-x0.25")])[0]
    run = tiny(epochs=3, method=KD(teacher.run), milestones=(1, 2), decay=0.3, nesterov=nesterov)
    student = train([run])[0]
    # Folded, as in the cache: another rounding of a logit can move an activation over 0.
    model, losses = plain_loop(run, folded(teacher.model()))
    trained = student.model().state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    assert student.log.train_loss.tolist() == pytest.approx(losses, rel=1e-6)
    assert student.log.lr.tolist() == pytest.approx([0.05, 0.05 * 0.3, 0.05 * 0.09])


def test_momentum_may_be_zero(tiny):
    assert train([tiny(momentum=0.0)])[0].epochs == 2


def test_a_network_learns_digits(tiny):
    run = replace(tiny(epochs=2, batch=64, lr=0.1, model="resnet8-x0.5"), images=None)
    assert train([run])[0].final["test_top1"] > 60


def test_a_kept_checkpoint_equals_the_end_of_a_shorter_run(tiny):
    long, short = train([tiny(epochs=3, keep=(1, 2)), tiny(epochs=2)])
    assert long.summary["weights"].keys() == {"1", "2", "3"}
    assert long.summary["weights"]["2"] == final_weights(short)
    assert fingerprint(long.model(2).state_dict()) == final_weights(short)
    assert final_weights(long) != final_weights(short)


# --- teachers -------------------------------------------------------------------------------------


def test_teachers_are_bit_identical_after_their_students_trained(tiny):
    teacher = train([tiny()])[0]
    assert any("running_mean" in name for name in teacher.model().state_dict())
    train([tiny(method=KD(teacher.run), seed=seed) for seed in (1, 2)])
    assert fingerprint(teacher.model().state_dict()) == final_weights(teacher)
    caches = list(CACHES.caches.values())
    assert caches
    in_caches = {fingerprint(cache.teacher.state_dict()) for cache in caches}
    assert in_caches == {fingerprint(folded(teacher.model()).state_dict())}


def test_a_teacher_is_trained_first_and_only_for_an_untrained_student(tiny, epochs_trained):
    teacher = tiny()
    student = tiny(method=KD(teacher), seed=1)
    train([student])
    assert epochs_trained == [(teacher.id, 1), (teacher.id, 2), (student.id, 1), (student.id, 2)]
    train([teacher, student])
    assert len(epochs_trained) == 4


@pytest.mark.parametrize("at", [1, 2, None])
def test_a_student_learns_from_the_checkpoint_of_its_method(tiny, at):
    teacher = tiny(epochs=3)
    student = train([tiny(method=KD(teacher, at=at), seed=1)])[0]
    weights = store.find_record(teacher).summary["weights"]
    assert student.summary["teachers"] == {f"{teacher.id}@{at or 3}": weights[str(at or 3)]}


def test_data_sets_do_not_share_the_logits_of_one_teacher(tiny, photos, elsewhere):
    """Such as a data set and its distorted copy, whose images have the same numbers."""
    clean = photos("clean/photos", count=20, seed=0)
    noisy = photos("noisy/photos", count=20, seed=1)
    teacher = tiny(data=f"folder:{clean}")
    students = [tiny(data=f"folder:{data}", method=KD(teacher), seed=1) for data in (clean, noisy)]
    alone = [elsewhere(student)[0] for student in students]
    assert list(map(final_weights, train(students))) == list(map(final_weights, alone))


# --- many runs ------------------------------------------------------------------------------------


def test_train_accepts_no_run_and_a_run_twice(tiny, epochs_trained):
    assert train([]) == []
    first, second = train([tiny(keep=(1,)), tiny()])
    assert len(epochs_trained) == 2
    assert first.summary == second.summary
    assert first.summary["weights"].keys() == {"1", "2"}


def test_a_mapping_of_rows_gives_a_mapping_of_results(tiny):
    rows = {"a": [tiny(), tiny(seed=1)], "none": [], "b": (run for run in [tiny(seed=1)])}
    results = train(rows)
    assert {row: [t.run.seed for t in found] for row, found in results.items()} == {
        "a": [0, 1],
        "none": [],
        "b": [1],
    }


# --- losses that are not finite -------------------------------------------------------------------


def test_losses_that_are_not_finite_stop_their_runs_alone_and_are_reported_together(tiny):
    bad, worse, good = tiny(lr=1e30), tiny(lr=1e30, seed=2), tiny(seed=1)
    with pytest.raises(NotFinite) as stop:
        train([bad, worse, good])
    assert [worse.id in note for note in stop.value.__notes__] == [True]
    for word in ("train_loss", str(bad), "epoch 1", "learning rate"):
        assert word in str(stop.value)
    assert store.find_record(bad) is None
    assert store.find_record(good) is not None


def test_the_students_of_a_failed_teacher_are_not_trained(tiny, epochs_trained):
    bad, good = tiny(lr=1e30), tiny(seed=1)
    student = tiny(method=KD(bad))
    runs = [student, good, tiny(method=KD(student), seed=2)]
    with pytest.raises(NotFinite, match=bad.id):
        train(runs)
    with pytest.warns(UserWarning, match=bad.id):
        results = train(runs, partial=True)
    assert [trained and trained.run for trained in results] == [None, good, None]
    assert {run for run, _ in epochs_trained} == {bad.id, good.id}


def test_a_failed_run_is_not_tried_again_where_the_caller_does_not_want_it(tiny, epochs_trained):
    run = tiny(epochs=3, milestones=(1,), decay=1e30)
    student = tiny(method=KD(run), seed=1)
    for retry in (True, False, False):
        with pytest.warns(UserWarning, match="is nan in epoch 2"):
            assert train([run, student], partial=True, retry=retry) == [None, None]
    assert [epoch for _, epoch in epochs_trained] == [1, 2]
    with pytest.raises(NotFinite):
        train([student])
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 2]


def test_a_run_that_succeeds_at_another_try_is_failed_no_more(tiny, epochs_trained):
    run = tiny()
    store.folder(run).mkdir(parents=True)
    store.failure_path(run).write_text("on another machine, perhaps")
    with pytest.raises(NotFinite, match="on another machine, perhaps"):
        train([run], retry=False)
    assert epochs_trained == []
    assert train([run])[0].epochs == 2
    assert train([replace(run, keep=(1,))], retry=False)[0].epochs == 2


def test_the_last_finite_epoch_is_kept_after_a_loss_that_is_not_finite(tiny, epochs_trained):
    run = tiny(epochs=3, milestones=(1,), decay=1e30)
    for _ in range(2):
        with pytest.raises(NotFinite, match="epoch 2"):
            train([run])
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 2]
    tensors, about = store.load_tensors(store.folder(run) / "state.safetensors")
    assert len(about["log"]) == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_then_is_called_with_each_result_as_soon_as_it_is_trained(tiny):
    teacher, told = tiny(model="resnet14-x0.25"), []
    runs = [tiny(method=KD(teacher), seed=seed) for seed in (1, 2)]

    def note(trained):
        assert trained.model()
        told.append((trained.run.id, [store.find_record(run) is not None for run in runs]))

    train({"student": runs[:1], "again": runs}, then=note)
    assert told == [(runs[0].id, [True, False]), (runs[1].id, [True, True])]
    train(runs, then=note)
    assert [name for name, _ in told[2:]] == [run.id for run in runs]


def test_then_is_not_called_with_a_run_that_failed(tiny):
    told, bad, good = [], tiny(lr=1e30), tiny(seed=1)
    with pytest.warns(UserWarning, match=bad.id):
        train([bad, good], partial=True, then=lambda trained: told.append(trained.run))
    assert told == [good]
