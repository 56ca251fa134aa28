"""Speed of STC: the cost of the gradient through the teacher, in images/s of the student.

- naive: a kdlib Trainer whose teacher has gradients for its weights, PyTorch's default, which no
  optimizer uses. The time includes the teacher's logits of one epoch.
- frozen: the same Trainer with frozen teacher weights. The gradient passes through the teacher's
  back part to the student.
- cached: frozen, with all logits of the epoch in the cache. Only the back part of the teacher runs.
  Later seeds or settings with the same teacher come close to this case.

All contenders have the same networks, batches, images, threads and process. Naive and frozen differ
by the arithmetic of the teacher's weight gradients. "memory" is the bytes of all tensors that one
step keeps for its backward pass, and of the gradients; weights do not count. PyTorch keeps the
input of a convolution even if its weight needs no gradient, so freezing saves little memory.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import arguments, compare, row, selected
from benchmarks.tables import report
from benchmarks.training import RECIPE, train_turn, untrained
from kdlib import STC, Run
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.trainer import Trainer

# Student and teacher of STC's Tables 1 and 2, both cut after the second of three stages.
PAIRS = [("resnet20", "resnet56"), ("wrn-16-1", "wrn-16-2"), ("resnet20", "resnet110")]
IMAGES = {"cpu": 512, "cuda": 12_800}


def step_bytes(trainer: Trainer) -> int:
    """Bytes that a step keeps for its backward pass, without weights, and of all gradients."""
    networks = [trainer.state.modules, *([trainer.teacher.network] if trainer.teacher else [])]
    weights = {t.data_ptr() for net in networks for t in net.state_dict().values()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.data.cursor.zero_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.step()
    gradients = [p.grad for net in networks for p in net.parameters() if p.grad is not None]
    return sum(saved.values()) + sum(g.numel() * g.itemsize for g in gradients)


def run_pair(name: str, pair: tuple[str, str], options: argparse.Namespace) -> Iterator[dict]:
    (student, teacher), count = pair, IMAGES[options.device.type]
    with untrained(teacher, count, options.device) as (teacher_run, images, test):
        run = Run(teacher_run.data, student, RECIPE, STC(teacher_run))
        pools = {which: CachePool() for which in ("naive", "frozen")}
        trainers = {which: Trainer(run, images, test, pool) for which, pool in pools.items()}
        trainers["naive"].teacher.network.requires_grad_(True)
        contenders = {
            which: partial(train_turn, [trainers[which]], empty=pool)
            for which, pool in pools.items()
        }
        contenders["cached"] = partial(train_turn, [trainers["frozen"]])
        ratios = {("frozen", "naive"): None, ("cached", "naive"): None}
        yield from compare(name, contenders, ratios, options)
        for which, trainer in trainers.items():
            yield row(name, f"memory of a step, {which}, MB", step_bytes(trainer) / 2**20)


def main() -> None:
    options = arguments(__doc__)
    cases = selected(
        {f"{student} ← {teacher}": (student, teacher) for student, teacher in PAIRS}, options
    )
    report("collaboration", (r for case in cases for r in run_pair(*case, options)), options)


if __name__ == "__main__":
    main()
