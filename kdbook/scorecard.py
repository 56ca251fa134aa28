"""The scorecard: every claim of the four papers and our verdict on it, on one page."""

import base64
import hashlib
import html
import io
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdbook import figures, wording
from kdbook.claims import Verdict, all_claims, as_table, judge
from kdbook.exhibits import NO_EVIDENCE
from kdbook.profiles import Profile
from kdbook.provenance import current_commit
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
# The panels of the forest plot: title, and the range of estimates that is drawn, in tolerances
# (values) or published gaps (gaps).
PANELS = {
    "value": ("values: difference from the paper ÷ tolerance", (-8, 8)),
    "gap": ("claims: our gap ÷ the paper's gap", (-3, 4)),
}


def gather(profile: Profile) -> pd.DataFrame:
    """Verdicts on all claims: the recorded ones of the profile, and ``not run`` for all others."""
    tables, recorded = [], set()
    for path in sorted((files.results() / profile.folder).glob("*/*/verdicts.csv")):
        tables.append(pd.read_csv(path))
        recorded.add("/".join(path.parts[-3:-1]))
    exhibits = list(dict.fromkeys(claim["exhibit"] for claim in all_claims()))
    for exhibit in exhibits:
        if exhibit not in recorded:
            tables.append(as_table(judge(exhibit, {}, faithful=False)))
    table = pd.concat([t.dropna(axis=1, how="all") for t in tables], ignore_index=True)
    table = table.reindex(columns=[f.name for f in fields(Verdict)])
    table["reconstruction"] = table.reconstruction.eq(True)
    table["paper_key"] = table.exhibit.str.partition("/")[0]
    return table.sort_values("exhibit", key=lambda names: names.map(exhibits.index), kind="stable")


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """The number of claims of each paper with each verdict."""
    count = pd.crosstab(table.paper_key, table.verdict)
    count = count.reindex(index=PAPERS, columns=list(VERDICTS), fill_value=0)
    return count.rename(index=PAPERS).rename_axis(index=None, columns=None)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Each claim with the paper's number, our number and the verdict, as text."""
    claims = list(table.itertuples())
    columns = {
        "exhibit": table.exhibit.tolist(),
        "claim": [wording.claim_text(c) for c in claims],
        "paper": [wording.paper_text(c.paper) for c in claims],
        "ours (95 %)": [wording.own_text(c) for c in claims],
        "seeds": table.n.tolist(),
        "verdict": [wording.verdict_text(c) for c in claims],
    }
    return pd.DataFrame(columns).set_index("exhibit")


# --- forest plot ----------------------------------------------------------------------------------


def forest(table: pd.DataFrame) -> Figure:
    """Estimates with their intervals: values beside the paper's, gaps as shares of the paper's.

    Left, 0 is the paper's number and the grey band is the tolerance. Right, 1 is the paper's gap
    and 0 is no gap. A triangle at the border is an estimate outside the panel. The plot leaves out
    claims that were not run, claims of equality and claims without a number in the paper. It also
    leaves out values with the verdict ``direction only``: their data or schedule is another one.
    """
    is_value = table.kind == "value"
    incomparable = (table.verdict == "not run") | is_value & (table.verdict == "direction only")
    scale = table.paper.abs().mask(is_value, table.tolerance)
    drawn = table.assign(scale=scale)[~incomparable & (scale > 0) & (table.kind != "equal")]
    parts = {
        "value": drawn[drawn.kind == "value"],
        "gap": drawn[drawn.kind != "value"],
    }
    height = 0.9 + 0.17 * max(map(len, parts.values()))
    figure = Figure(figsize=(11, min(max(height, 2.5), 60)), layout="constrained")
    for axes, (kind, part) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        _draw_panel(axes, kind, part)
    return figure


def _draw_panel(axes: Axes, kind: str, part: pd.DataFrame) -> None:
    title, (low, high) = PANELS[kind]
    axes.axvline(0, color="#555555", lw=0.8)
    if kind == "value":
        axes.axvspan(-1, 1, color="#000000", alpha=0.07, lw=0)
    else:
        axes.axvline(1, color="#555555", lw=0.8, ls=":")
    for y, claim in enumerate(part.itertuples()):
        x, color = claim.estimate / claim.scale, VERDICTS[claim.verdict]
        if np.isfinite(claim.low):
            bounds = np.clip([claim.low / claim.scale, claim.high / claim.scale], low, high)
            axes.plot(bounds, [y, y], color=color, lw=1.6, ls="-", marker="")
        marker = "<" if x < low else ">" if x > high else SHAPES.get(claim.verdict, "D")
        axes.plot(np.clip(x, low, high), y, marker=marker, color=color, ms=5)
    if kind == "value" and len(part):
        high = np.clip(1.3 * (part.estimate / part.scale).abs().max(), 2, high)
        low = -high
    axes.set(xlim=(low * 1.05, high * 1.05), ylim=(len(part) - 0.4, -0.6), title=title)
    if part.empty:
        words = "nothing to draw: no claim here\nhas a printed number to compare"
        box = {"facecolor": "white", "lw": 0}
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", bbox=box)
    names = [
        f"{c.exhibit}  {c.id.removeprefix(c.exhibit + '/').removeprefix('value-')}"
        for c in part.itertuples()
    ]
    axes.set_yticks(range(len(part)), names, fontsize=6.5)
    axes.grid(axis="y", visible=False)


# --- page -----------------------------------------------------------------------------------------


def write_page(profile: Profile) -> Path:
    """Write ``results/<profile>/scorecard.html``, with its figure inside and beside it.

    Raises StoreError where the results folder cannot be written.
    """
    table = gather(profile)
    buffer = io.BytesIO()
    with figures.style():
        figure = forest(table)
        if not profile.evidence:
            figures.stamp(figure, NO_EVIDENCE)
        figure.savefig(buffer, format="png", dpi=130)
    page = _PAGE.format(
        profile=html.escape(profile.folder),
        warning="" if profile.evidence else _WARNING,
        counts=counts(table).to_html(border=0),
        picture=base64.b64encode(buffer.getvalue()).decode(),
        sections="\n".join(
            f"<h2>{html.escape(title)}</h2>{_claims_html(table[table.paper_key == key])}"
            for key, title in PAPERS.items()
        ),
    )
    about = {
        "profile": profile.folder,
        "evidence": profile.evidence,
        "commit": current_commit(),
        "claims": len(table),
        "sha256": hashlib.sha256(page.encode()).hexdigest(),
    }
    folder = files.results() / profile.folder
    files.write_atomic(folder / "scorecard.png", buffer.getvalue())
    files.write_atomic(folder / "scorecard.html", page)
    files.write_atomic(folder / "scorecard.html.json", json.dumps(about) + "\n")
    return folder / "scorecard.html"


def _claims_html(table: pd.DataFrame) -> str:
    shown = summary(table).drop(columns="seeds").reset_index()
    shown.insert(2, "where", table["where"].tolist())
    shown = shown.map(html.escape)
    colors = table.verdict.map(VERDICTS).tolist()
    shown["verdict"] = [
        f"<b style='color:{color}'>■</b> {text}"
        for color, text in zip(colors, shown.verdict, strict=True)
    ]
    with pd.option_context("display.max_colwidth", None):
        return shown.to_html(index=False, border=0, escape=False)


_WARNING = """<p class=warn>A smoke run shows only that the pipeline works. Its trained numbers are
no evidence. Counts of FLOPs and parameters are valid in every profile.</p>"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scorecard, {profile}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b }}
table {{ border-collapse: collapse; margin: .6rem 0 1.6rem }}
th, td {{ text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd;
  vertical-align: top }}
td:nth-child(4), td:nth-child(5) {{ white-space: nowrap; font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }}
.warn {{ background: #fff3cd; padding: .5rem .8rem }}
</style></head><body>
<h1>Scorecard, profile {profile}</h1>
{warning}
<p>This page lists every claim of the four papers and our verdict on it. We wrote the claims down
before the runs, and the verdicts are computed. A value is <i>reproduced</i> where its whole
95&nbsp;% interval lies within the tolerance. A gap is <i>supported</i> where its whole interval
lies on the claimed side. <i>Direction only</i> means that the profile, the data set or the method
is not the paper's.</p>
{counts}
<img alt="Forest plot: estimate and interval of each claim beside the paper's; table below."
  src="data:image/png;base64,{picture}">
{sections}
</body></html>
"""
