import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import final_weights, interrupted, move, same_log
from torch.nn import functional as F

from kdlib import KD, KdlibError, build_model, load_data, store, train
from kdlib.engine import plan
from kdlib.engine import pool as pool_module
from kdlib.engine import trainer as trainer_module
from kdlib.engine.logit_cache import folded
from kdlib.engine.plan import epoch_batches, mix
from kdlib.engine.train import CACHES
from kdlib.engine.trainer import Trainer
from kdlib.errors import NotFinite
from kdlib.store import fingerprint

# --- the arithmetic -------------------------------------------------------------------------------


def plain_loop(run, teacher, temperature=5.0):
    """Distillation as anybody would write it; its weights, and the mean loss of each epoch."""
    images, recipe = load_data("digits").first(run.images), run.recipe
    model = build_model(run.model, classes=10, channels=1, seed=mix("weights", run.seed)).train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, list(recipe.milestones), recipe.decay
    )
    plans = [plan(run.seed, epoch, len(images), images.views) for epoch in range(recipe.epochs)]
    order, views = (torch.cat(parts) for parts in zip(*plans, strict=True))
    history = [[] for _ in range(recipe.epochs)]
    for step in range(len(order) // recipe.batch):
        rows = slice(step * recipe.batch, (step + 1) * recipe.batch)
        # a batch belongs to the epoch in which its last image comes
        epoch = (rows.stop - 1) // len(images)
        while schedule.last_epoch < epoch:
            schedule.step()
        x = images.batch(order[rows], views[rows])
        logits, labels = model(x), images.labels[order[rows]]
        with torch.no_grad():
            taught = F.softmax(teacher(x) / temperature, 1)
        kl = (taught * (taught.log() - F.log_softmax(logits / temperature, 1))).sum(1).mean()
        loss = F.cross_entropy(logits, labels) + temperature**2 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history[epoch].append(loss.item())
    return model, [sum(losses) / len(losses) for losses in history]


def test_training_equals_a_plain_pytorch_loop(tiny):
    teacher = train([tiny(model="resnet14-x0.25")])[0]
    run = tiny(epochs=3, method=KD(teacher.run), milestones=(1, 2), decay=0.3)
    student = train([run])[0]
    model, losses = plain_loop(run, teacher.model())
    trained = student.model().state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    assert student.log.train_loss.tolist() == pytest.approx(losses, rel=1e-6)


def test_the_log_says_how_good_the_model_is(tiny):
    trained = train([tiny()])[0]
    test = load_data("digits", "test")
    logits = trained.model()(test.batch(torch.arange(len(test))))
    hits = (logits.argmax(1) == test.labels).float().mean()
    assert trained.final["test_top1"] == pytest.approx(100 * hits.item())
    assert trained.final["test_ce"] == pytest.approx(F.cross_entropy(logits, test.labels).item())
    assert trained.log.epoch.tolist() == [1, 2]


def test_the_log_says_how_far_the_student_is_from_its_teacher(tiny):
    teacher, student = train([tiny(), tiny(method=KD(tiny()), seed=1)])
    test = load_data("digits", "test")
    x = test.batch(torch.arange(len(test)))
    logits, taught = (t.model()(x).log_softmax(1) for t in (student, teacher))
    kl = F.kl_div(logits, taught, reduction="batchmean", log_target=True)
    assert student.final["test_kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert "test_kl" not in teacher.final


def test_the_learning_rate_falls_at_the_milestones(tiny):
    trained = train([tiny(epochs=4, lr=0.08, milestones=(1, 3), decay=0.5)])[0]
    assert trained.log.lr.tolist() == [0.08, 0.04, 0.04, 0.02]


def test_momentum_may_be_zero(tiny):
    assert len(train([tiny(momentum=0.0)])[0].log) == 2


def test_a_network_learns_digits(tiny):
    run = replace(tiny(epochs=2, batch=64, lr=0.1, model="resnet8-x0.5"), images=None)
    assert train([run])[0].final["test_top1"] > 60


def test_a_kept_checkpoint_is_what_a_shorter_run_ends_with(tiny):
    long, short = train([tiny(epochs=3, keep=(1, 2)), tiny(epochs=2)])
    assert long.summary["weights"].keys() == {"1", "2", "3"}
    assert long.summary["weights"]["2"] == final_weights(short)
    assert fingerprint(long.model(2).state_dict()) == final_weights(short)
    assert final_weights(long) != final_weights(short)


# --- teachers -------------------------------------------------------------------------------------


def as_folded(teacher):
    """Fingerprint of a teacher as banks hold it."""
    return fingerprint(folded(teacher.model()).state_dict())


def test_teachers_are_bit_identical_after_their_students_trained(tiny):
    teacher = train([tiny()])[0]
    before = final_weights(teacher)
    assert any("running_mean" in name for name in teacher.model().state_dict())
    train([tiny(method=KD(teacher.run), seed=seed) for seed in (1, 2)])
    assert fingerprint(teacher.model().state_dict()) == before
    banks = list(CACHES.banks.values())
    assert banks
    assert {fingerprint(bank.teacher.state_dict()) for bank in banks} == {as_folded(teacher)}


def test_a_teacher_is_trained_first_and_only_where_a_student_needs_it(tiny, epochs_trained):
    teacher = tiny()
    student = tiny(method=KD(teacher), seed=1)
    train([student])
    assert epochs_trained == [(teacher.id, 1), (teacher.id, 2), (student.id, 1), (student.id, 2)]
    assert train([teacher])[0].run == teacher
    assert len(epochs_trained) == 4


@pytest.mark.parametrize("at", [1, 2, None])
def test_distillation_from_a_checkpoint_of_the_teachers_route(tiny, at):
    teacher = tiny(epochs=3)
    student = train([tiny(method=KD(teacher, at=at), seed=1)])[0]
    record = store.find_record(teacher)
    epoch = at or 3
    expected = {f"{teacher.id}@{epoch}": record.summary["weights"][str(epoch)]}
    assert student.summary["teachers"] == expected


@dataclass(frozen=True)
class Route(KD):
    """Each epoch is labelled by the teacher of the same epoch."""

    def teacher_at(self, epoch):
        return self.teacher, epoch + 1


def test_a_labeller_may_switch_teachers_by_epoch(tiny):
    teacher = tiny(epochs=3)
    route, first, second = train(
        [tiny(method=method) for method in (Route(teacher), KD(teacher, at=1), KD(teacher, at=2))]
    )
    weights = store.find_record(teacher).summary["weights"]
    assert route.summary["teachers"] == {f"{teacher.id}@{k}": weights[str(k)] for k in (1, 2)}
    columns = ["train_loss", "train_kd", "test_top1", "test_kl"]
    assert route.log[columns].iloc[0].equals(first.log[columns].iloc[0])
    assert route.final["train_kd"] not in (first.final["train_kd"], second.final["train_kd"])


def test_a_checkpoint_beyond_the_teachers_end_is_refused(tiny):
    with pytest.raises(ValueError, match=r"There is no epoch 9 of .* it has 1 to 2"):
        train([tiny(method=KD(tiny(), at=9))])


def test_a_teacher_asked_for_another_checkpoint_is_retrained_and_its_students_stay(
    tiny, epochs_trained
):
    teacher = tiny(epochs=3)
    old = train([tiny(method=KD(teacher), seed=1)])[0]
    before = store.find_record(teacher)
    epochs_trained.clear()
    new = train([tiny(method=KD(teacher, at=1), seed=1)])[0]
    assert [epoch for run, epoch in epochs_trained if run == teacher.id] == [1, 2, 3]
    after = store.find_record(teacher)
    assert final_weights(after) == final_weights(before)
    assert after.summary["weights"]["1"] == new.summary["teachers"][f"{teacher.id}@1"]
    epochs_trained.clear()
    assert final_weights(train([old.run])[0]) == final_weights(old)
    assert epochs_trained == []


def test_a_student_of_other_weights_of_its_teacher_is_trained_again(tiny):
    teacher = tiny()
    student = tiny(method=KD(teacher), seed=1)
    before = train([student])[0]
    moved = move(teacher, tiny(seed=5))
    with pytest.warns(UserWarning, match=f"other weights of its teacher.*{teacher.id}"):
        after = train([student])[0]
    assert after.summary["teachers"] == {f"{teacher.id}@2": moved}
    assert final_weights(after) != final_weights(before)


def test_a_half_trained_student_whose_teacher_moved_starts_anew(tiny, monkeypatch, epochs_trained):
    teacher, other = tiny(), tiny(seed=5)
    student = tiny(epochs=3, method=KD(teacher), seed=1)
    train([teacher])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train([student])
    assert (store.folder(student) / "state.safetensors").exists()
    moved = move(teacher, other)
    epochs_trained.clear()
    trained = train([student])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 3]
    assert trained.summary["teachers"] == {f"{teacher.id}@2": moved}


def test_folders_of_one_name_do_not_share_labels(tiny, photos, elsewhere):
    """Such as a data set and its distorted copy: one teacher, the same image numbers."""
    clean = photos("clean/photos", count=20, seed=0)
    noisy = photos("noisy/photos", count=20, seed=1)
    teacher = tiny(data=f"folder:{clean}")
    students = [tiny(data=f"folder:{data}", method=KD(teacher), seed=1) for data in (clean, noisy)]
    alone = [elsewhere(student)[0] for student in students]
    assert list(map(final_weights, train(students))) == list(map(final_weights, alone))


# --- many runs ------------------------------------------------------------------------------------


def test_a_second_call_loads_what_the_first_trained(tiny, monkeypatch):
    first = train([tiny(), tiny(method=KD(tiny()), seed=1)])
    monkeypatch.setattr(pool_module, "Trainer", None)
    second = train([trained.run for trained in first])
    assert all(map(same_log, first, second))
    assert [trained.summary for trained in first] == [trained.summary for trained in second]


def test_nothing_to_train_is_nothing_to_do():
    assert train([]) == []


def test_a_run_asked_for_twice_is_trained_once(tiny, epochs_trained):
    first, second = train([tiny(keep=(1,)), tiny()])
    assert len(epochs_trained) == 2
    assert first.summary == second.summary
    assert first.summary["weights"].keys() == {"1", "2"}


def test_lanes_side_by_side_equal_runs_one_by_one(tiny, elsewhere):
    teacher = tiny(model="resnet14-x0.25")
    runs = [
        tiny(seed=0),
        tiny(epochs=3, seed=1, method=KD(teacher)),
        tiny(seed=2, batch=32, method=KD(teacher, at=1)),
    ]
    alone = elsewhere(*runs, lanes=1)
    together = train(runs, lanes=3)
    assert list(map(final_weights, together)) == list(map(final_weights, alone))
    assert all(map(same_log, together, alone))


def test_out_of_memory_halves_the_lanes_and_changes_no_number(tiny, elsewhere, monkeypatch):
    runs = [tiny(seed=seed) for seed in range(4)]
    expected = elsewhere(*runs)
    alive, init = [], Trainer.__init__

    def start(lane, *arguments):
        init(lane, *arguments)
        alive.append(lane)
        if len({lane.run.id for lane in alive if not lane.finished}) > 2:
            alive.clear()
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "__init__", start)
    with pytest.warns(UserWarning, match="Out of memory with 3 lanes: 2 from now"):
        results = train(runs, lanes=4)
    assert list(map(final_weights, results)) == list(map(final_weights, expected))


def test_out_of_memory_with_one_lane_is_said(tiny, monkeypatch):
    def fail(lane):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "begin_epoch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train([tiny()])


# --- going on after an interruption ---------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny, elsewhere, monkeypatch, epochs_trained, stop
):
    teacher = tiny(epochs=4)
    run = tiny(epochs=4, milestones=(2,), method=Route(teacher), keep=(1,), seed=1)
    (expected,) = elsewhere(run)
    monkeypatch.setattr(trainer_module, "SAVING_SHARE", 1e9)  # save every epoch, however short
    end = Trainer.end_epoch

    def stopped(lane):
        row = end(lane)
        if lane.run == run and lane.epoch == stop:
            raise KeyboardInterrupt
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            train([run])
    assert store.find_record(run) is None
    epochs_trained.clear()
    CACHES.clear()
    resumed = train([run])[0]
    assert epochs_trained == [(run.id, epoch) for epoch in range(stop + 1, 5)]
    assert resumed.summary["weights"] == expected.summary["weights"]
    assert resumed.summary["teachers"] == expected.summary["teachers"]
    assert same_log(resumed, expected)


def test_an_interruption_within_an_epoch_costs_that_epoch_alone(
    tiny, elsewhere, monkeypatch, epochs_trained
):
    run = tiny(epochs=3)
    (expected,) = elsewhere(run)
    monkeypatch.setattr(trainer_module, "SAVING_SHARE", 1e9)
    step, epochs_trained[:] = Trainer.step, []

    def stopped(lane):
        step(lane)
        if lane.epoch == 1 and lane.cursor == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train([run])
    resumed = train([run])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 2, 3]
    assert final_weights(resumed) == final_weights(expected)
    assert same_log(resumed, expected)


def test_a_damaged_resume_state_is_said_and_the_run_starts_anew(
    tiny, elsewhere, monkeypatch, epochs_trained
):
    run = tiny(epochs=3)
    (expected,) = elsewhere(run)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train([run])
    state = store.folder(run) / "state.safetensors"
    os.truncate(state, state.stat().st_size // 2)
    epochs_trained.clear()
    with pytest.warns(UserWarning, match=f"{state} is damaged.*starts anew"):
        again = train([run])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 3]
    assert final_weights(again) == final_weights(expected)


def test_no_resume_state_outlives_its_run(tiny):
    run = tiny(epochs=3)
    train([run])
    names = {path.name for path in store.folder(run).iterdir()}
    assert names <= {"lock", "record.jsonl", "epoch-0003.safetensors"}


# --- processes ------------------------------------------------------------------------------------

EPOCHS = 60
SCRIPT = f"""
import sys
from kdlib import KD, Recipe, Run, train
def run(seed, **method):
    recipe = Recipe(epochs={EPOCHS}, batch=24, lr=0.05, milestones=(40,))
    return Run("digits", "resnet8-x0.25", recipe, seed=seed, images=128, **method)
student = run(1, method=KD(run(0)))
if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    trained = train([student])[0]
    print(trained.summary["weights"], flush=True)
"""


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """``start(count)``: processes that are about to train one student and its teacher."""
    started = []
    monkeypatch.setenv("KDLIB_LOG", str(tmp_path / "epochs.log"))

    def start(count):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", SCRIPT]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        new = [subprocess.Popen(command, env=environment, **pipes) for _ in range(count)]
        started.extend(new)
        assert all(process.stdout.readline() == "ready\n" for process in new)
        for process in new:
            process.stdin.write("go\n")
            process.stdin.flush()
        return new

    yield start
    for process in started:
        process.kill()
        process.communicate()


def the_student():
    namespace = {"__name__": "script"}
    exec(SCRIPT, namespace)
    return namespace["student"]


def test_a_run_killed_without_mercy_ends_as_one_never_killed(processes, elsewhere, epochs_trained):
    student = the_student()
    (process,) = processes(1)
    state = store.folder(student) / "state.safetensors"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (store.folder(student) / "record.jsonl").exists()
    resumed = train([student])[0]
    assert 0 < len(epochs_trained) < EPOCHS
    (expected,) = elsewhere(student)
    assert resumed.summary["weights"] == expected.summary["weights"]
    assert same_log(resumed, expected)


def test_two_processes_train_one_run_once(processes, tmp_path):
    answers = [process.communicate()[0] for process in processes(2)]
    assert answers[0] == answers[1] == f"{store.find_record(the_student()).summary['weights']}\n"
    lines = (tmp_path / "epochs.log").read_text().splitlines()
    assert len(lines) == 2 * EPOCHS


# --- losses that are not finite -------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tiny):
    run = tiny(lr=1e30)
    with pytest.raises(NotFinite) as stop:
        train([run])
    assert isinstance(stop.value, KdlibError)
    for word in ("train_loss", str(run), "epoch 1", "learning rate"):
        assert word in str(stop.value)
    assert store.find_record(run) is None


def test_a_run_that_fails_does_not_hold_up_the_others(tiny):
    bad, good = tiny(lr=1e30), tiny(seed=1)
    with pytest.raises(NotFinite, match=bad.id):
        train([bad, good])
    assert store.find_record(good) is not None


def test_the_last_good_epoch_outlives_a_loss_that_is_not_finite(tiny, epochs_trained):
    run = tiny(epochs=3, milestones=(1,), decay=1e30)
    for _ in range(2):
        with pytest.raises(NotFinite, match="epoch 2"):
            train([run])
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 2]
    tensors, about = store.load_tensors(store.folder(run) / "state.safetensors")
    assert len(about["log"]) == 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())


# --- progress -------------------------------------------------------------------------------------


def test_a_log_file_gets_a_line_for_every_epoch(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_LOG", str(tmp_path / "log"))
    run = tiny()
    (trained,) = train([run])
    lines = (tmp_path / "log").read_text().splitlines()
    for k, line in enumerate(lines, 1):
        assert f"{run} · epoch {k}/2 · loss " in line
    assert lines[1].endswith("0:00:00 left")
    row = trained.log.iloc[-1]
    told = r"· ([\d.]+) epochs/s · ([\d,]+) images/s · 0:00:00 left · all runs: "
    epochs, speed = re.search(told, lines[1]).groups()
    index, _ = epoch_batches(0, 1, 128, 9, 24)
    assert float(epochs) == pytest.approx(1 / row.seconds, rel=0.01)
    assert int(speed.replace(",", "")) == pytest.approx(index.numel() / row.seconds, abs=1)
    assert len(lines) == 2


def test_plain_progress_prints_a_line_for_every_run(tiny, monkeypatch, capsys):
    monkeypatch.setenv("KDLIB_PROGRESS", "lines")
    runs = [tiny(seed=0), tiny(seed=1)]
    train(runs)
    lines = capsys.readouterr().out.splitlines()
    for run, line in zip(runs, lines, strict=True):
        assert line.startswith(f"{run} · epoch 2/2 · loss ")


def test_quiet_progress_prints_nothing(tiny, capfd):
    train([tiny()])
    assert capfd.readouterr() == ("", "")


def test_a_bar_is_drawn_where_it_is_asked_for(tiny, monkeypatch, capfd):
    monkeypatch.setenv("KDLIB_PROGRESS", "bar")
    train([tiny()])
    assert "2/2" in capfd.readouterr().err


def test_a_run_that_loses_what_it_keeps_is_not_trained_for_ever(tiny, monkeypatch, epochs_trained):
    monkeypatch.setattr(store, "save_weights", lambda *arguments: "nowhere")
    run = tiny()
    with pytest.raises(KdlibError, match=rf"{run} was trained, but .* not in {store.folder(run)}"):
        train([run])
    assert len(epochs_trained) == 2
