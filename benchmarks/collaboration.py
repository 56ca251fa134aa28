"""STC: what the gradient's way through the teacher costs, in images/s of the student.

- naive: a kdlib lane whose teacher is as a network is by default, its weights with gradients that
  nobody steps; the teacher labels the epoch within the time;
- frozen: the same lane, the teacher frozen: the gradient goes through its back to the student;
- warm: the frozen one with every label of the epoch in the bank, the state that a sweep over seeds
  or settings reaches: of the teacher only its back runs.

Same networks, batches, images, threads and process. The difference of naive and frozen is the
arithmetic of the teacher's weight gradients. "Memory" is what one step keeps for its backward pass
and as gradients, weights left out, counted in bytes of tensors. PyTorch keeps the input of a
convolution also where its weight needs no gradient, so that freezing saves little of it.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import arguments, compare, report, row
from benchmarks.training import RECIPE, lanes_turn, noise_folder, save_untrained
from kdlib import STC, Run, load_data
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.trainer import Trainer

# Student and teacher of STC's Tables 1 and 2, both cut after the second of three stages.
PAIRS = [("resnet20", "resnet56"), ("wrn-16-1", "wrn-16-2"), ("resnet20", "resnet110")]
IMAGES = {"cpu": 512, "cuda": 12_800}


def step_bytes(lane: Trainer) -> int:
    """What a step saves for its backward pass besides weights, and all gradients after it."""
    networks = [*filter(None, [lane.teachers.live]), lane.state.networks]
    weights = {t.data_ptr() for net in networks for t in net.state_dict().values()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    lane.cursor.zero_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lane.step()
    gradients = [p.grad for net in networks for p in net.parameters() if p.grad is not None]
    return sum(saved.values()) + sum(g.numel() * g.itemsize for g in gradients)


def run_pair(student: str, teacher: str, options: argparse.Namespace) -> list[dict]:
    name = f"{student} ← {teacher}"
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", IMAGES[options.device.type])
        images, test = (load_data(data, split, options.device) for split in ("train", "test"))
        taught = Run(data, teacher, RECIPE)
        save_untrained(taught, images)
        run = Run(data, student, RECIPE, STC(taught))
        naive, frozen = (Trainer(run, images, test, CachePool()) for _ in range(2))
        naive.teachers.live.requires_grad_(True)
        contenders = {
            "naive": lambda: lanes_turn([naive], 1, cold=True),
            "frozen": lambda: lanes_turn([frozen], 1, cold=True),
            "warm": lambda: lanes_turn([frozen], 1, cold=False),
        }
        ratios = {("frozen", "naive"): None, ("warm", "naive"): None}
        rows = list(compare(name, contenders, ratios, options))
        for which, lane in (("naive", naive), ("frozen", frozen)):
            rows.append(row(name, f"memory of a step, {which}, MB", step_bytes(lane) / 2**20))
        return rows


def main() -> None:
    options = arguments(__doc__)
    report("collaboration", [r for pair in PAIRS for r in run_pair(*pair, options)], options)


if __name__ == "__main__":
    main()
