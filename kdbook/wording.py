"""The text of a claim, of its numbers and of its verdict, for tables and pages.

The argument ``verdict`` is a ``Verdict``, or a row of a table of verdicts.
"""

import pandas as pd

from kdbook.contrasts import possible

TWO_SIDED = ("value", "gain", "equal")  # claims on a size: a sign says nothing of them


def claim_text(verdict) -> str:
    """The claim's statement; for a value also its row, for a family that it is a mean."""
    text = verdict.statement.rstrip(".")
    if verdict.kind == "value":
        return f"{text}: {verdict.id.split('/', 3)[3]}"
    if verdict.kind == "family" and "on average" not in text:
        return f"{text}, on average over the pairs."
    return verdict.statement


def verdict_text(verdict) -> str:
    """The verdict, and what a reader must know beside it."""
    text, detail = verdict.verdict, verdict.detail if isinstance(verdict.detail, str) else ""
    if text == "no verdict" or (text == "not comparable" and detail):
        return f"{text}: {detail}"
    notes = []
    if text in ("unresolved here", "inconclusive"):
        signed = verdict.kind not in TWO_SIDED and not pd.isna(verdict.agree)
        agree = f"{verdict.agree:.0f} of {verdict.n} seeds agree"
        notes.append(agree if signed else f"{verdict.n} seeds")
        if not pd.isna(verdict.resolution):
            notes.append(f"resolution ±{verdict.resolution:.2g}")
        if not pd.isna(verdict.paper) and verdict.kind not in TWO_SIDED:
            notes.append(f"the paper's gap is {paper_text(verdict.paper)}")
    if detail and verdict.kind == "family":
        notes.append(detail)
    elif detail and text not in ("supported", "holds here"):
        notes.append(f"smallest gap: {detail}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def failure_text(check: str, rows) -> str:
    """A failed check with the rows and cells that it concerns, None for all."""
    names = [row if isinstance(row, str) else " @ ".join(row) for row in rows or ["all rows"]]
    return f"A check failed ({', '.join(names)}): {check}"


def power_text(power: float) -> str:
    return "" if pd.isna(power) else f"{power:.0%}"


def estimate_text(verdict) -> str:
    """The estimate with its interval.

    For a claim on a value the estimate is our value minus the paper's value.
    """
    if pd.isna(verdict.estimate):
        return ""
    text = f"{verdict.estimate:+.3g}"
    if verdict.kind in ("value", "gain"):
        text += " from paper"
    return f"{text} [{verdict.low:+.3g}, {verdict.high:+.3g}]" if _has_interval(verdict) else text


def own_text(verdict) -> str:
    """Our number with its interval: for a claim on a value our value, otherwise the estimate."""
    if pd.isna(verdict.estimate):
        return ""
    shift = verdict.paper if verdict.kind in ("value", "gain") else 0.0
    low, high = verdict.low + shift, verdict.high + shift
    text = f"{verdict.estimate + shift:.4g}"
    return f"{text} [{low:.4g}, {high:.4g}]" if _has_interval(verdict) else text


def _has_interval(verdict) -> bool:
    value = verdict.kind == "value"
    shift = verdict.paper if value else 0.0
    unit = verdict.unit if isinstance(verdict.unit, str) else ""
    return possible(verdict.low + shift, verdict.high + shift, unit, difference=not value)


def paper_text(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.4g}"


def unit_text(verdict) -> str:
    """The unit of the numbers of a verdict: a gap of percentages is in points."""
    unit = verdict.unit if isinstance(verdict.unit, str) else ""
    if verdict.kind == "correlation":
        return "r"
    return "points" if unit == "%" and verdict.kind != "value" else unit


# What a rule's key says, in words. A key that is not here stands as "key: value".
FLAGS = {
    "headline": "a headline",
    "reconstruction": "on our reading",
    "deterministic": "counted",
    "own_spread": "with its own spread",
    "log": "of logarithms",
}
KEYS = {
    "kind": "kind {}",
    "exhibit": "of {}",
    "column": "column {}",
    "margin": "by more than {}",
    "tolerance": "to within {}",
    "at_least": "r above {}",
    "at_most": "r below {}",
    "x": "between {}",
    "y": "and {}",
    "cell": "{} is better",
}


def rule_text(rule: dict | str | None) -> str:
    """What a claim's rule says, or a part of a rule, as words."""
    if rule is None:
        return "no claim"
    if isinstance(rule, str):
        return rule
    return "; ".join(_key_text(key, value) for key, value in rule.items()) or "not set"


def _key_text(key: str, value) -> str:
    if key in FLAGS:
        rows = f" for {', '.join(value)}" if isinstance(value, list) else ""
        return ("" if value else "not ") + FLAGS[key] + rows
    if value is None:
        return f"no {key.replace('_', ' ')}"
    match key:
        case "contrast":
            terms = sorted(value.items(), key=lambda term: -term[1])
            return "".join(_term(name, weight) for name, weight in terms).removeprefix(" + ")
        case "order":
            return " > ".join(map(str, value))
        case "sense":
            return "the smallest is the best" if value == "min" else "the largest is the best"
        case "among" | "rows":
            return ("than " if key == "among" else "rows ") + ", ".join(map(str, value))
        case "pairs":
            shown = [f"{better} over {worse}" for better, worse in value[:3]]
            more = [f"{len(value) - 3} more pairs"] if len(value) > 3 else []
            return ", ".join(shown + more)
    return KEYS.get(key, f"{key}: {{}}").format(value)


def _term(name: str, weight: float) -> str:
    sign = "+" if weight > 0 else "−"
    return f" {sign} " + (f"{abs(weight):g} · {name}" if abs(weight) != 1 else f"{name}")


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


def verdict_table(verdicts) -> pd.DataFrame:
    """One row per verdict. A verdict on a reconstruction stands in a column of its own."""
    columns = {
        "claim": [("★ " if v.headline else "") + claim_text(v) for v in verdicts],
        "kind": [v.kind for v in verdicts],
        "ours": [estimate_text(v) for v in verdicts],
        "paper": [paper_text(v.paper) for v in verdicts],
        "n": [v.n for v in verdicts],
        "power": [power_text(v.power) for v in verdicts],
        "verdict": ["" if v.reconstruction else verdict_text(v) for v in verdicts],
    }
    if any(v.reconstruction for v in verdicts):
        columns["our reading"] = [verdict_text(v) if v.reconstruction else "" for v in verdicts]
    return pd.DataFrame(columns).set_index("claim")
