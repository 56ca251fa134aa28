"""A step fits into a graph: the host waits for no value, and no random number is drawn."""

import pytest
import torch
from helpers import new_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from kdlib import KD, train
from kdlib.methods import (
    FSP,
    KDGAN,
    KR,
    NST,
    STC,
    AggregateKR,
    AttentionTransfer,
    CrossEntropy,
    FactorTransfer,
    GateSearch,
    Hint,
    MutualLearning,
    OneStage,
    Penalised,
    RocketLaunching,
    paraphrase,
)

# Operations that need a value or a size from the device before the host can continue.
WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero"),
    *("repeat_interleave", "unique_consecutive", "_unique2"),
}
# Methods of a tensor that need its value.
READING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Noting(TorchDispatchMode):
    """Notes the names of all operations; an index by a mask counts as ``nonzero``."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for i in (arguments[1] if isinstance(arguments[1], list | tuple) else [])
        )
        self.names.add("nonzero" if masks else name)
        return function(*arguments, **(options or {}))


def gan(recipe):
    return {"discriminator": recipe, "copy": recipe}


SAME, WIDER = "resnet14-x0.25", "resnet8-x0.5"
METHODS = {
    "CE": (None, lambda t: CrossEntropy()),
    "KD": (WIDER, KD),
    "OneStage": (WIDER, lambda t: OneStage(KD(t), gap=1)),
    "Hint": (WIDER, lambda t: Hint(t, stage=2)),
    "AT": (WIDER, AttentionTransfer),
    "FT": (WIDER, lambda t: FactorTransfer(t, paraphraser=paraphrase(t, t.recipe))),
    "FSP": (SAME, FSP),
    "NST": (WIDER, NST),
    "STC": (WIDER, lambda t: STC(t, alpha=0.3, cut=2)),
    "KR": (WIDER, lambda t: KR(t, prior=t.recipe)),
    "KR + KDGAN": (WIDER, lambda t: KR(t, prior=t.recipe, posterior=KDGAN(t, **gan(t.recipe)))),
    "KR, second reading": (WIDER, lambda t: AggregateKR(t, prior=t.recipe)),
    "DML": (WIDER, lambda t: MutualLearning(t.model, t.recipe)),
    "Rocket": (WIDER, lambda t: RocketLaunching(t.model, t.recipe)),
    "KDGAN": (WIDER, lambda t: KDGAN(t, **gan(t.recipe))),
    "sparse": (None, lambda t: Penalised(penalty="sparse", bins=5, every=2)),
    "sparse + KD": (WIDER, lambda t: Penalised(penalty="sparse", base=KD(t), bins=5, every=2)),
    "search": ("resnet8-x0.25", lambda t: GateSearch(t, budget=0.5, strength=0.03)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_reads_no_value_and_draws_no_random_number(tiny, monkeypatch, name):
    teacher, make = METHODS[name]
    teacher = tiny(model=teacher or WIDER, keep=(1, 2))
    run = tiny(method=make(teacher), seed=1, start=teacher if name == "search" else None)
    train([parent for parent, _ in run.parents])
    trainer = new_trainer(run)
    trainer.begin_epoch()
    trainer.advance()  # the first step makes meters and momentum
    before = torch.random.get_rng_state()
    read = []
    for method in READING:
        monkeypatch.setattr(torch.Tensor, method, lambda *_, method=method: read.append(method))
    with Noting() as noting:
        trainer.step()
        trainer.step()
    monkeypatch.undo()
    assert not read
    assert "convolution" in noting.names
    assert not noting.names & WAITING
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x[x > 0], "nonzero"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: torch.masked_select(x, x > 0), "masked_select"),
    ],
)
def test_waiting_is_noticed(wait, name):
    with Noting() as noting:
        wait(torch.ones(3))
    assert name in noting.names & WAITING
