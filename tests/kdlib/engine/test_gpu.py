"""On a GPU: a step that is captured once and replayed equals the eager step."""

import shutil
from dataclasses import dataclass, replace
from itertools import count

import pytest
import torch

from kdbook.search import extraction
from kdlib import KD, Checkpoint, Recipe, Run, build_model, count_cost, load_data, store, train
from kdlib.chains.found import FoundStudent
from kdlib.chains.greedy import GreedySearch, anchors, divergences
from kdlib.engine import LogitCache, state
from kdlib.engine import trainer as trainer_module
from kdlib.engine.cache_pool import HOST, CachePool
from kdlib.engine.logit_cache import folded
from kdlib.engine.plan import mix
from kdlib.engine.train import CACHES
from kdlib.engine.trainer import Trainer
from kdlib.methods import (
    FSP,
    KDGAN,
    KR,
    NST,
    STC,
    AttentionTransfer,
    FactorTransfer,
    GateSearch,
    Hint,
    MutualLearning,
    Penalised,
    RocketLaunching,
    paraphrase,
)
from kdlib.methods.route import OneStage, multi_stage
from kdlib.store import fingerprint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# 1,438 images in batches of 56 are 51 steps in two epochs; the rate falls between them.
RUN = Run("digits", "resnet8-x0.5", Recipe(2, 56, 0.05, milestones=(1,)))


@pytest.fixture(autouse=True)
def same_kernels_every_time(monkeypatch):
    monkeypatch.setenv("KDLIB_DETERMINISTIC", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture
def gpu():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def another_home(tmp_path, monkeypatch):
    """Change to a copy of the present store; later runs are trained in the copy alone."""
    number = count()

    def move():
        here, there = tmp_path / "home", tmp_path / f"home{next(number)}"
        if here.exists():
            shutil.copytree(here, there)
        monkeypatch.setenv("KDLIB_HOME", str(there))

    return move


@pytest.fixture
def start(gpu, another_home):
    """A trainer at the start of its first epoch, in a store of its own."""

    def make(run, capture):
        another_home()
        images = load_data(run.data, "train", gpu).first(run.images)
        trainer = Trainer(
            run, images, load_data(run.data, "test", gpu), CachePool(), capture=capture
        )
        trainer.begin_epoch()
        assert (trainer.graph is not None) == capture
        return trainer

    return make


def advance(trainer, steps):
    for _ in range(steps):
        trainer.advance()
    torch.cuda.synchronize()


def finish(trainer):
    while True:
        while trainer.taken < trainer.steps:  # fewer than planned where the method ends the epoch
            trainer.advance()
            trainer.check_stop()
        trainer.end_epoch()
        if trainer.finished:
            return trainer
        trainer.begin_epoch()


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def momentum(trainer):
    states = {
        name: trainer.state.optimizers["student"].state[p]
        for name, p in trainer.state.modules["student"].named_parameters()
    }
    return {name: state["momentum_buffer"] for name, state in states.items()}


def whole(trainer):
    """Weights, statistics and momentum of all modules, and the curve."""
    return trainer.state.tensors()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def training_log(trainer):
    return [
        {name: value for name, value in row.items() if name != "seconds"} for row in trainer.log
    ]


# --- capture --------------------------------------------------------------------------------------


def test_capturing_changes_nothing(start, gpu):
    trainer = start(RUN, capture=True)
    fresh = build_model(RUN.model, 10, 1, seed=mix("weights", RUN.seed)).to(gpu)
    assert_equal(dict(trainer.state.modules["student"].state_dict()), dict(fresh.state_dict()))
    assert not any(buffer.any() for buffer in momentum(trainer).values())
    assert not any(total.any() for total in trainer.meter.values())
    assert not trainer.data.cursor.any()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_momentum_and_statistics_after_the_first_steps_are_those_of_an_eager_trainer(start, steps):
    """A captured first step would forget all earlier gradients in every replay."""
    captured, eager = start(RUN, capture=True), start(RUN, capture=False)
    advance(captured, steps)
    advance(eager, steps)
    assert_equal(momentum(captured), momentum(eager))
    assert_equal(
        dict(captured.state.modules["student"].state_dict()),
        dict(eager.state.modules["student"].state_dict()),
    )
    assert captured.data.cursor.item() == eager.data.cursor.item() == steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_trainer_equals_an_eager_one_for_50_steps(start, monkeypatch, dtype):
    monkeypatch.setattr(state, "training_dtype", lambda device: dtype)
    captured, eager = finish(start(RUN, capture=True)), finish(start(RUN, capture=False))
    assert training_log(captured) == training_log(eager)
    assert_equal(
        dict(captured.state.modules["student"].state_dict()),
        dict(eager.state.modules["student"].state_dict()),
    )
    assert_equal(momentum(captured), momentum(eager))


@dataclass(frozen=True)
class Route(KD):
    """Each epoch learns from the teacher's checkpoint of the same epoch."""

    def teacher_at(self, epoch):
        return Checkpoint(self.teacher, epoch + 1)


def test_a_captured_student_of_changing_teachers_equals_an_eager_one(start, gpu):
    train([replace(RUN, keep=(1,))], device=gpu)
    run = replace(RUN, method=Route(RUN), seed=1)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert training_log(captured) == training_log(eager)
    assert_equal(
        dict(captured.state.modules["student"].state_dict()),
        dict(eager.state.modules["student"].state_dict()),
    )


@pytest.mark.parametrize("capture", [True, False])
def test_a_change_of_the_learning_rate_takes_effect(start, capture):
    """At a rate of zero weights stand still, while batch statistics move on."""
    run = replace(RUN, recipe=replace(RUN.recipe, decay=0.0))
    trainer = start(run, capture)
    advance(trainer, trainer.steps)
    trainer.end_epoch()
    parameters = copies(dict(trainer.state.modules["student"].named_parameters()))
    buffers = copies(dict(trainer.state.modules["student"].named_buffers()))
    trainer.begin_epoch()
    advance(trainer, trainer.steps)
    assert_equal(dict(trainer.state.modules["student"].named_parameters()), parameters)
    assert not any(
        torch.equal(b, buffers[name])
        for name, b in trainer.state.modules["student"].named_buffers()
    )


def test_an_evaluation_between_replays_leaves_training_alone(start):
    trainer, undisturbed = start(RUN, capture=True), start(RUN, capture=True)
    for _ in range(3):
        advance(trainer, 5)
        trainer._evaluate()
        trainer.state.modules["student"].train()
    advance(undisturbed, 15)
    assert_equal(
        dict(trainer.state.modules["student"].state_dict()),
        dict(undisturbed.state.modules["student"].state_dict()),
    )


def test_a_resumed_trainer_equals_an_uninterrupted_one(start, gpu, monkeypatch):
    monkeypatch.setattr(trainer_module, "SAVING_SHARE", 1e9)
    uninterrupted = finish(start(RUN, capture=True))
    first = start(RUN, capture=True)
    advance(first, first.steps)
    first.end_epoch()
    images = load_data(RUN.data, "train", gpu)
    resumed = Trainer(RUN, images, load_data(RUN.data, "test", gpu), CachePool())
    assert resumed.epoch == 1
    resumed.begin_epoch()
    assert_equal(momentum(resumed), momentum(first))
    finish(resumed)
    assert training_log(resumed) == training_log(uninterrupted)
    assert_equal(
        dict(resumed.state.modules["student"].state_dict()),
        dict(uninterrupted.state.modules["student"].state_dict()),
    )


# --- parallel runs --------------------------------------------------------------------------------


def test_parallel_runs_equal_runs_one_by_one(gpu, another_home):
    train([RUN], device=gpu)
    recipe = replace(RUN.recipe, epochs=3)
    runs = [
        replace(RUN, seed=1),
        replace(RUN, seed=2, method=KD(RUN), model="resnet14-x0.5"),
        replace(RUN, seed=3, method=KD(RUN), recipe=recipe),
        replace(RUN, seed=4, model="mobilenetv2-t4-w0.35", recipe=replace(recipe, batch=64)),
    ]
    results = []
    for parallel in (1, 4):
        another_home()
        CACHES.clear()
        results.append(train(runs, device=gpu, parallel=parallel))
    alone, together = ([trained.summary for trained in part] for part in results)
    assert [c["weights"] for c in together] == [c["weights"] for c in alone]
    assert [c["teachers"] for c in together] == [c["teachers"] for c in alone]


def test_teachers_are_bit_identical_after_their_students_trained(gpu):
    teacher = train([RUN], device=gpu)[0]
    train([replace(RUN, seed=1, method=KD(RUN))], device=gpu)
    kept = teacher.summary["weights"]["2"]
    assert fingerprint(teacher.model().state_dict()) == kept
    assert {fingerprint(cache.teacher.state_dict()) for cache in CACHES.caches.values()} == {
        fingerprint(folded(teacher.model()).state_dict())
    }
    assert store.find_record(RUN).summary == teacher.summary


def test_a_gpu_trains_as_a_cpu_does(gpu, another_home):
    run = replace(RUN, recipe=replace(RUN.recipe, epochs=1, milestones=()))
    losses = []
    for device in ("cpu", gpu):
        another_home()
        losses.append(train([run], device=device)[0].final["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# --- data and logits ------------------------------------------------------------------------------


def test_a_batch_is_the_same_on_every_device(photos, gpu):
    name = f"folder:{photos()}"
    on_cpu, on_gpu = load_data(name), load_data(name, device=gpu)
    index, view = torch.arange(8).repeat(81)[:162], torch.arange(162)
    batch = on_gpu.batch(index.to(gpu), view.to(gpu))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.cpu(), on_cpu.batch(index, view), rtol=0, atol=1e-6)


@pytest.fixture
def teacher():
    model = build_model("resnet20", classes=10, channels=1, seed=0)
    digits = load_data("digits")
    with torch.no_grad():
        model(digits.batch(torch.arange(500)))
    return model.eval()


def test_logits_in_half_precision_are_close_to_exact_ones(teacher, gpu):
    cpu, index = load_data("digits", "test"), torch.arange(359)
    with torch.no_grad():
        exact = teacher(cpu.batch(index))
    cache = LogitCache(teacher, load_data("digits", "test", gpu))
    logits = cache.logits(index.to(gpu), torch.full_like(index, cpu.centre).to(gpu))
    assert logits.dtype == torch.float16
    scale = exact.abs().max()
    assert (logits.cpu().float() - exact).abs().max() < 0.01 * scale
    assert (logits.cpu().argmax(1) == exact.argmax(1)).float().mean() > 0.98


def test_logits_do_not_depend_on_when_they_were_computed(teacher, gpu):
    images = load_data("digits", "train", gpu)
    first, second = LogitCache(teacher, images), LogitCache(teacher, images)
    index = torch.arange(len(images), device=gpu)
    view = index % images.views
    expected = first.logits(index, view)
    assert torch.equal(expected, first.compute(index, view))
    for part in torch.randperm(len(images), generator=torch.manual_seed(0)).to(gpu).split(300):
        second.logits(index[part], view[part])
    assert torch.equal(second.logits(index, view), expected)


# --- peers, teachers in the step, and routes ------------------------------------------------------

PEERS_RECIPE = Recipe(2, 56, 0.02, milestones=(1,), decay=0.5, momentum=0.8)
PAIRS = [
    method("resnet14-x0.5", PEERS_RECIPE, **other)
    for method, other in ((RocketLaunching, {"kd_weight": 0.7}), (MutualLearning, {}))
]
every_pair = pytest.mark.parametrize("method", PAIRS, ids=lambda m: type(m).__name__)


@every_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_pair_equals_an_eager_one(start, monkeypatch, method, dtype):
    """Two optimizers in one graph; the rate of each falls between the epochs."""
    monkeypatch.setattr(state, "training_dtype", lambda device: dtype)
    run = replace(RUN, method=method)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert training_log(captured) == training_log(eager)
    assert any(name.startswith("momentum.peer.") for name in whole(captured))
    assert_equal(whole(captured), whole(eager))


@every_pair
def test_capturing_a_pair_changes_nothing(start, method):
    run = replace(RUN, method=method)
    captured, eager = start(run, capture=True), start(run, capture=False)
    assert_equal(dict(captured.state.modules.state_dict()), dict(eager.state.modules.state_dict()))
    assert not any(buffer.any() for buffer in captured.state.momentum().values())


def test_a_captured_student_whose_teacher_changes_in_place_equals_an_eager_one(start, gpu):
    """With an adapter, from 32 channels to 64."""
    teacher = replace(RUN, model="resnet8", keep=(1,))
    (trained,) = train([teacher], device=gpu)
    run = replace(RUN, method=OneStage(Hint(teacher), gap=1), seed=1)
    captured, eager = start(run, capture=True), start(run, capture=False)
    for epoch in (1, 2):
        for trainer in (captured, eager):
            taught = fingerprint(trainer.teachers.network.state_dict())
            assert taught == trained.summary["weights"][str(epoch)]
            advance(trainer, trainer.steps)
            trainer.end_epoch()
            assert fingerprint(trainer.teachers.network.state_dict()) == taught
            if not trainer.finished:
                trainer.begin_epoch()
    assert training_log(captured) == training_log(eager)
    assert "adapter.weight" in whole(captured)
    assert_equal(whole(captured), whole(eager))


def test_the_last_anchor_of_a_captured_hint_is_not_the_first(start, gpu):
    """A graph that kept the first teacher's weights would make them equal."""
    train([replace(RUN, model="resnet8", keep=(1,))], device=gpu)
    teacher = replace(RUN, model="resnet8")
    trainers = [
        finish(start(replace(RUN, method=method, seed=1), capture=True))
        for method in (OneStage(Hint(teacher), gap=1), Hint(teacher, at=1))
    ]
    first, last = ([trainer.log[k]["train_hint"] for trainer in trainers] for k in (0, 1))
    assert first[0] == first[1]
    assert last[0] != last[1]


@pytest.mark.parametrize("method", [PAIRS[0], Hint(replace(RUN, model="resnet8"))])
def test_a_resumed_trainer_with_auxiliary_modules_equals_an_uninterrupted_one(
    start, gpu, monkeypatch, method
):
    monkeypatch.setattr(trainer_module, "SAVING_SHARE", 1e9)
    if isinstance(method, Hint):
        train([method.teacher], device=gpu)
    run = replace(RUN, method=method, seed=1)
    uninterrupted, first = finish(start(run, capture=True)), start(run, capture=True)
    advance(first, first.steps)
    first.end_epoch()
    images = load_data(run.data, "train", gpu)
    resumed = Trainer(run, images, load_data(run.data, "test", gpu), CachePool())
    assert resumed.epoch == 1
    resumed.begin_epoch()
    finish(resumed)
    assert training_log(resumed) == training_log(uninterrupted)
    assert_equal(whole(resumed), whole(uninterrupted))


WIDER = replace(RUN, model="resnet8")  # twice the student's channels
PARAPHRASER = paraphrase(WIDER, Recipe(1, 56, 0.05))
WITH_KD = {"ce_weight": 0.1, "kd_weight": 0.9}
OF_FEATURES = [
    STC(WIDER, **WITH_KD),
    STC(WIDER, cut=3, target="truth"),
    AttentionTransfer(WIDER, **WITH_KD),
    FactorTransfer(WIDER, paraphraser=PARAPHRASER),
]


@pytest.mark.parametrize("method", OF_FEATURES, ids=lambda m: type(m).__name__)
def test_a_captured_student_of_features_equals_an_eager_one(start, gpu, method):
    train([PARAPHRASER], device=gpu)
    run = replace(RUN, method=method, seed=1)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    teacher = captured.teachers.network
    assert fingerprint(teacher.state_dict()) == store.saved_fingerprint(WIDER, RUN.recipe.epochs)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_a_captured_paraphraser_equals_an_eager_one_and_leaves_its_network_alone(start, gpu):
    (teacher,) = train([WIDER], device=gpu)
    captured, eager = (finish(start(PARAPHRASER, capture=c)) for c in (True, False))
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    student = captured.state.modules["student"].state_dict()
    assert fingerprint(student) == teacher.summary["weights"][str(RUN.recipe.epochs)]


def test_stages_and_searches_are_trained_together(gpu):
    """Every epoch is too hard for a threshold this low: the anchors are 1, 2, 3."""
    recipe = replace(RUN.recipe, epochs=3)
    teacher = replace(RUN, model="resnet14-x0.5", recipe=recipe, keep=(1, 2), save_logits=True)
    student = replace(RUN, method=KD(teacher), seed=1)
    searches = [GreedySearch(student, first=1, delta=delta) for delta in (-10.0, 1e9)]
    staged, all_of_them, two = train([multi_stage(student, (1, 3))[-1], *searches], device=gpu)
    assert anchors(all_of_them) == [1, 2, 3]
    assert anchors(two) == [1, 3]
    assert staged.summary["weights"] == two.summary["weights"]
    kept = store.find_record(teacher).summary["weights"]
    assert two.summary["teachers"][f"{teacher.id}@3"] == kept["3"]
    seen = divergences(all_of_them)
    assert seen.anchor.tolist() == [1, 1, 1, 2, 2, 2]
    assert (seen.kl > 0).all()


# --- extra updates, random inputs, and recoded gradients ------------------------------------------

PRIOR = Recipe(2, 56, 0.02, milestones=(1,), decay=0.5, momentum=0.8)
SAME = replace(RUN, model="resnet14-x0.5")  # the student's channels
GAN = {"discriminator": PEERS_RECIPE, "copy": PEERS_RECIPE}
WITH_PRIOR = {
    "KR": KR(WIDER, prior=PRIOR),
    "KR fixed, gamma": KR(WIDER, prior=PRIOR, threshold="fixed", gamma=0.1),
    "KR + KD": KR(WIDER, prior=PRIOR, posterior=KD(WIDER), threshold="none"),
    "KR + NST": KR(WIDER, prior=PRIOR, posterior=NST(WIDER)),
    "KR + KDGAN": KR(WIDER, prior=PRIOR, posterior=KDGAN(WIDER, **GAN)),
}
NEW = {
    **WITH_PRIOR,
    "KDGAN": KDGAN(WIDER, **GAN),
    "FSP": FSP(SAME, **WITH_KD),
    "FSP alone": FSP(SAME, ce_weight=0.0),
    "NST": NST(WIDER),
    "Hint alone": Hint(WIDER, stage=2, ce_weight=0.0),
    "sparse": Penalised(penalty="sparse", bins=5, every=10),
    "l1": Penalised(penalty="l1"),
}


@pytest.fixture
def teachers(gpu):
    return train([WIDER, SAME], device=gpu)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_trainer_of_every_other_method_equals_an_eager_one(
    start, teachers, monkeypatch, name, dtype
):
    monkeypatch.setattr(state, "training_dtype", lambda device: dtype)
    run = replace(RUN, method=NEW[name], seed=1)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    if name in WITH_PRIOR:
        assert any(key.startswith("momentum.prior.student.") for key in whole(captured))
    if teacher := captured.teachers.network:
        kept = {trained.summary["weights"]["2"] for trained in teachers}
        assert fingerprint(teacher.state_dict()) in kept
        assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_two_captured_updates_of_a_step_have_a_momentum_each(start, teachers):
    captured, eager = (start(replace(RUN, method=NEW["KR"]), capture=c) for c in (True, False))
    for steps in (1, 2):
        for trainer in (captured, eager):
            advance(trainer, 1)
        assert_equal(whole(captured), whole(eager))
        assert captured.data.cursor.item() == eager.data.cursor.item() == steps
    momenta = whole(captured)
    for name, _ in captured.state.modules["student"].named_parameters():
        prior = momenta.get(f"momentum.prior.student.{name}")
        if not name.startswith("head."):
            assert not torch.equal(prior, momenta[f"momentum.student.student.{name}"])


@pytest.mark.parametrize("name", NEW)
def test_capturing_any_other_method_changes_nothing(start, teachers, name):
    """Thresholds are not a number until the first batch, and a curve has no step."""
    run = replace(RUN, method=NEW[name])
    captured, eager = start(run, capture=True), start(run, capture=False)
    states = [dict(trainer.state.modules.state_dict()) for trainer in (captured, eager)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor.isnan(), states[1][key].isnan()), key
        assert torch.equal(tensor.nan_to_num(), states[1][key].nan_to_num()), key
    assert any(t.isnan().any() for t in states[0].values()) == (name in WITH_THRESHOLDS)
    assert not any(buffer.any() for buffer in captured.state.momentum().values())
    assert not any(total.any() for total in captured.meter.values())
    assert not captured.data.cursor.any()


WITH_THRESHOLDS = {"KR", "KR fixed, gamma", "KR + NST", "KR + KDGAN", "sparse"}


def test_random_inputs_change_in_place_with_the_epoch(start, teachers):
    captured, eager = (start(replace(RUN, method=NEW["KDGAN"]), capture=c) for c in (True, False))
    first = captured.data.inputs["uniform"].clone()
    assert torch.equal(first, eager.data.inputs["uniform"])
    address = captured.data.inputs["uniform"].data_ptr()
    advance(captured, captured.steps)
    captured.end_epoch()
    captured.begin_epoch()
    assert captured.data.inputs["uniform"].data_ptr() == address
    assert not torch.equal(captured.data.inputs["uniform"], first)


@pytest.mark.parametrize("name", ["KR", "KR + KDGAN", "sparse"])
def test_a_resumed_trainer_of_other_methods_equals_an_uninterrupted_one(
    start, teachers, gpu, monkeypatch, name
):
    monkeypatch.setattr(trainer_module, "SAVING_SHARE", 1e9)
    run = replace(RUN, method=NEW[name], seed=1)
    uninterrupted, first = finish(start(run, capture=True)), start(run, capture=True)
    advance(first, first.steps)
    first.end_epoch()
    images = load_data(run.data, "train", gpu)
    resumed = Trainer(run, images, load_data(run.data, "test", gpu), CachePool())
    assert resumed.epoch == 1
    resumed.begin_epoch()
    assert_equal(whole(resumed), whole(first))
    finish(resumed)
    assert training_log(resumed) == training_log(uninterrupted)
    assert_equal(whole(resumed), whole(uninterrupted))


def test_other_methods_in_parallel_equal_one_by_one(gpu, teachers, another_home):
    names = ("KR", "KR + KDGAN", "KDGAN", "sparse")
    runs = [replace(RUN, method=NEW[name], seed=k) for k, name in enumerate(names)]
    results = []
    for parallel in (1, 4):
        another_home()
        CACHES.clear()
        results.append(train(runs, device=gpu, parallel=parallel))
    alone, together = ([trained.summary["weights"] for trained in part] for part in results)
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recoded_gradients_and_their_thresholds_do_not_depend_on_their_scaling(
    start, monkeypatch, dtype
):
    """The method asks for float32, so that thresholds are of gradients without a scale."""
    monkeypatch.setattr(state, "training_dtype", lambda device: torch.float32)
    run = replace(RUN, method=NEW["sparse"])
    exact = start(run, capture=False)
    advance(exact, 1)
    monkeypatch.setattr(state, "training_dtype", lambda device: dtype)
    half = start(run, capture=False)
    advance(half, 1)
    ours, theirs = (trainer.state.modules["thresholds"].values for trainer in (half, exact))
    torch.testing.assert_close(ours, theirs)


# --- speed ----------------------------------------------------------------------------------------


def test_logits_of_the_next_epoch_are_computed_beside_training(start, gpu):
    (teacher,) = train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    trainer.look_ahead()
    assert trainer.data.next_logits
    advance(trainer, trainer.steps)
    index, view = (t.flatten() for t in trainer.data._plan(1))
    expected = LogitCache(teacher.model(), trainer.images).logits(index, view)
    assert torch.equal(trainer.data.next_logits[0].flatten(0, 1), expected)
    trainer.end_epoch()
    trainer.begin_epoch()
    assert torch.equal(trainer.data.teacher_logits[: trainer.steps].flatten(0, 1), expected.float())


def test_a_table_in_the_hosts_memory_gives_the_same_logits(start, gpu):
    (teacher,) = train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    resident, spilled = (LogitCache(teacher.model(), trainer.images) for _ in range(2))
    spilled.place = HOST
    for epoch in (0, 1, 0):
        index, view = (t.flatten() for t in trainer.data._plan(epoch))
        assert torch.equal(spilled.logits(index, view), resident.logits(index, view))
    assert spilled.table.device == HOST
    index, view = (t.flatten() for t in trainer.data._plan(2))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spilled.logits(index, view)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["KD", "STC", "KR"])
def test_a_compiled_trainer_equals_its_eager_step_and_is_close_to_an_uncompiled_one(
    start, teachers, monkeypatch, method
):
    made = {"KD": KD(WIDER), "STC": STC(WIDER, alpha=0.3, cut=2), "KR": WITH_PRIOR["KR"]}
    run = replace(RUN, method=made[method], seed=1)
    plain = finish(start(run, capture=True))
    monkeypatch.setenv("KDLIB_COMPILE", "always")
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert captured.state.compiled
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))
    for ours, theirs in zip(captured.log, plain.log, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)


def test_the_end_of_an_epoch_does_not_wait_for_the_teacher_pass_of_another_trainer(
    start, gpu, monkeypatch
):
    train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    advance(trainer, trainer.steps)
    with trainer.caches.beside(gpu) as done:
        torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    trainer.end_epoch()
    assert not done.query()
    torch.cuda.synchronize()


def test_the_memory_of_a_removed_cache_is_not_reused_while_it_is_read(start, gpu):
    (teacher,) = train([RUN], device=gpu)
    trainer = start(replace(RUN, method=KD(RUN), seed=1), capture=True)
    pool = CachePool()
    pool.get(("a",), lambda: LogitCache(teacher.model(), trainer.images))
    with pool.beside(gpu):
        torch.cuda._sleep(2_000_000_000)  # clock cycles: about a second
    pool._drop([("a",)])
    assert len(pool._leaving) == 1
    torch.cuda.synchronize()
    pool._drop([])
    assert not pool._leaving


@pytest.mark.parametrize("name", [*NEW, "CE"])
def test_a_step_waits_for_nothing(start, teachers, name):
    method = {"method": NEW[name]} if name in NEW else {}
    trainer = start(replace(RUN, **method), capture=False)
    advance(trainer, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.data.cursor.item() == 3


def test_a_chosen_number_of_parallel_runs_changes_no_result(
    gpu, teachers, another_home, monkeypatch
):
    monkeypatch.delenv("KDLIB_PARALLEL", raising=False)
    recipe = replace(RUN.recipe, epochs=4)
    runs = [replace(RUN, recipe=recipe, method=KD(WIDER), seed=seed) for seed in range(10)]
    results = []
    for parallel in (1, None):
        another_home()
        CACHES.clear()
        results.append(train(runs, device=gpu, parallel=parallel))
    alone, chosen = ([trained.summary["weights"] for trained in part] for part in results)
    assert chosen == alone


# --- a search, whose gates have an optimizer of their own and whose end depends on them -----------

DENSE = replace(RUN, model="densenet-bc-16-4")
SEARCH = replace(
    DENSE, method=GateSearch(DENSE, budget=0.5, strength=0.5, rate=0.05), start=DENSE, seed=1
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_search_equals_an_eager_one(start, gpu, monkeypatch, dtype):
    train([DENSE], device=gpu)
    monkeypatch.setattr(state, "training_dtype", lambda device: dtype)
    captured, eager = (finish(start(SEARCH, capture=c)) for c in (True, False))
    assert captured.stopped
    assert captured.taken == eager.taken < captured.planned
    assert training_log(captured) == training_log(eager)
    assert_equal(whole(captured), whole(eager))


def test_capturing_a_search_changes_no_gate(start, gpu):
    train([DENSE], device=gpu)
    trainer = start(SEARCH, capture=True)
    gates = trainer.state.modules["gates"].values
    assert (gates == 1).all()
    assert not trainer.state.optimizers["gates"].state[gates]["momentum_buffer"].any()


def test_what_is_found_on_a_gpu_trains_there(gpu):
    (found,) = train([FoundStudent(SEARCH, replace(DENSE, method=KD(DENSE)))], device=gpu)
    searched = store.find_record(SEARCH)
    network = build_model(found.run.model, 10, 1, seed=0)
    assert count_cost(network, 8).macs == searched.final["macs"]
    agreement = extraction(searched).iloc[0]
    assert agreement.difference < 1e-3 * agreement.logit


# The last test: an index out of bounds would make the device unusable for the others.
def test_an_epoch_may_have_fewer_steps_than_the_warm_up(start):
    run = replace(RUN, recipe=replace(RUN.recipe, batch=64), images=64)
    captured, eager = finish(start(run, capture=True)), finish(start(run, capture=False))
    assert_equal(
        dict(captured.state.modules["student"].state_dict()),
        dict(eager.state.modules["student"].state_dict()),
    )
