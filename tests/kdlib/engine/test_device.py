"""The settings of a device, and compiled networks."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import new_trainer
from torch._dynamo.backends.debugging import aot_eager

from kdlib import KD, build_model, train
from kdlib.engine.device import COMPILED_STEPS, prepare, worth_compiling
from kdlib.methods import KR, STC, AttentionTransfer, GateSearch
from kdlib.models.precision import AutocastNetwork

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv("KDLIB_COMPILE", raising=False)


@pytest.mark.parametrize(
    ("capability", "steps", "worth"),
    [
        ((9, 0), COMPILED_STEPS, True),
        ((9, 0), COMPILED_STEPS - 1, False),
        ((7, 5), COMPILED_STEPS, False),  # a T4; the compiler does not support it
    ],
)
def test_long_runs_on_a_gpu_are_compiled(monkeypatch, capability, steps, worth):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert worth_compiling(GPU, steps) == worth


def test_a_cpu_compiles_only_on_demand(monkeypatch):
    assert not worth_compiling(CPU, 10**9)
    monkeypatch.setenv("KDLIB_COMPILE", "always")
    assert worth_compiling(CPU, 1)
    monkeypatch.setenv("KDLIB_COMPILE", "never")
    assert not worth_compiling(GPU, 10**9)


def test_unknown_settings_are_refused(monkeypatch):
    monkeypatch.setenv("KDLIB_COMPILE", "sometimes")
    with pytest.raises(ValueError, match="KDLIB_COMPILE=sometimes is not valid"):
        worth_compiling(CPU, 1)
    monkeypatch.setenv("KDLIB_DETERMINISTIC", "true")
    with pytest.raises(ValueError, match="KDLIB_DETERMINISTIC=true is not valid"):
        prepare(CPU)


@pytest.mark.parametrize(("asked", "exact"), [("1", True), ("", False)])
def test_deterministic_settings_reach_all_libraries(monkeypatch, asked, exact):
    monkeypatch.setenv("KDLIB_DETERMINISTIC", asked)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cudnn, inductor = torch.backends.cudnn, torch._inductor.config
    for module, flag in ((cudnn, "deterministic"), (cudnn, "benchmark")):
        monkeypatch.setattr(module, flag, getattr(module, flag))
    with inductor.patch(deterministic=not exact):
        try:
            prepare(GPU)
            assert (cudnn.deterministic, cudnn.benchmark) == (exact, not exact)
            assert torch.are_deterministic_algorithms_enabled() == exact
            assert inductor.deterministic == exact
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == exact
        finally:
            torch.use_deterministic_algorithms(False)


# --- compiled networks ----------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """Compile everything from now on, by the compiler's fast front end, and note it."""
    found, compile = SimpleNamespace(methods=[], graphs=0), torch.compile
    make = AutocastNetwork._prepare

    def note(network, name):
        if network.compiled:
            found.methods.append(name)
        return make(network, name)

    def by_front_end(graph, inputs):
        found.graphs += 1
        return aot_eager(graph, inputs)

    monkeypatch.setenv("KDLIB_COMPILE", "always")
    monkeypatch.setattr(torch, "compile", partial(compile, backend=by_front_end))
    monkeypatch.setattr(AutocastNetwork, "_prepare", note)
    yield found
    torch._dynamo.reset()


METHODS = {
    "KD": (KD, {"__call__"}),
    "STC": (lambda teacher: STC(teacher, alpha=0.3, cut=2), {"until", "resume"}),
    "AT": (AttentionTransfer, {"stages", "head"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_run_equals_an_eager_one(tiny, elsewhere, compiled, monkeypatch, name):
    make, called = METHODS[name]
    teacher = tiny(model="resnet14-x0.25")
    run = tiny(method=make(teacher), seed=1)
    train([teacher])
    with monkeypatch.context() as patch:
        patch.setenv("KDLIB_COMPILE", "never")
        (eager,) = elsewhere(run)
    compiled.methods.clear()
    before = compiled.graphs
    ours = train([run])[0]
    assert called <= set(compiled.methods)
    assert compiled.graphs - before >= len(compiled.methods)
    assert ours.summary["environment"]["compiled"]
    assert not eager.summary["environment"]["compiled"]
    terms = [c for c in eager.log if c.startswith(("train", "test"))]
    assert ours.log[terms].to_numpy() == pytest.approx(eager.log[terms].to_numpy(), rel=1e-3)


OWN_MODULES = {  # methods with a module that computes in float32; what of it is compiled
    "KR": (lambda teacher: KR(teacher, prior=teacher.recipe, gamma=0.3), {"layers", "__call__"}, 4),
    "search": (lambda teacher: GateSearch(teacher, budget=0.2), {"with_weights"}, 2),
}


@pytest.mark.parametrize("name", OWN_MODULES)
def test_compiled_gates_and_aggregation_equal_eager_ones(tiny, compiled, monkeypatch, name):
    """In losses and gradients. They are compiled once; an evaluation compiles nothing more."""
    make, called, graphs = OWN_MODULES[name]
    teacher = tiny(epochs=1)
    run = tiny(epochs=1, method=make(teacher), start=teacher if name == "search" else None)
    results = []
    for wish in ("never", "always"):
        monkeypatch.setenv("KDLIB_COMPILE", wish)
        train([teacher])
        trainer = new_trainer(run)
        trainer.begin_epoch()
        for _ in range(trainer.steps):
            trainer.advance()
        gradients = {key: p.grad.clone() for key, p in trainer.state.modules.named_parameters()}
        results.append((gradients, trainer.end_epoch(), trainer.state.tensors().keys()))
    assert set(compiled.methods) == called
    assert compiled.graphs == graphs
    (eager, row, names), (ours, own_row, own_names) = results
    for key, gradient in eager.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-6, msg=key)
    terms = [key for key in row if key.startswith(("train", "test"))]
    assert [own_row[key] for key in terms] == pytest.approx([row[key] for key in terms], rel=1e-4)
    assert own_names == names


def test_evaluation_is_not_compiled(tiny, compiled):
    train([tiny()])
    assert (compiled.methods, compiled.graphs) == (["__call__"], 1)


@pytest.mark.parametrize("flag", [False, True])
def test_outputs_are_in_float32(compiled, flag):
    network = build_model("resnet8-x0.25", 10, 1, seed=0).double().eval()
    called = AutocastNetwork(network, CPU, torch.float32, flag)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    outputs = [called(x), called.until(1, x), *called.features(x), *called.layers(x)[1]]
    outputs += [called.head(network.stages(x)[-1]), called.with_weights({}, x)]
    assert {output.dtype for output in outputs} == {torch.float32}
    torch.testing.assert_close(outputs[0].double(), network(x), rtol=1e-5, atol=1e-6)
    assert bool(compiled.graphs) == flag
