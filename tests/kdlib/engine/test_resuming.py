"""Interrupted runs: they continue, and end as if they had never been interrupted."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from helpers import final_weights, new_trainer, same_log, truncate

from kdlib import KD, OneStage, Penalised, store, train


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny, elsewhere, train_until, epochs_trained, stop
):
    method = OneStage(KD(tiny(epochs=4)), gap=1)
    run = tiny(epochs=4, milestones=(2,), method=method, keep=(1,), save_logits=True, seed=1)
    (expected,) = elsewhere(run)
    train_until(run, stop)
    epochs_trained.clear()
    resumed = train([run])[0]
    assert epochs_trained == [(run.id, epoch) for epoch in range(stop + 1, 5)]
    for key in ("weights", "teachers", "logits"):
        assert resumed.summary[key] == expected.summary[key]
    assert same_log(resumed, expected)
    assert store.holds_logits(resumed)


def test_a_damaged_resume_state_is_named_and_the_run_starts_from_the_beginning(
    tiny, elsewhere, train_until, epochs_trained
):
    run = tiny(epochs=3)
    (expected,) = elsewhere(run)
    train_until(run, 2)
    state = store.folder(run) / "state.safetensors"
    truncate(state)
    epochs_trained.clear()
    with pytest.warns(UserWarning, match=f"{state} is damaged.*starts from the beginning"):
        again = train([run])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 3]
    assert final_weights(again) == final_weights(expected)


@pytest.mark.parametrize("more", [{"keep": (1,)}, {"save_logits": True}])
def test_a_half_trained_run_asked_to_keep_more_starts_from_the_beginning(
    tiny, train_until, epochs_trained, more
):
    run = tiny(epochs=3)
    train_until(run, 2)
    epochs_trained.clear()
    trained = train([replace(run, **more)])[0]
    assert [epoch for _, epoch in epochs_trained] == [1, 2, 3]
    assert store.holds_weights(trained, {1} if "keep" in more else {3})
    assert store.holds_logits(trained) == ("save_logits" in more)


def test_a_half_trained_run_asked_to_keep_a_later_epoch_continues(
    tiny, train_until, epochs_trained
):
    train_until(tiny(epochs=4), 2)
    epochs_trained.clear()
    trained = train([tiny(epochs=4, keep=(3,))])[0]
    assert [epoch for _, epoch in epochs_trained] == [3, 4]
    assert trained.summary["weights"].keys() == {"3", "4"}


def test_a_finished_run_has_no_resume_state(tiny):
    run = tiny(epochs=3)
    train([run])
    names = {path.name for path in store.folder(run).iterdir()}
    assert names <= {"lock", "record.jsonl", "epoch-0003.safetensors"}


# --- the curve ------------------------------------------------------------------------------------


def test_a_curve_resumed_in_the_middle_of_a_bin_equals_an_uninterrupted_one(
    tiny, train_until, assert_resumes
):
    """128 images in batches of 24 are 5, 5 and 6 steps: the second epoch ends inside a bin of 4."""
    run = tiny(epochs=3, method=Penalised(every=4, bins=3))
    assert_resumes(run)
    trained = train([run])[0]
    curve = trained.summary["curve"]
    assert curve["every"] == 4
    assert len(curve["ce"]) == 3
    train_until(replace(run, seed=1), 2)
    resumed = new_trainer(replace(run, seed=1)).state
    assert resumed.curve_steps.item() == 10
    assert (resumed.curve > 0).tolist() == [True, True, True, False]


def test_a_curve_holds_the_means_of_complete_bins(tiny, monkeypatch):
    losses, loss = [], Penalised.loss

    def note(method, step):
        logits, terms = loss(method, step)
        losses.append(terms["ce"].item())
        return logits, terms

    monkeypatch.setattr(Penalised, "loss", note)
    for every, bins, complete in ((4, 3, 3), (4, 2, 2), (4, 9, 3)):  # 15 steps
        losses.clear()
        run = tiny(epochs=3, batch=25, method=Penalised(every=every, bins=bins))
        curve = train([run])[0].summary["curve"]
        expected = [sum(losses[4 * k : 4 * k + 4]) / 4 for k in range(complete)]
        assert curve["ce"] == pytest.approx(expected, rel=1e-6)


def test_a_run_does_not_inherit_the_curve_of_the_run_it_starts_from(tiny):
    method = Penalised(every=4, bins=3)
    first = tiny(epochs=3, method=method)
    second = tiny(epochs=3, method=method, start=first)
    train([first])
    state = new_trainer(second).state
    assert not state.curve.any()
    assert not state.curve_steps.any()


# --- processes ------------------------------------------------------------------------------------

EPOCHS = 30
SCRIPT = f"""
import sys
from kdlib import KD, Recipe, Run, train
def run(seed, **method):
    recipe = Recipe(epochs={EPOCHS}, batch=24, lr=0.05, milestones=(20,))
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
    """Start processes that train one student and its teacher."""
    started = []
    monkeypatch.setenv("KDLIB_LOG", str(tmp_path / "epochs.log"))

    def start(count):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", SCRIPT]
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
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


@pytest.fixture
def student():
    namespace = {"__name__": "script"}
    exec(SCRIPT, namespace)
    return namespace["student"]


def test_a_killed_run_ends_as_an_unkilled_one(processes, student, elsewhere, epochs_trained):
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


def test_two_processes_train_one_run_once(processes, student, tmp_path):
    answers = [process.communicate()[0] for process in processes(2)]
    assert answers[0] == answers[1] == f"{store.find_record(student).summary['weights']}\n"
    lines = (tmp_path / "epochs.log").read_text().splitlines()
    assert len(lines) == 2 * EPOCHS
