"""The published numbers and the claims of the four papers are complete and agree."""

from kdbook.claims import judge
from kdbook.estimates import contrasts_of, estimate
from kdbook.published import all_claims, paper_cells, published
from kdbook.scorecard import PAPERS

NEEDED = {
    "value": {"column", "tolerance"},
    "gap": {"contrast"},
    "equal": {"contrast", "tolerance"},
    "ordering": {"order"},
    "best": {"cell", "among"},
    "correlation": {"x", "y"},
    "family": {"pairs"},
    "gain": {"contrast", "tolerance"},
}
CLAIMS = all_claims()
EXHIBITS = list(dict.fromkeys(claim["exhibit"] for claim in CLAIMS))


def test_every_claim_has_a_statement_a_place_in_the_paper_and_its_cells():
    for claim in CLAIMS:
        needed = {"id", "exhibit", "statement", "where", "kind"} | NEEDED[claim["kind"]]
        assert needed <= claim.keys()
        assert claim["id"].startswith(claim["exhibit"] + "/")
        assert claim["exhibit"].partition("/")[0] in PAPERS
        assert ("at_least" in claim) + ("at_most" in claim) == (claim["kind"] == "correlation")
    assert len({claim["id"] for claim in CLAIMS}) == len(CLAIMS) > 200


def test_every_cell_of_a_claim_is_published_unless_the_paper_only_draws_it():
    for claim in CLAIMS:
        if "records" not in claim and claim["kind"] != "correlation":
            named = {cell for contrast in contrasts_of(claim) for cell in contrast}
            named |= {(row, claim["column"]) for row in claim.get("rows", ())}
            assert named <= paper_cells(claim["exhibit"]).keys(), claim["id"]


def test_every_published_cell_has_one_value():
    table = published()
    assert not table.duplicated(["exhibit", "row", "column"]).any()
    assert table.value.notna().all()
    assert set(table.exhibit.str.partition("/")[0]) == set(PAPERS)


def test_the_papers_numbers_agree_with_the_papers_claims():
    verdicts = [v for name in EXHIBITS for v in judge(name, paper_cells(name), "full")]
    values = [v for v in verdicts if v.kind == "value" and v.n]
    assert len(values) > 200
    assert {v.estimate for v in values} == {0.0}
    relations = [c for c in CLAIMS if c["kind"] in ("gap", "best", "ordering", "family")]
    gaps = [(c, estimate(c, paper_cells(c["exhibit"]))) for c in relations]
    gaps = [(claim, found.estimate) for claim, found in gaps if found]
    assert len(gaps) > 70
    assert [c["id"] for c, gap in gaps if gap <= c.get("margin", 0.0)] == []


def test_a_claim_with_a_margin_names_its_size():
    for claim in CLAIMS:
        if claim.get("margin", 0) > 0:
            assert str(claim["margin"]) in claim["statement"], claim["id"]


def test_each_paper_has_three_to_eight_headlines():
    """A sentence on two data sets counts once."""
    for paper in PAPERS:
        found = [c["id"] for c in CLAIMS if c["id"].startswith(paper + "/") and c.get("headline")]
        sentences = {name.removesuffix("-c100").removesuffix("-c10") for name in found}
        assert 3 <= len(sentences) <= 8, paper


def test_no_family_mixes_data_sets():
    """Gaps of CIFAR-10 and CIFAR-100 have no common mean; kr/table4 compares two data sets."""
    for claim in CLAIMS:
        if claim["kind"] == "family" and claim["id"] != "kr/table4/larger-lead":
            columns = {column for contrast in contrasts_of(claim) for _, column in contrast}
            prefixes = {c.partition("_")[0] for c in columns if c.startswith(("c10_", "c100_"))}
            assert len(prefixes) <= 1, claim["id"]


def test_without_runs_nothing_is_judged():
    verdicts = [v for name in EXHIBITS for v in judge(name, {}, "full")]
    assert {v.verdict for v in verdicts} == {"not run"}
    assert {v.id for v in verdicts} >= {c["id"] for c in CLAIMS if c["kind"] != "value"}
