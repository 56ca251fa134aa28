"""Options, timing and tables that all benchmarks share.

The speed of a shared machine changes over time, so one measurement means little. All contenders of
a case take turns (A B C, A B C, …). A ratio compares two contenders of the same round. The report
has its median and its range.
"""

import argparse
import ast
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure

from kdlib.engine.device import environment, pick_device, training_dtype

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BY_CPU_TIME = ", by CPU time"
MARKER = "<!-- results -->"
# Programs whose results are in benchmarks/README.md, in this order.
MAIN = ("training", "parity", "parallel", "roofline", "seeds")


def arguments(doc: str, **own: dict) -> argparse.Namespace:
    """Parse the options of every program and those in ``own``; ``device`` is a torch device."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
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
    options.device = pick_device(options.device)
    return options


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
    contenders: dict[str, Callable[[], Turn]],
    ratios: dict[tuple[str, str], float | None],
    options: argparse.Namespace,
    speeds: Mapping[str, float | None] = MappingProxyType({}),
) -> Iterator[dict]:
    """Rows with images/s of each contender and their ratios, one per quantity and round.

    Args:
        contenders: by name, a function that runs one turn.
        ratios: (faster, slower) and the target, the least value that the project wants.
        speeds: contenders and the least images/s that the project wants.
    """
    for k in range(options.rounds):
        turns = {}
        for name, run in contenders.items():
            turns[name] = run()
            speed = turns[name].images / turns[name].wall
            yield row(case, f"{name}, images/s", speed, k, speeds.get(name))
        for (fast, slow), target in ratios.items():
            a, b = turns[fast], turns[slow]
            share = a.images / b.images
            yield row(case, f"{fast} / {slow}", share * b.wall / a.wall, k, target)
            if options.device.type == "cpu":
                yield row(case, f"{fast} / {slow}{BY_CPU_TIME}", share * b.cpu / a.cpu, k)


def row(case: str, quantity: str, value: float, k: int = 0, target: float | None = None) -> dict:
    return {"case": case, "quantity": quantity, "round": k, "value": value, "target": target}


def report(program: str, rows: list[dict], options: argparse.Namespace) -> None:
    """Print the table, write the CSV and, with ``--write``, the README files."""
    about = environment(options.device, training_dtype(options.device))
    table = pd.DataFrame(rows).astype({"target": float})
    table["machine"] = "{device}, threads: {threads}, torch {torch}, Python {python}".format(
        **about
    )
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / f"{program}-{options.device.type}.csv", index=False)
    print(as_markdown(table))
    if options.write:
        fill_readme(options.out)


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of cases and quantities: median, range over the rounds, target.

    The shorter axis is horizontal. Ratios by CPU time are only in the CSV.
    """
    table = table[~table.quantity.str.endswith(BY_CPU_TIME)]
    cells = {
        key: _cell(group.value, group.target.iloc[0])
        for key, group in table.groupby(["case", "quantity"], sort=False)
    }
    cases, quantities = (list(dict.fromkeys(table[name])) for name in ("case", "quantity"))
    rows, columns, key = quantities, cases, lambda row, column: (column, row)
    if len(cases) > len(quantities):
        rows, columns, key = cases, quantities, lambda row, column: (row, column)
    lines = [["", *columns], ["---", *["--:"] * len(columns)]]
    lines += [[row, *(cells.get(key(row, column), "") for column in columns)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: pd.Series, target: float) -> str:
    text = short(values.median())
    if len(values) > 1:
        text += f" ({short(values.min())} – {short(values.max())})"
    if pd.notna(target):
        verdict = "met" if values.median() >= target else "**missed**"
        text += f", target ≥ {short(target)}: {verdict}"
    return text


def save_picture(program: str, figure: Figure, options: argparse.Namespace) -> None:
    """Save the picture of a program beside its CSV."""
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / f"{program}-{options.device.type}.png", dpi=150)


def short(value: float) -> str:
    """Three significant digits."""
    if abs(value) < 0.01:
        return f"{value:.2g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def fill_readme(out: Path) -> None:
    """Write the results in ``out`` to its README.md, and the main ones to benchmarks/README.md."""
    about = "[benchmarks](../README.md) explains the programs and the quantities."
    everything, main = ["# All results", about], []
    for path in sorted(out.glob("*.csv"), key=_place):
        table = pd.read_csv(path)
        program, _, device = path.stem.partition("-")
        machine = table.machine.iloc[0]
        threads = re.search(r"threads: (\d+)", machine)[1]
        setting = f"OMP_NUM_THREADS={threads} " if device == "cpu" else ""
        command = f"`{setting}python -m benchmarks.{program} --device {device}`"
        title = ast.get_docstring(ast.parse((HERE / f"{program}.py").read_text())).splitlines()[0]
        head = f"### {program}\n\n{title} Command: {command}. Machine: {machine}."
        parts = [head, as_markdown(table)]
        if (picture := path.with_suffix(".png")).exists():
            parts.append(f"![{program}]({picture.name})")
        everything += parts
        if program in MAIN:
            where = os.path.relpath(out, HERE)
            # The picture shows the same as the table.
            brief = [head, parts[-1].replace("](", f"]({where}/")]
            main += brief if len(parts) > 2 else parts
    (out / "README.md").write_text("\n\n".join(everything) + "\n")
    readme = HERE / "README.md"
    before, _, after = readme.read_text().split(MARKER)
    readme.write_text("\n\n".join([before + MARKER, *main, MARKER + after]))


def _place(path: Path) -> tuple[int, str]:
    program = path.stem.partition("-")[0]
    return (MAIN.index(program) if program in MAIN else len(MAIN), path.name)
