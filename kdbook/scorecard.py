"""The scorecard: every claim of the four papers and what our results say of it, on one page."""

import base64
import hashlib
import html
import io
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdbook import figures
from kdbook.claims import Verdict, all_claims, judge
from kdbook.exhibits import claimed, current_commit, worded
from kdbook.profiles import Profile
from kdlib import files

PAPERS = {
    "rco": "Route Constrained Optimization",
    "stc": "Student-Teacher Collaboration",
    "search": "Search for Better Students",
    "kr": "Knowledge Representing (reconstructed)",
}
VERDICTS = {
    "reproduced": figures.GREEN,
    "supported": figures.GREEN,
    "direction only": figures.SKY,
    "inconclusive": figures.ORANGE,
    "differs": figures.VERMILION,
    "contradicted": figures.VERMILION,
    "not run": "#999999",
}
SHAPES = {"reproduced": "o", "supported": "o", "differs": "X", "contradicted": "X"}
# An estimate this many tolerances or published gaps away is drawn at the border.
LIMITS = {"value": (-8, 8), "gap": (-3, 4)}


def gather(profile: Profile) -> pd.DataFrame:
    """Verdicts on all claims: those that the profile's exhibits recorded, the rest ``not run``."""
    folder = files.results() / profile.folder
    tables, recorded = [], set()
    for path in sorted(folder.glob("*/*/verdicts.csv")):
        tables.append(pd.read_csv(path))
        recorded.add("/".join(path.parts[-3:-1]))
    for exhibit in dict.fromkeys(claim["exhibit"] for claim in all_claims()):
        if exhibit not in recorded:
            tables.append(pd.DataFrame([vars(v) for v in judge(exhibit, {}, faithful=False)]))
    table = pd.concat([t.dropna(axis=1, how="all") for t in tables], ignore_index=True)
    table = table.reindex(columns=[f.name for f in fields(Verdict)])
    table["reconstruction"] = table.reconstruction.eq(True)
    table["paper_key"] = table.exhibit.str.partition("/")[0]
    order = [claim["exhibit"] for claim in all_claims()]
    return table.sort_values("exhibit", key=lambda names: names.map(order.index), kind="stable")


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """How many claims of each paper got which verdict."""
    count = pd.crosstab(table.paper_key, table.verdict)
    count = count.reindex(index=PAPERS, columns=list(VERDICTS), fill_value=0)
    return count.rename(index=PAPERS).rename_axis(index=None, columns=None)


def forest(table: pd.DataFrame) -> Figure:
    """Estimates with their intervals: values against the paper's, gaps as shares of the paper's.

    Left, 0 is the paper's number and the grey band the tolerance. Right, 1 is the paper's gap, 0 no
    gap at all. A triangle at the border stands for an estimate beyond it. Claims that the paper
    gives no number for, or that say "equal", are in the page's tables alone.
    """
    value = table.kind == "value"
    # A value from another data set or schedule is no measure of the paper's.
    run = table[
        ~((table.verdict == "not run") | value & (table.verdict == "direction only"))
    ].copy()
    value = run.kind == "value"
    run["scale"] = np.where(value, run.tolerance, run.paper.abs())
    run = run[(run.scale > 0) & (run.kind != "equal")]
    parts = {"value": run[run.kind == "value"], "gap": run[run.kind != "value"]}
    height = 0.9 + 0.17 * max((len(part) for part in parts.values()), default=1)
    figure = Figure(figsize=(11, min(max(height, 2.5), 60)), layout="constrained")
    titles = {
        "value": "values: difference from the paper ÷ tolerance",
        "gap": "claims: our gap ÷ the paper's gap",
    }
    for axes, (kind, part) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        low, high = LIMITS[kind]
        if kind == "value":
            axes.axvspan(-1, 1, color="#000000", alpha=0.07, lw=0)
            axes.axvline(0, color="#555555", lw=0.8)
        else:
            axes.axvline(0, color="#555555", lw=0.8)
            axes.axvline(1, color="#555555", lw=0.8, ls=":")
        for y, claim in enumerate(part.itertuples()):
            x = claim.estimate / claim.scale
            color = VERDICTS[claim.verdict]
            if np.isfinite(claim.low):
                bounds = np.clip([claim.low / claim.scale, claim.high / claim.scale], low, high)
                axes.plot(bounds, [y, y], color=color, lw=1.6, ls="-", marker="")
            marker = "<" if x < low else ">" if x > high else SHAPES.get(claim.verdict, "D")
            axes.plot(np.clip(x, low, high), y, marker=marker, color=color, ms=5)
        if kind == "value" and len(part):
            high = np.clip(1.3 * (part.estimate / part.scale).abs().max(), 2, high)
            low = -high
        axes.set(xlim=(low * 1.05, high * 1.05), ylim=(len(part) - 0.4, -0.6), title=titles[kind])
        if part.empty:
            words = "nothing to draw: no claim here\nhas a printed number to compare"
            white = {"facecolor": "white", "lw": 0}
            axes.text(
                0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", bbox=white
            )
        names = [f"{c.exhibit}  {_short(c)}" for c in part.itertuples()]
        axes.set_yticks(range(len(part)), names, fontsize=6.5)
        axes.grid(axis="y", visible=False)
    return figure


def write_page(profile: Profile) -> Path:
    """One self-contained page, ``results/<profile>/scorecard.html``, and its picture beside it."""
    table = gather(profile)
    with figures.style():
        figure = forest(table)
        if not profile.evidence:
            figures.stamp(figure, "smoke run: no evidence")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    folder = files.results() / profile.folder
    files.write_atomic(folder / "scorecard.png", buffer.getvalue())
    picture = base64.b64encode(buffer.getvalue()).decode()
    alt = "Forest plot: each claim's estimate and interval beside the paper's; table below."
    sections = [
        f"<h2>{html.escape(title)}</h2>{_claims_html(table[table.paper_key == key])}"
        for key, title in PAPERS.items()
    ]
    warning = "" if profile.evidence else _WARNING
    page = _PAGE.format(
        profile=html.escape(profile.folder),
        warning=warning,
        counts=counts(table).to_html(border=0),
        picture=picture,
        alt=alt,
        sections="\n".join(sections),
    )
    files.write_atomic(folder / "scorecard.html", page)
    about = {
        "profile": profile.folder,
        "evidence": profile.evidence,
        "commit": current_commit(),
        "claims": len(table),
        "sha256": hashlib.sha256(page.encode()).hexdigest(),
    }
    files.write_atomic(folder / "scorecard.html.json", json.dumps(about) + "\n")
    return folder / "scorecard.html"


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Claims with the paper's number and ours, as the page shows them."""
    rows = [
        (c.exhibit, claimed(c), _html_number(c.paper), _html_estimate(c), c.n, worded(c))
        for c in table.itertuples()
    ]
    columns = ["exhibit", "claim", "paper", "ours (95 %)", "seeds", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index("exhibit")


def _short(claim) -> str:
    return claim.id.removeprefix(claim.exhibit + "/").removeprefix("value-")


def _claims_html(table: pd.DataFrame) -> str:
    rows = []
    for claim in table.itertuples():
        color = VERDICTS[claim.verdict]
        rows.append(
            f"<tr><td>{html.escape(claim.exhibit)}</td><td>{html.escape(claimed(claim))}</td>"
            f"<td>{html.escape(claim.where)}</td><td class=n>{_html_number(claim.paper)}</td>"
            f"<td class=n>{_html_estimate(claim)}</td>"
            f"<td><b style='color:{color}'>■</b> {worded(claim)}</td></tr>"
        )
    head = "<tr><th>exhibit<th>claim<th>where<th>paper<th>ours (95 %)<th>verdict</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _html_number(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.4g}"


def _html_estimate(claim) -> str:
    if pd.isna(claim.estimate):
        return ""
    ours = claim.paper + claim.estimate if claim.kind == "value" else claim.estimate
    shift = claim.paper if claim.kind == "value" else 0.0
    if pd.isna(claim.low):
        return f"{ours:.4g}"
    return f"{ours:.4g} [{claim.low + shift:.4g}, {claim.high + shift:.4g}]"


_WARNING = """<p class=warn>What a smoke run trains is evidence of nothing but a working pipeline.
Counts of FLOPs and parameters hold in every profile.</p>"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scorecard, {profile}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b }}
table {{ border-collapse: collapse; margin: .6rem 0 1.6rem }}
th, td {{ text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd;
  vertical-align: top }}
td.n {{ white-space: nowrap; font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }}
.warn {{ background: #fff3cd; padding: .5rem .8rem }}
</style></head><body>
<h1>Scorecard, profile {profile}</h1>
{warning}
<p>Every claim of the four papers, written down before the runs were made, and what our runs say of
it. Verdicts are computed: values are <i>reproduced</i> where the whole 95&nbsp;% interval lies
within the tolerance, gaps are <i>supported</i> where it lies on the claimed side. <i>Direction
only</i>: the profile, the data set or, where the text has lost it, the method is not the
paper's.</p>
{counts}
<img alt="{alt}" src="data:image/png;base64,{picture}">
{sections}
</body></html>
"""
