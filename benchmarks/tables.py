"""Tables of results: a CSV that grows with every measured value, and the README files."""

import argparse
import ast
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks import BY_CPU_TIME, wanted
from kdlib.engine.device import environment
from kdlib.engine.precision import training_dtype

HERE = Path(__file__).parent
MARKER = "<!-- results -->"
# Programs whose results are in benchmarks/README.md, in this order, and the devices that count.
MAIN = {
    "gpu": ("cuda",),
    "training": ("cpu", "cuda"),
    "parity": ("cpu", "cuda"),
    "parallel": ("cpu", "cuda"),
    "roofline": ("cpu", "cuda"),
    "seeds": ("cpu",),
}


def report(
    program: str,
    rows: Iterable[dict],
    options: argparse.Namespace,
    draw: Callable[[pd.DataFrame], Figure] | None = None,
) -> pd.DataFrame:
    """Write each row to the CSV when it is measured; then print the table and save the picture.

    The CSV is whole at any time, so that a program that is stopped leaves all it has measured. The
    first row replaces the results of the last call; with ``--case`` those of other cases stay.
    ``--write`` fills the README files. Returns the content of the CSV.
    """
    path = options.out / f"{program}-{options.device.type}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    before, found = _kept(path, options), []
    table = before
    for measured in rows:
        print(
            f"{measured['case']}: {measured['quantity']} = {short(measured['value'])}", flush=True
        )
        found.append(measured | {"machine": _machine(options)})
        new = pd.DataFrame(found).astype({"target": float})
        others = before[~before.case.isin(new.case)]
        table = pd.concat([others, new], ignore_index=True) if len(others) else new
        _replace(path, table)
    if not found:
        return table
    print(as_markdown(table))
    if draw:
        draw(table).savefig(path.with_suffix(".png"), dpi=150)
    if options.write:
        fill_readme(options.out)
    return table


def _kept(path: Path, options: argparse.Namespace) -> pd.DataFrame:
    """The results of the last call that stay: those of cases that ``--case`` does not name."""
    if not options.case or not path.exists():
        return pd.DataFrame(columns=["case"])
    table = pd.read_csv(path)
    return table[[not wanted(case, options) for case in table.case]]


def _machine(options: argparse.Namespace) -> str:
    about = environment(options.device, training_dtype(options.device))
    text = "{device}, threads: {threads}, torch {torch}, Python {python}".format(**about)
    return text + (", compiled" if options.compile else "")


def _replace(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV in one step: a reader sees the old file or the new one."""
    beside = path.with_suffix(".part")
    table.to_csv(beside, index=False)
    beside.replace(path)


def as_markdown(table: pd.DataFrame) -> str:
    """A Markdown table of cases and quantities: median, range over the rounds, target.

    The shorter axis is horizontal. Ratios come last; those by CPU time are only in the CSV.
    """
    table = table[~table.quantity.str.endswith(BY_CPU_TIME)]
    cells = {
        key: _cell(group.value, group.target.iloc[0])
        for key, group in table.groupby(["case", "quantity"], sort=False)
    }
    cases, quantities = (list(dict.fromkeys(table[name])) for name in ("case", "quantity"))
    quantities.sort(key=lambda quantity: " / " in quantity)
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


def short(value: float) -> str:
    """Three significant digits."""
    if abs(value) < 0.01 or not math.isfinite(value):
        return f"{value:.2g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def fill_readme(out: Path) -> None:
    """Write the results in ``out`` to its README.md, and the main ones to benchmarks/README.md.

    A main program without results on one of its devices is *not run* there.
    """
    about = "[benchmarks](../README.md) explains the programs and the quantities."
    everything, main = ["# All results", about], []
    expected = [(program, device) for program, devices in MAIN.items() for device in devices]
    found = [tuple(path.stem.rsplit("-", 1)) for path in sorted(out.glob("*.csv"))]
    for program, device in dict.fromkeys([*expected, *found]):
        if (program, device) not in found:
            main.append(_not_run(program, device))
            continue
        path = out / f"{program}-{device}.csv"
        table = pd.read_csv(path)
        head = _head(program, device, table)
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


def _head(program: str, device: str, table: pd.DataFrame) -> str:
    machines = "; ".join(dict.fromkeys(table.machine))
    threads = re.search(r"threads: (\d+)", machines)[1]
    setting = f"OMP_NUM_THREADS={threads} " if device == "cpu" else ""
    title = ast.get_docstring(ast.parse((HERE / f"{program}.py").read_text())).splitlines()[0]
    return (
        f"{_heading(program, device)}\n\n{title} Command: `{setting}{_command(program, device)}`. "
        f"Machine: {machines}."
    )


def _not_run(program: str, device: str) -> str:
    return (
        f"{_heading(program, device)}\n\n*Not run on a GPU yet.* "
        f"Command: `{_command(program, device)} --write`."
    )


def _heading(program: str, device: str) -> str:
    return f"### {program}" + (" on a GPU" if device == "cuda" and program != "gpu" else "")


def _command(program: str, device: str) -> str:
    short = " --minutes 3" if program == "gpu" else ""
    return f"python -m benchmarks.{program} --device {device}{short}"
