"""The text of a claim, of its numbers and of its verdict, for tables and pages.

The argument ``verdict`` is a ``Verdict``, or a row of a table of verdicts.
"""

import pandas as pd


def claim_text(verdict) -> str:
    """The claim's statement; for a value, also the row of the value."""
    if verdict.kind != "value":
        return verdict.statement
    return f"{verdict.statement.rstrip('.')}: {verdict.id.split('/', 3)[3]}"


def verdict_text(verdict) -> str:
    """The verdict and, where only the direction counts, the side of our estimate."""
    text = verdict.verdict
    if text != "direction only":
        return text
    if verdict.reconstruction:
        text = "reconstruction, direction only"
    if verdict.as_claimed not in (True, False):  # None, or NaN from a file
        return text
    if verdict.as_claimed:
        side = "as claimed"
    elif verdict.kind == "equal":
        side = "not equal"
    elif verdict.estimate == 0:
        side = "a tie"
    else:
        side = "weaker than claimed" if verdict.estimate > 0 else "opposite"
    return f"{text}: {side}"


def estimate_text(verdict) -> str:
    """The estimate with its interval.

    For a claim on a value the estimate is our value minus the paper's value.
    """
    if pd.isna(verdict.estimate):
        return ""
    text = f"{verdict.estimate:+.3g}"
    if verdict.kind == "value":
        text += " from paper"
    return text if pd.isna(verdict.low) else f"{text} [{verdict.low:+.3g}, {verdict.high:+.3g}]"


def own_text(verdict) -> str:
    """Our number with its interval: for a claim on a value our value, otherwise the estimate."""
    if pd.isna(verdict.estimate):
        return ""
    shift = verdict.paper if verdict.kind == "value" else 0.0
    text = f"{verdict.estimate + shift:.4g}"
    if pd.isna(verdict.low):
        return text
    return f"{text} [{verdict.low + shift:.4g}, {verdict.high + shift:.4g}]"


def paper_text(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.4g}"


def cell_text(cell) -> str:
    """One of our cells: a count as it is, otherwise mean ± spread over seeds (number of seeds)."""
    if cell.counted:
        return f"{cell.ours:.6g}" if cell.ours == int(cell.ours) else f"{cell.ours:.5g}"
    digits = 2 if abs(cell.ours) >= 1 else 3
    if cell.n == 1:
        return f"{cell.ours:.{digits}f} (1)"
    return f"{cell.ours:.{digits}f} ± {cell.spread:.{digits}f} ({cell.n})"


def markdown(table: pd.DataFrame) -> str:
    """A table with two levels of columns, in Markdown."""
    heads = ["", *(" · ".join(column) for column in table.columns)]
    rows = [[str(row), *map(str, values)] for row, *values in table.itertuples()]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
