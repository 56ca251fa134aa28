"""How often the rule of verdicts errs, and how often it finds the paper's gaps, by simulation.

Each claim on printed numbers of trained cells is judged on simulated tables. A cell is its mean,
plus an effect that all cells of its row share in a seed (they share the teacher), plus noise.

- *By chance*: all means are equal. How often does the claim *hold here* or *reverse here*? Neither
  may exceed 5 %.
- *Found*: the means are the printed ones. How often does the claim hold here? *Stated* is the mean
  power that the verdicts state.

    python -m benchmarks.verdict_rates --write

writes the table into docs/verdicts.md.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from kdbook.claims import judge, without_margin
from kdbook.contrasts import estimate_gaps
from kdbook.estimates import contrasts_of
from kdbook.published import Cells, all_claims, paper_cells

PAGE = Path(__file__).parents[1] / "docs" / "verdicts.md"
MARKS = ("<!-- verdict rates -->", "<!-- end of verdict rates -->")
KINDS = ("gap", "best", "ordering", "family")
FOR, AGAINST = "holds here", "reverses here"


def accuracy_exhibits() -> list[str]:
    """The exhibits whose claims on trained numbers can all be simulated from printed cells."""
    return list(dict.fromkeys(claim["exhibit"] for claim in testable()))


def testable() -> list[dict]:
    """Claims on gaps between printed percentages that the paper's own numbers support.

    Below full scale, one of two claims on the same gap has no verdict.
    """
    return [
        claim
        for claim in all_claims()
        if claim["kind"] in KINDS
        and not claim.get("deterministic")
        and not without_margin(claim)
        and (gaps := estimate_gaps(contrasts_of(claim), paper_cells(claim["exhibit"])))
        and gaps.mean.min() > 0
    ]


def simulate(
    exhibit: str,
    seeds: int,
    spread: float,
    effect: bool,
    random: np.random.Generator,
    wide: float = 1.0,
) -> Cells:
    """Simulated cells of an exhibit.

    Args:
        spread: standard deviation of a cell within its block; that of the block is twice as large.
        effect: whether the means are the printed ones; else they are all equal.
        wide: the last cell of each row and of each column spreads this many times as much.
    """
    printed = paper_cells(exhibit)
    last = {axis: {cell[axis]: cell for cell in printed}.values() for axis in (0, 1)}
    times = {cell: wide if cell in last[0] or cell in last[1] else 1.0 for cell in printed}
    shared = {row: random.normal(0, 2 * spread, seeds) for row, _ in printed}
    return {
        cell: dict(
            enumerate(
                effect * mean[None]
                + shared[cell[0]]
                + random.normal(0, times[cell] * spread, seeds)
            )
        )
        for cell, mean in printed.items()
    }


def rates(seeds: int, spread: float, repeats: int, wide: float = 1.0) -> pd.DataFrame:
    """One row for each testable claim: by chance for and against; found and stated power."""
    random, rows = np.random.default_rng(seeds), []
    claims = {claim["id"]: claim["kind"] for claim in testable()}
    for exhibit in accuracy_exhibits():
        for effect in (False, True):
            for _ in range(repeats):
                cells = simulate(exhibit, seeds, spread, effect, random, wide)
                rows += [
                    (v.id, claims[v.id], effect, v.verdict == FOR, v.verdict == AGAINST, v.power)
                    for v in judge(exhibit, cells, "reduced")
                    if v.id in claims
                ]
    table = pd.DataFrame(rows, columns=["claim", "kind", "effect", "for", "against", "power"])
    mean = table.groupby(["claim", "kind", "effect"])[["for", "against", "power"]].mean()
    null, true = (mean.xs(effect, level="effect") for effect in (False, True))
    return pd.DataFrame(
        {
            "for by chance": null["for"],
            "against by chance": null["against"],
            "found": true["for"],
            "stated": true["power"],
        }
    ).reset_index()


def page_table(repeats: int) -> str:
    """The rates of each kind of claim, at several numbers of seeds, in Markdown."""
    lines = [
        "| kind | claims | seeds | holds by chance | reverses by chance | found | stated |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for seeds, wide in ((2, 1), (3, 1), (5, 1), (3, 3)):
        table = rates(seeds, spread=0.35, repeats=repeats, wide=wide)
        case = f"{seeds}, some cells spread {wide} times" if wide > 1 else seeds
        for kind, part in table.groupby("kind", sort=False):
            mean = part.drop(columns=["claim", "kind"]).mean()
            numbers = " | ".join(f"{100 * value:.1f} %" for value in mean)
            lines.append(f"| {kind} | {len(part)} | {case} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=100, help="simulated tables of an exhibit")
    parser.add_argument("--write", action="store_true", help="put the table into docs/verdicts.md")
    options = parser.parse_args()
    table = page_table(options.repeats)
    print(table)
    if options.write:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
