"""The scorecard: every claim of the four papers and our verdict on it, on one page."""

import base64
import hashlib
import html
import io
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pandas as pd

from kdbook import amendments, figures, wording
from kdbook.claims import Verdict, as_table, judge
from kdbook.exhibits import NO_EVIDENCE
from kdbook.forest import VERDICTS, forest
from kdbook.profile import Profile
from kdbook.provenance import current_commit
from kdbook.published import all_claims
from kdlib import files

PAPERS = {
    "rco": "Route Constrained Optimization",
    "stc": "Student-Teacher Collaboration",
    "search": "Search for Better Students",
    "kr": "Knowledge Representing (reconstructed)",
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
            tables.append(as_table(judge(exhibit, {}, "reduced")))
    table = pd.concat([t.dropna(axis=1, how="all") for t in tables], ignore_index=True)
    table = table.reindex(columns=[f.name for f in fields(Verdict)])
    for flag in ("reconstruction", "headline"):
        table[flag] = table[flag].eq(True)
    table["detail"] = table.detail.fillna("")
    table["paper_key"] = table.exhibit.str.partition("/")[0]
    return table.sort_values("exhibit", key=lambda names: names.map(exhibits.index), kind="stable")


def counts(table: pd.DataFrame) -> pd.DataFrame:
    """The number of claims of each paper with each verdict; verdicts that none has are left out."""
    count = pd.crosstab(table.paper_key, table.verdict)
    given = [verdict for verdict in VERDICTS if verdict in count]
    count = count.reindex(index=PAPERS, columns=given, fill_value=0)
    return count.rename(index=PAPERS).rename_axis(index=None, columns=None)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Each claim with the paper's number, our number and the verdict, as text.

    A verdict on a reconstruction of ours stands in the column ``our reading``.
    """
    claims = list(table.itertuples())
    columns = {
        "exhibit": table.exhibit.tolist(),
        "claim": [wording.claim_text(c) for c in claims],
        "paper": [wording.paper_text(c.paper) for c in claims],
        "ours": [wording.own_text(c) for c in claims],
        "unit": [wording.unit_text(c) for c in claims],
        "seeds": table.n.tolist(),
        "power": [wording.power_text(c.power) for c in claims],
        "verdict": ["" if c.reconstruction else wording.verdict_text(c) for c in claims],
        "our reading": [wording.verdict_text(c) if c.reconstruction else "" for c in claims],
    }
    return pd.DataFrame(columns).set_index("exhibit")


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
    folder = files.results() / profile.folder
    page = _PAGE.format(
        profile=html.escape(profile.folder),
        full="" if profile.scale == "full" else _REDUCED,
        warning="" if profile.evidence else _WARNING,
        counts=counts(table).to_html(border=0),
        picture=base64.b64encode(buffer.getvalue()).decode(),
        headlines=_claims_html(table[table.headline]),
        amendments=_amendments_html(),
        sections="\n".join(
            f"<h2>{html.escape(title)}</h2>{_claims_html(table[table.paper_key == key])}"
            for key, title in PAPERS.items()
        ),
    )
    page = _with_links(page, folder)
    about = {
        "profile": profile.folder,
        "evidence": profile.evidence,
        "commit": current_commit(),
        "claims": len(table),
        "sha256": hashlib.sha256(page.encode()).hexdigest(),
    }
    files.write_atomic(folder / "scorecard.png", buffer.getvalue())
    files.write_atomic(folder / "scorecard.html", page)
    files.write_atomic(folder / "scorecard.html.json", json.dumps(about) + "\n")
    return folder / "scorecard.html"


def _claims_html(table: pd.DataFrame) -> str:
    shown = summary(table).drop(columns="seeds").reset_index()
    shown.insert(2, "where", table["where"].tolist())
    shown = shown.map(html.escape)
    colors = table.verdict.map(VERDICTS).tolist()
    for column in ("verdict", "our reading"):
        shown[column] = [
            f"<b style='color:{color}'>■</b> {text}" if text else ""
            for color, text in zip(colors, shown[column], strict=True)
        ]
    with pd.option_context("display.max_colwidth", None):
        return shown.to_html(index=False, border=0, escape=False)


def _amendments_html() -> str:
    table = amendments.as_table()
    with pd.option_context("display.max_colwidth", None):
        return table.to_html(index=False, border=0)


def _with_links(page: str, folder: Path) -> str:
    """The page with the labels of decisions as links to ``docs/decisions.md``."""
    decisions = files.ROOT / "docs" / "decisions.md"
    headings = re.findall(r"^### ((\w+-[a-z]+): .*)$", decisions.read_text(), re.MULTILINE)
    place = Path(os.path.relpath(decisions, folder.resolve())).as_posix()
    links = {}
    for title, label in headings:
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")  # GitHub's
        links[label] = f"<a href='{place}#{anchor}'>{label}</a>"
    return re.sub(r"\b[A-Z]+-[a-z]+\b", lambda found: links.get(found[0], found[0]), page)


_WARNING = """<p class=warn>A smoke run shows only that the pipeline works. Its trained numbers are
no evidence. Counts of FLOPs and parameters are valid in every profile.</p>"""
_REDUCED = """<p>This profile is below full scale. So <i>supported</i>, <i>contradicted</i>,
<i>reproduced</i> and <i>differs</i> are verdicts on counted numbers here, such as FLOPs: counts are
valid in every profile.</p>"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scorecard, {profile}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b }}
table {{ border-collapse: collapse; margin: .6rem 0 1.6rem }}
th, td {{ text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd;
  vertical-align: top }}
td:nth-child(4), td:nth-child(5), td:nth-child(6) {{ white-space: nowrap;
  font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }}
.warn {{ background: #fff3cd; padding: .5rem .8rem }}
</style></head><body>
<h1>Scorecard, profile {profile}</h1>
{warning}
<p>This page lists every claim of the four papers and our verdict on it. Each verdict is computed.
At full scale a claim is <i>supported</i> if the lower bound of its gap is above the margin, and
<i>contradicted</i> if the upper bound is below it (95&nbsp;% each). On smaller data or shorter
schedules we only ask whether the gap is positive: the claim <i>holds here</i>, <i>reverses
here</i>, or is <i>unresolved here</i>. A value is <i>reproduced</i> where its whole 95&nbsp;%
interval lies within the tolerance. <i>Power</i> is the probability of a verdict for the claim, if
the paper's gap were true here. <i>Our reading</i> is the verdict on a method or on data that we had
to reconstruct.</p>
<h2>Headline claims</h2>
{headlines}
<h2>All claims</h2>
{counts}
{full}
<img alt="Forest plot: estimate and interval of each claim beside the paper's; table below."
  src="data:image/png;base64,{picture}">
{sections}
<h2>Amendments</h2>
<p>The claims were written before the first results. This table lists every later change, with the
verdicts that stood before it.</p>
<details><summary>All amendments</summary>{amendments}</details>
</body></html>
"""
