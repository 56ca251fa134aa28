"""Speed of the student search: the cost of gates, in images/s of the gated network.

- plain: a kdlib Trainer that distils the same network without gates, with the same teacher logits.
- weights: the search of kdlib, which multiplies a gate into the weights that read the channel.
- inputs: the same search with gates multiplied into the channels themselves, the usual way. It
  copies the input of every gated layer, and keeps the copy for the backward pass.

All contenders have the same network, batch, images, threads and process, with logits in the cache.
"memory" is the bytes of all tensors that one step keeps for its backward pass, and of the
gradients; weights do not count.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks import arguments, compare, row, selected
from benchmarks.collaboration import IMAGES, step_bytes
from benchmarks.tables import report
from benchmarks.training import RECIPE, train_turn, untrained
from kdlib import KD, GateSearch, Run
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.trainer import Trainer

NETWORKS = ["densenet-bc-40-12", "resnet20"]


@dataclass(frozen=True, kw_only=True)
class OnInputs(GateSearch):
    """A search whose gates multiply activations, by hooks."""

    def gated(self, student, gates, x):
        handles = []
        values = gates.values.split(gates.channels.sizes)
        for reader, gate in zip(gates.channels.gated, values, strict=True):
            layer, factor = student.get_submodule(reader.name), gate.view(1, -1, 1, 1)
            hook = lambda _, inputs, factor=factor: (inputs[0] * factor,)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
        logits = student(x)
        for handle in handles:
            handle.remove()
        return logits


def run_network(name: str, options: argparse.Namespace) -> Iterator[dict]:
    count = IMAGES[options.device.type]
    with untrained(name, count, options.device) as (teacher, images, test):
        settings = {"budget": 0.01, "strength": 1e-6}  # no gate closes while the time runs
        methods = {
            "plain": KD(teacher),
            "weights": GateSearch(teacher, **settings),
            "inputs": OnInputs(teacher, **settings),
        }
        runs = {
            which: Run(teacher.data, name, RECIPE, method, start=teacher)
            for which, method in methods.items()
        }
        trainers = {w: Trainer(run, images, test, CachePool()) for w, run in runs.items()}
        contenders = {w: partial(train_turn, [trainer]) for w, trainer in trainers.items()}
        ratios = {("weights", "plain"): None, ("weights", "inputs"): None}
        yield from compare(name, contenders, ratios, options)
        for which, trainer in trainers.items():
            yield row(name, f"memory of a step, {which}, MB", step_bytes(trainer) / 2**20)


def main() -> None:
    options = arguments(__doc__)
    cases = selected({name: name for name in NETWORKS}, options)
    report("gates", (r for name, _ in cases for r in run_network(name, options)), options)


if __name__ == "__main__":
    main()
