"""The main figures of a GPU in a few minutes, the most important first.

Every figure is in the CSV as soon as it is measured, so a GPU that is lent for minutes gives what
the time allows: ``timeout 200 python -m benchmarks.gpu --minutes 3 --device cuda``. After
``--minutes`` no further turn begins. A turn takes seconds, but its students have to be made before
it. Every round measures both pairs, so that a short time gives one value of every figure.

- machine: the time of a node of a CUDA graph ("small operation"), the speed of a copy, and of
  products of matrices in half precision and in float32. See ``ceilings``.
- two pairs of networks: the contenders of ``training`` with few images and short turns. "teacher
  alone" is the speed of a sweep, which computes labels for the cache.
- shares: a speed over the bound that the machine sets, counted by ``bounds`` as in ``roofline``.
  Kernels of students trained in parallel overlap, so the bound of K3 is that without launches.

``--device cpu`` runs the same code with small networks, to try it without a GPU.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator

import torch

from benchmarks import arguments, row, selected, time_is_over
from benchmarks.batches import CLASSES
from benchmarks.bounds import forward, training
from benchmarks.ceilings import MACHINE, Ceilings, measure, multiplying, rows_of
from benchmarks.tables import report
from benchmarks.training import Case, by_name, run_case
from kdlib import build_model
from kdlib.engine.logit_cache import CHUNK, folded
from kdlib.engine.precision import training_dtype

PARALLEL = (8, 16, 32)
# Four chunks of a teacher pass. The usual loops stay within one epoch, whose workers start once.
SHORT = {"images": 8192, "parallel": PARALLEL, "epochs": 2, "loops": ("P0", "P1")}
TINY = SHORT | {"images": 64, "epochs": 1, "steps": 1}
CASES = {
    "cuda": [
        Case(
            *("mobilenetv2-t6-w0.5", "resnet50", 64),
            {("K2", "P0"): 6, ("K3(16)", "K2"): 3, ("K3(16)", "P0"): 25},
            **SHORT,
            **{"steps": 96, "warm_up": 24, "teacher_target": 50_000 / 0.75},
        ),
        Case(
            *("resnet20", "resnet110", 128, {("K2", "P0"): 8, ("K3(16)", "K2"): 1.6}),
            **SHORT,
            **{"steps": 40, "warm_up": 16},
        ),
    ],
    "cpu": [
        Case("mobilenetv2-x0.15", "resnet20-x0.5", 32, {}, **TINY),
        Case("resnet8-x0.25", "resnet8", 64, {}, **TINY),
    ],
}


def limits(ceilings: Ceilings, device: torch.device, k: int) -> Iterator[dict]:
    yield from rows_of(ceilings, device, k)
    half = training_dtype(device) if device.type == "cuda" else torch.bfloat16
    for dtype in (half, torch.float32):
        precision = str(dtype).removeprefix("torch.")
        speed = multiplying(device, dtype) / 1e12
        yield row(MACHINE, f"product of matrices in {precision}, TFLOP/s", speed, k)


def with_shares(
    name: str, case: Case, ceilings: Ceilings, options: argparse.Namespace
) -> Iterator[dict]:
    """The bounds of a pair, its rows as they are measured, and their shares of the bounds."""
    device, dtype = options.device, training_dtype(options.device)
    student, teacher = (build_model(n, CLASSES, seed=0) for n in (case.student, case.teacher))
    step, chunk = (
        training(student, case.batch, dtype, options.compile),
        min(CHUNK[device.type], case.images),
    )
    sweep = forward(folded(teacher.eval()), chunk, dtype)
    (seconds, cause), (sweep_seconds, sweep_cause) = step.bound(ceilings), sweep.bound(ceilings)
    overlapping, _ = step._replace(kernels=0).bound(ceilings)
    bounds = {"K2": case.batch / seconds, "teacher alone": chunk / sweep_seconds}
    bounds |= {f"K3({n})": case.batch / overlapping for n in case.parallel}
    yield row(name, f"bound of K2 by {cause}, images/s", bounds["K2"])
    yield row(name, f"bound of a teacher by {sweep_cause}, images/s", bounds["teacher alone"])
    for line in run_case(name, case, options):
        yield line
        which = line["quantity"].removesuffix(", images/s")
        if which in bounds:
            share = line["value"] / bounds[which]
            yield row(name, f"{which}, share of the bound", share)


def measured_rows(options: argparse.Namespace, failed: list[str]) -> Iterator[dict]:
    """All rounds. A round has one turn of every contender of both pairs, each made anew."""
    once = argparse.Namespace(**vars(options) | {"rounds": 1})
    for k in range(options.rounds):
        if time_is_over(options, f"round {k + 1}"):
            return
        ceilings = measure(options.device)
        yield from limits(ceilings, options.device, k)
        for name, case in selected(by_name(CASES[options.device.type]), options):
            try:
                for line in with_shares(name, case, ceilings, once):
                    yield line | {"round": k}
            except Exception:  # the time with the GPU is short: measure the next pair
                traceback.print_exc()
                failed.append(name)


def main() -> None:
    options, failed = arguments(__doc__, rounds=2), []
    report("gpu", measured_rows(options, failed), options)
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
