"""Trainers on a GPU, and the runs that several test files train there."""

from dataclasses import replace

import torch

from kdlib import KD, Recipe, Run
from kdlib.methods import (
    FSP,
    KDGAN,
    KR,
    NST,
    STC,
    AggregateKR,
    AttentionTransfer,
    FactorTransfer,
    Hint,
    MutualLearning,
    Penalised,
    RocketLaunching,
    paraphrase,
)

# 1,438 images in batches of 56 are 51 steps in two epochs; the rate falls between them.
RUN = Run("digits", "resnet8-x0.5", Recipe(2, 56, 0.05, milestones=(1,)))
WIDER = replace(RUN, model="resnet8")  # twice the student's channels
WITH_KD = {"ce_weight": 0.1, "kd_weight": 0.9}
SLOWER = Recipe(2, 56, 0.02, milestones=(1,), decay=0.5, momentum=0.8)
SAME = replace(RUN, model="resnet14-x0.5")  # the student's channels
PARAPHRASER = paraphrase(WIDER, Recipe(1, 56, 0.05))
GAN = {"discriminator": SLOWER, "copy": SLOWER}
WITH_PRIOR = {
    "KR": KR(WIDER, prior=SLOWER),
    "KR fixed, gamma": KR(WIDER, prior=SLOWER, threshold="fixed", gamma=0.1),
    "KR + KD": KR(WIDER, prior=SLOWER, posterior=KD(WIDER), threshold="none"),
    "KR + NST": KR(WIDER, prior=SLOWER, posterior=NST(WIDER)),
    "KR + KDGAN": KR(WIDER, prior=SLOWER, posterior=KDGAN(WIDER, **GAN)),
}
METHODS = {
    "CE": RUN.method,
    **WITH_PRIOR,
    "KR, second reading": AggregateKR(WIDER, prior=SLOWER),
    "Rocket": RocketLaunching("resnet14-x0.5", SLOWER, kd_weight=0.7),
    "DML": MutualLearning("resnet14-x0.5", SLOWER),
    "KDGAN": KDGAN(WIDER, **GAN),
    "STC": STC(WIDER, **WITH_KD),
    "STC truth": STC(WIDER, cut=3, target="truth"),
    "AT": AttentionTransfer(WIDER, **WITH_KD),
    "FT": FactorTransfer(WIDER, paraphraser=PARAPHRASER),
    "FSP": FSP(SAME, **WITH_KD),
    "FSP alone": FSP(SAME, ce_weight=0.0),
    "NST": NST(WIDER),
    "Hint": Hint(WIDER),
    "Hint alone": Hint(WIDER, stage=2, ce_weight=0.0),
    "sparse": Penalised(penalty="sparse", bins=5, every=10),
    "l1": Penalised(penalty="l1"),
    "sparse + KD": Penalised(penalty="sparse", base=KD(WIDER), bins=5, every=10),
}


def advance(trainer, steps):
    for _ in range(steps):
        trainer.advance()
    torch.cuda.synchronize()


def finish(trainer):
    while True:
        while trainer.taken < trainer.steps:  # fewer than planned where the method ends the epoch
            trainer.advance_block()
        trainer.end_epoch()
        if trainer.finished:
            return trainer
        trainer.begin_epoch()


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


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
