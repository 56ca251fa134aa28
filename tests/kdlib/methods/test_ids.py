"""Run ids: each field of a method changes them, a default leaves them as they are."""

from dataclasses import MISSING, fields, replace

import pytest
from by_hand import SECOND_RECIPE, WITH_KD

from kdlib import Recipe, Run
from kdlib.methods import (
    FSP,
    KD,
    KDGAN,
    KR,
    NST,
    STC,
    AggregateKR,
    AttentionTransfer,
    FactorTransfer,
    FreshBack,
    GateSearch,
    Hint,
    MutualLearning,
    OneStage,
    Paraphrase,
    Penalised,
    RocketLaunching,
    paraphrase,
)

PARAPHRASING = Recipe(2, 24, lr=0.1)
OTHER_RECIPE = replace(SECOND_RECIPE, lr=0.1)
PEER = ("resnet14-x0.25", SECOND_RECIPE)
ON_LOGITS = {"at": 1, "ce_weight": 0.5, "kd_weight": 0.5, "temperature": 2.0}


def teacher_run(seed=9):
    return Run("digits", "resnet14-x0.25", Recipe(2, 24, 0.05), images=128, seed=seed)


TEACHER, OTHER = teacher_run(), teacher_run(seed=8)
PARAPHRASER = paraphrase(TEACHER, PARAPHRASING)
PAIR = {"peer": "resnet14-x0.5", "recipe": OTHER_RECIPE}
COLLABORATION = {**ON_LOGITS, "alpha": 0.5, "cut": 1, "target": "soft", "back": OTHER}
# For every method: its required arguments, and another value of every field.
METHODS = {
    KD: ({"teacher": TEACHER}, ON_LOGITS),
    Hint: ({"teacher": TEACHER}, {**ON_LOGITS, "hint_weight": 2.0, "stage": 1}),
    AttentionTransfer: ({"teacher": TEACHER}, {**ON_LOGITS, "attention_weight": 10.0}),
    FSP: ({"teacher": TEACHER}, {**ON_LOGITS, "fsp_weight": 2.0}),
    NST: ({"teacher": TEACHER}, {**ON_LOGITS, "nst_weight": 2.0}),
    STC: ({"teacher": TEACHER}, COLLABORATION),
    FreshBack: ({"teacher": TEACHER}, COLLABORATION),
    Paraphrase: ({"teacher": TEACHER}, {"at": 1, "rate": 0.25}),
    FactorTransfer: (
        {"teacher": TEACHER, "paraphraser": PARAPHRASER},
        {
            **ON_LOGITS,
            "at": None,  # the paraphraser is of the last epoch
            "factor_weight": 10.0,
            "paraphraser": paraphrase(TEACHER, replace(PARAPHRASING, lr=0.2)),
        },
    ),
    KDGAN: (
        {"teacher": TEACHER, "discriminator": SECOND_RECIPE, "copy": SECOND_RECIPE},
        {
            "at": 1,
            "discriminator": OTHER_RECIPE,
            "copy": replace(SECOND_RECIPE, milestones=()),
            "share": 0.4,
            "kd_weight": 0.5,
            "back_weight": 0.5,
            "temperature": 2.0,
            "relaxation": 0.5,
        },
    ),
    KR: (
        {"teacher": TEACHER, "prior": SECOND_RECIPE},
        {
            "at": 1,
            "prior": OTHER_RECIPE,
            "posterior": KD(TEACHER),
            "n": 4,
            "beta": 0.5,
            "gamma": 0.5,
            "gain": 1.0,
            "threshold": "fixed",
            "pull": 0.1,
        },
    ),
    AggregateKR: (
        {"teacher": TEACHER, "prior": SECOND_RECIPE},
        {
            "at": 1,
            "prior": OTHER_RECIPE,
            "posterior": KD(TEACHER),
            "n": 4,
            "beta": 0.5,
            "gamma": 0.5,
            "gain": 1.0,
            "threshold": "fixed",
            "pull": 0.1,
        },
    ),
    GateSearch: (
        {"teacher": TEACHER, "budget": 0.5},
        {
            "at": None,  # a search begins as the last weights of its teacher
            "budget": 0.4,
            "strength": 0.01,
            "weight": 2.0,
            "weighted": False,
            "target": "output",
            "temperature": 2.0,
            "held_at": 0.1,
            "held_by": "hinge",
            "rate": 0.02,
            "momentum": 0.5,
        },
    ),
    RocketLaunching: (dict(zip(PAIR, PEER, strict=True)), {"temperature": 4.0, "kd_weight": 0.7}),
    MutualLearning: (dict(zip(PAIR, PEER, strict=True)), {"kd_weight": 0.5}),
    Penalised: (
        {},
        {
            "base": KD(TEACHER),
            "penalty": "l1",
            "weight": 0.1,
            "gain": 3.0,
            "pull": 0.5,
            "bins": 10,
            "every": 10,
        },
    ),
    OneStage: (
        {"method": KD(TEACHER), "gap": 1},
        {"method": Hint(TEACHER), "gap": 2, "stride": 2},
    ),
}
for pair in (RocketLaunching, MutualLearning):
    METHODS[pair] = (METHODS[pair][0], METHODS[pair][1] | PAIR)
every_kind = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)


def run_of(kind, **settings):
    method = kind(**METHODS[kind][0] | settings)
    model = TEACHER.model if kind is GateSearch else "resnet8-x0.25"
    start = method.teacher if kind is GateSearch else None
    return replace(TEACHER, model=model, method=method, start=start, seed=0)


def changed_teacher(kind):
    if kind is FactorTransfer:
        return {"teacher": OTHER, "paraphraser": paraphrase(OTHER, PARAPHRASING)}
    return {"teacher": OTHER}


@every_kind
def test_each_field_changes_the_id(kind):
    required, changes = METHODS[kind]
    names = {f.name for f in fields(kind)} - {"teacher"}
    assert changes.keys() == names, "a field has no other value in METHODS"
    runs = [run_of(kind)]
    runs += [run_of(kind, **{n: v}) for n, v in changes.items() if v is not None]
    runs += [run_of(kind, **changed_teacher(kind))] if "teacher" in required else []
    assert len({run.id for run in runs}) == len(runs)


@every_kind
def test_a_default_is_no_part_of_the_description(kind):
    plain = run_of(kind)
    defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    expected = {
        name: getattr(value, "description", None) for name, value in METHODS[kind][0].items()
    }
    found = plain.description["method"]
    assert found.keys() == {"kind", *expected}
    assert found["kind"] == kind.__name__
    assert all(found[name] == value for name, value in expected.items() if value)
    assert run_of(kind, **defaults).id == plain.id


def test_the_last_epoch_of_the_teacher_by_number_is_the_default():
    for kind in (KD, Hint, STC, KDGAN, KR):
        assert run_of(kind, at=2).id == run_of(kind).id


def test_other_values_of_one_field_change_the_id():
    changes = {
        KR: [{"threshold": t} for t in ("learned", "fixed", "none")],
        Penalised: [{"penalty": p} for p in ("none", "l1", "l2", "sparse")],
        Hint: [{"stage": stage} for stage in (None, 1, 2, 3)],
        STC: [{"target": t} for t in ("output", "soft", "label", "truth")],
        GateSearch: [{"target": t} for t in ("soft", "output", "truth")],
    }
    runs = [run_of(kind, **change) for kind, listed in changes.items() for change in listed]
    assert len({run.id for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (KD, "b0945417af6d"),
        (lambda teacher: KD(teacher, at=1, **WITH_KD), "d38804002b1f"),
        (Hint, "32a47f6bf353"),
        (lambda teacher: Hint(teacher, at=1, ce_weight=0.5, hint_weight=3.0), "0327086654cb"),
        (lambda teacher: OneStage(KD(teacher), gap=1), "2faf3e79b4f4"),
        (lambda teacher: OneStage(Hint(teacher, hint_weight=2.0), gap=1), "7ab06d4f4f20"),
    ],
)
def test_ids_stay_as_they_are(make, expected):
    recipe = Recipe(epochs=2, batch=32, lr=0.1)
    teacher = Run("digits", "resnet14", recipe)
    assert Run("digits", "resnet8", recipe, make(teacher)).id == expected
