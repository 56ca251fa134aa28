"""What the four papers print: their numbers, and the claims that we test."""

from collections.abc import Mapping
from functools import lru_cache

import pandas as pd
import yaml

from kdlib import files

PUBLISHED = files.ROOT / "results" / "published"
# A cell is the pair (row, column). Our cells have one value per seed; a counted value has the
# seed None.
Cell = tuple[str, str]
Cells = Mapping[Cell, Mapping[int | None, float]]


@lru_cache
def published() -> pd.DataFrame:
    """All numbers in the four papers: exhibit, row, column, value, unit, note, digits."""
    paths = sorted(PUBLISHED.glob("*.csv"))
    table = pd.concat([pd.read_csv(path, dtype={"value": str}) for path in paths])
    table["digits"] = table.value.str.partition(".")[2].str.len()
    table["value"] = table.value.astype(float)
    return table.fillna({"unit": "", "note": ""}).reset_index(drop=True)


@lru_cache
def all_claims() -> list[dict]:
    """The claims of the four papers, from ``results/published/claims.yaml``."""
    return yaml.safe_load((PUBLISHED / "claims.yaml").read_text())


def paper_cells(exhibit: str) -> Cells:
    """The published cells of an exhibit."""
    rows = published()[published().exhibit == exhibit]
    return {(r.row, r.column): {None: r.value} for r in rows.itertuples()}


def unit_of(exhibit: str, column: str) -> str:
    """The unit of a column; empty where the paper prints no number in this column."""
    table = published()
    units = table.unit[(table.exhibit == exhibit) & (table.column == column)]
    return units.iloc[0] if len(units) else ""


def cell_of(name: str, claim: Mapping) -> Cell:
    """The cell of a name in a claim: ``row @ column``, or ``row`` in the claim's column."""
    row, _, column = str(name).partition(" @ ")
    return row, column or claim["column"]
