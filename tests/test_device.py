"""What is set for a device, and what compiling does."""

from functools import partial

import pytest
import torch

from kdlib import KD, build_model, train
from kdlib.engine.device import COMPILED_STEPS, InFloat32, worth_compiling
from kdlib.methods import KR, STC, AttentionTransfer, GateSearch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("KDLIB_COMPILE", raising=False)


@pytest.mark.parametrize(
    ("capability", "steps", "worth"),
    [
        ((9, 0), COMPILED_STEPS, True),
        ((9, 0), COMPILED_STEPS - 1, False),
        ((7, 5), COMPILED_STEPS, False),  # a T4, for which the compiler has no backend any more
    ],
)
def test_long_runs_on_a_gpu_are_compiled(monkeypatch, capability, steps, worth):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert worth_compiling(GPU, steps) == worth


def test_on_a_cpu_nothing_is_compiled_but_on_demand(monkeypatch):
    assert not worth_compiling(CPU, 10**9)
    monkeypatch.setenv("KDLIB_COMPILE", "always")
    assert worth_compiling(CPU, 1)
    monkeypatch.setenv("KDLIB_COMPILE", "never")
    assert not worth_compiling(GPU, 10**9)


def test_an_unknown_wish_is_refused(monkeypatch):
    monkeypatch.setenv("KDLIB_COMPILE", "sometimes")
    with pytest.raises(ValueError, match="KDLIB_COMPILE=sometimes: it takes auto, never or always"):
        worth_compiling(CPU, 1)


# --- compiled lanes -------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """What is compiled from now on: all, by the compiler's front end, which takes no minutes."""
    methods, compile, prepare = [], torch.compile, InFloat32._prepare

    def note(called, name):
        if called.compiled:
            methods.append(name)
        return prepare(called, name)

    monkeypatch.setenv("KDLIB_COMPILE", "always")
    monkeypatch.setattr(torch, "compile", partial(compile, backend="aot_eager"))
    monkeypatch.setattr(InFloat32, "_prepare", note)
    yield methods
    torch._dynamo.reset()


METHODS = {
    "KD": (lambda teacher: KD(teacher), {"__call__"}),
    "STC": (lambda teacher: STC(teacher, alpha=0.3, cut=2), {"until", "resume"}),
    "AT": (lambda teacher: AttentionTransfer(teacher), {"stages", "head"}),
    "KR": (lambda teacher: KR(teacher, prior=teacher.recipe), {"layers"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_lane_trains_as_an_eager_one(tiny, elsewhere, compiled, monkeypatch, name):
    make, called = METHODS[name]
    teacher = tiny(model="resnet14-x0.25")
    run = tiny(method=make(teacher), seed=1)
    train([teacher])
    with monkeypatch.context() as patch:
        patch.setenv("KDLIB_COMPILE", "never")
        (eager,) = elsewhere(run)
    del compiled[:]
    ours = train([run])[0]
    assert called <= set(compiled)
    assert ours.closing["environment"]["compiled"]
    assert not eager.closing["environment"]["compiled"]
    terms = [c for c in eager.log if c.startswith(("train", "test"))]
    assert ours.log[terms].to_numpy() == pytest.approx(eager.log[terms].to_numpy(), rel=1e-3)


def test_a_compiled_search_calls_its_gated_network_compiled(tiny, compiled):
    dense = tiny(epochs=1, model="densenet-bc-16-4")
    method = GateSearch(dense, budget=0.9, strength=0.5, rate=0.05)
    train([tiny(method=method, model="densenet-bc-16-4", start=dense)])
    assert "with_weights" in compiled


def test_evaluation_is_not_compiled(tiny, compiled):
    train([tiny()])
    assert compiled == ["__call__"]


@pytest.mark.parametrize("flag", [False, True])
def test_answers_are_in_float32(compiled, flag):
    network = build_model("resnet8-x0.25", 10, 1, seed=0).double().eval()
    called = InFloat32(network, CPU, torch.float32, flag)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    answers = [called(x), called.until(1, x), *called.features(x), *called.layers(x)[1]]
    answers += [called.head(network.stages(x)[-1]), called.with_weights({}, x)]
    assert {answer.dtype for answer in answers} == {torch.float32}
    torch.testing.assert_close(answers[0].double(), network(x), rtol=1e-5, atol=1e-6)
    assert bool(compiled) == flag
