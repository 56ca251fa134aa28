"""Speed of kdlib beside the field's usual code; what all programs here share.

A shared machine's speeds drift, so a single figure means little. All contenders of a case take
turns (A B C, A B C, …), a ratio is taken within a round, and its median and range are reported.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch

from kdlib.engine.device import environment, pick_device, training_dtype

HERE = Path(__file__).parent
MARKER = "<!-- results -->"


def arguments(doc: str) -> argparse.Namespace:
    """The options that every program takes; ``device`` comes back as a torch device."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for the CSVs")
    parser.add_argument("--write", action="store_true", help="put the CSVs' tables into README.md")
    options = parser.parse_args()
    options.device = pick_device(options.device)
    return options


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Time that ``work`` takes, the device's part included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    case: str,
    contenders: dict[str, Callable[[], float]],
    ratios: dict[tuple[str, str], float | None],
    rounds: int,
) -> Iterator[dict]:
    """One row per quantity and round: images/s of the contenders in turn, and their ratios.

    Args:
        contenders: each runs once and returns its images/s.
        ratios: (numerator, denominator) and the least value that the project aims at.
    """
    for turn in range(rounds):
        speed = {}
        for name, run in contenders.items():
            speed[name] = run()
            yield row(case, f"{name}, images/s", speed[name], turn)
        for (fast, slow), target in ratios.items():
            yield row(case, f"{fast} / {slow}", speed[fast] / speed[slow], turn, target)


def row(case: str, quantity: str, value: float, turn: int = 0, target: float | None = None) -> dict:
    return {"case": case, "quantity": quantity, "round": turn, "value": value, "target": target}


def report(program: str, rows: list[dict], options: argparse.Namespace) -> None:
    """Print the table, write the CSV and, where asked, the README's results."""
    about = environment(options.device, training_dtype(options.device))
    table = pd.DataFrame(rows)
    table["machine"] = "{device}, {threads} threads, torch {torch}, Python {python}".format(**about)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / f"{program}-{options.device.type}.csv", index=False)
    print(as_markdown(table))
    if options.write:
        fill_readme(options.out)


def as_markdown(table: pd.DataFrame) -> str:
    """Median and range over the rounds, a line per quantity."""
    lines = ["| case | quantity | median | range | target |", "|---|---|--:|--:|--:|"]
    for (case, quantity), group in table.groupby(["case", "quantity"], sort=False):
        value, target = group.value, group.target.iloc[0]
        spread = f"{short(value.min())} – {short(value.max())}" if len(group) > 1 else ""
        aim = "" if pd.isna(target) else f"≥ {target:g}"
        aim += ", missed" if value.median() < target else ""
        lines.append(f"| {case} | {quantity} | {short(value.median())} | {spread} | {aim} |")
    return "\n".join(lines)


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.2g}" if value < 0.01 else f"{float(f'{value:.3g}'):,g}"


def fill_readme(out: Path) -> None:
    """Replace what stands between the README's markers by the tables of all CSVs in ``out``."""
    sections = []
    for path in sorted(out.glob("*.csv")):
        table = pd.read_csv(path)
        program, _, device = path.stem.partition("-")
        head = f"`python -m benchmarks.{program} --device {device}` on: {table.machine.iloc[0]}"
        sections.append(f"{head}\n\n{as_markdown(table)}")
    readme = HERE / "README.md"
    before, _, after = readme.read_text().split(MARKER)
    text = "\n\n".join([f"{before}{MARKER}", *sections, f"{MARKER}{after}"])
    readme.write_text(text)
