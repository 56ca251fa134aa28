"""The student search: what gates cost, in images/s of the gated network.

- plain: a kdlib lane that distils the same network without gates, from the same labels;
- weights: the search as kdlib has it, gates multiplied into the weights that read the channels;
- inputs: the same search with gates multiplied into the channels themselves, the usual way: a copy
  of every gated layer's input forward, and another kept for the backward pass.

Same network, batches, images, threads and process; labels are in the bank. "Memory" is what one
step keeps for its backward pass and as gradients, weights left out, counted in bytes of tensors.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import arguments, compare, report, row
from benchmarks.collaboration import step_bytes
from benchmarks.training import RECIPE, lanes_turn, noise_folder, save_untrained
from kdlib import KD, GateSearch, Run, load_data
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.trainer import Trainer

NETWORKS = ["densenet-bc-40-12", "resnet20"]
IMAGES = {"cpu": 512, "cuda": 12_800}


@dataclass(frozen=True, kw_only=True)
class OnInputs(GateSearch):
    """Gates on activations, by hooks."""

    def gated(self, student, gates, x):
        handles = []
        values = gates.values.split(gates.channels.sizes)
        for reader, gate in zip(gates.channels.gated, values, strict=True):
            layer, factor = student.network.get_submodule(reader.name), gate.view(1, -1, 1, 1)
            hook = lambda _, inputs, factor=factor: (inputs[0] * factor,)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
        logits = student(x)
        for handle in handles:
            handle.remove()
        return logits


def run_network(name: str, options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as root:
        os.environ["KDLIB_HOME"] = f"{root}/runs"
        data = noise_folder(Path(root) / "noise", IMAGES[options.device.type])
        images, test = (load_data(data, split, options.device) for split in ("train", "test"))
        teacher = Run(data, name, RECIPE)
        save_untrained(teacher, images)
        settings = {"budget": 0.01, "strength": 1e-6}  # nothing closes while it is timed
        methods = {
            "plain": KD(teacher),
            "weights": GateSearch(teacher, **settings),
            "inputs": OnInputs(teacher, **settings),
        }
        lanes = {
            which: Trainer(Run(data, name, RECIPE, m, start=teacher), images, test, CachePool())
            for which, m in methods.items()
        }
        contenders = {
            which: partial(lanes_turn, [lane], 1, cold=False) for which, lane in lanes.items()
        }
        ratios = {("weights", "plain"): None, ("weights", "inputs"): None}
        rows = list(compare(name, contenders, ratios, options))
        for which, lane in lanes.items():
            rows.append(row(name, f"memory of a step, {which}, MB", step_bytes(lane) / 2**20))
        return rows


def main() -> None:
    options = arguments(__doc__)
    report("gates", [r for name in NETWORKS for r in run_network(name, options)], options)


if __name__ == "__main__":
    main()
