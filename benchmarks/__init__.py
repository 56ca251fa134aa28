"""Options, cases and timing that all benchmarks share; ``tables`` writes the results.

The speed of a shared machine changes over time, so one measurement means little. All contenders of
a case take turns (A B C, A B C, …). A ratio compares two contenders of the same round. The report
has its median and its range.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch

from kdlib.engine.device import pick_device, prepare

RESULTS = Path(__file__).parent / "results"
BY_CPU_TIME = ", by CPU time"

T = TypeVar("T")


def arguments(doc: str, rounds: int = 3, **own: dict) -> argparse.Namespace:
    """Parse the options of every program and those in ``own``, and prepare the device.

    ``device`` becomes a torch device, ``case`` a tuple of texts. ``until`` is the end of
    ``--minutes``, on the clock of ``time.perf_counter``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="TEXT[,TEXT]",
        help="only cases whose name contains a text; the results of other cases stay",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="after them, no turn or case begins"
    )
    parser.add_argument(
        "--compile", action="store_true", help="on a GPU, compile networks, which takes minutes"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder of CSVs and pictures; old files are replaced",
    )
    parser.add_argument("--write", action="store_true", help="put the tables into the README files")
    for name, settings in own.items():
        parser.add_argument(f"--{name}", **settings)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give 1 or more.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use.")
    options.case = tuple(text for several in options.case for text in several.split(","))
    options.until = time.perf_counter() + 60 * options.minutes
    options.device = pick_device(options.device)
    options.compile &= options.device.type == "cuda"
    os.environ["KDLIB_COMPILE"] = "always" if options.compile else "never"
    prepare(options.device)
    return options


def wanted(case: str, options: argparse.Namespace) -> bool:
    """Whether ``--case`` asks for this case."""
    return not options.case or any(text in case for text in options.case)


def time_is_over(options: argparse.Namespace, left_out: str) -> bool:
    """Whether ``--minutes`` are over; if so, print what is left out."""
    over = time.perf_counter() >= options.until
    if over:
        print(f"--minutes {options.minutes:g}: time is over. Left out: {left_out}", flush=True)
    return over


def selected(cases: Mapping[str, T], options: argparse.Namespace) -> Iterator[tuple[str, T]]:
    """The cases of ``--case`` by name, as long as ``--minutes`` are not over.

    Raises SystemExit where ``--case`` names none of them.
    """
    chosen = {name: case for name, case in cases.items() if wanted(name, options)}
    if not chosen:
        known = "; ".join(cases)
        raise SystemExit(f"No case contains {' or '.join(options.case)}. The cases are: {known}")
    for name, case in chosen.items():
        if not time_is_over(options, name):
            yield name, case


class Turn(NamedTuple):
    """One turn of a contender: images, wall-clock seconds, CPU seconds of this process."""

    images: int
    wall: float
    cpu: float


def timed(work: Callable[[], None], images: int, device: torch.device) -> Turn:
    """Time ``work``, which processes ``images`` images, until the device has finished."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return Turn(images, time.perf_counter() - wall, time.process_time() - cpu)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    case: str,
    contenders: Mapping[str, Callable[[], Turn]],
    ratios: Mapping[tuple[str, str], float | None],
    options: argparse.Namespace,
    speeds: Mapping[str, float | None] = MappingProxyType({}),
) -> Iterator[dict]:
    """Rows with images/s of each contender and their ratios, as they are measured.

    Args:
        contenders: by name, a function that runs one turn.
        ratios: (faster, slower) and the target, the least value that the project wants.
        speeds: contenders and the least images/s that the project wants.
    """
    for k in range(options.rounds):
        turns: dict[str, Turn] = {}
        for name, run in contenders.items():
            if time_is_over(options, f"{case}: round {k + 1} from {name} on"):
                return
            turns[name] = run()
            speed = turns[name].images / turns[name].wall
            yield row(case, f"{name}, images/s", speed, k, speeds.get(name))
            for (fast, slow), target in ratios.items():
                if name in (fast, slow) and {fast, slow} <= turns.keys():
                    a, b = turns[fast], turns[slow]
                    share = a.images / b.images
                    yield row(case, f"{fast} / {slow}", share * b.wall / a.wall, k, target)
                    if options.device.type == "cpu":
                        yield row(case, f"{fast} / {slow}{BY_CPU_TIME}", share * b.cpu / a.cpu, k)


def row(case: str, quantity: str, value: float, k: int = 0, target: float | None = None) -> dict:
    """One measured value, in round ``k``, and the least value that the project wants."""
    return {"case": case, "quantity": quantity, "round": k, "value": value, "target": target}
