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


# Units of columns that the papers do not print, by the beginning of the column's name.
OWN_UNITS = {
    "%": "kd rco softmax c10_ c100_ error top1_error top5_error accuracy collaboration_error "
    "teachers_back_error stc_early at_early ft_early student_early",
    "points": "gain cifar100 t_cifar100",
    "nats": "kl_own kl_near kl_later kl_end kl_target kl_reached loss_gap",
    "loss": "final_loss final_test_loss final_kd_loss mean_loss",
    "share": "drop_rate skip_drop_rate sparsity",
    "M params": "params_",
    "M MACs": "macs_c10 macs_c100 found_macs random_macs alpha_macs",
    "MACs": "macs_per_gate",
    "stages": "empty_stages",
    "connections": "connections_removed",
    "epochs": "epochs",
}


def unit_of(exhibit: str, column: str) -> str:
    """The unit of a column: the paper's, or that of a column of our own; empty if it has none."""
    table = published()
    units = table.unit[(table.exhibit == exhibit) & (table.column == column)]
    if len(units):
        return units.iloc[0]
    return next(
        (u for u, names in OWN_UNITS.items() if column.startswith(tuple(names.split()))), ""
    )


def cell_of(name: str, claim: Mapping) -> Cell:
    """The cell of a name in a claim: ``row @ column``, or ``row`` in the claim's column."""
    row, _, column = str(name).partition(" @ ")
    return row, column or claim["column"]
