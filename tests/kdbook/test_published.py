"""The published numbers and the claims of the four papers are complete and agree."""

import pytest

from kdbook.claims import all_claims, judge, paper_cells, published
from kdbook.scorecard import PAPERS
from kdbook.wording import verdict_text

NEEDED = {
    "value": {"column", "tolerance"},
    "gap": {"contrast"},
    "equal": {"contrast", "tolerance"},
    "ordering": {"order"},
    "best": {"cell", "among"},
    "correlation": {"x", "y"},
}
CLAIMS = all_claims()
EXHIBITS = list(dict.fromkeys(claim["exhibit"] for claim in CLAIMS))


def cells_of(claim):
    """The (row, column) of each cell in a claim."""
    match claim["kind"]:
        case "value":
            names = claim.get("rows", ())
        case "ordering":
            names = claim["order"]
        case "best":
            names = [claim["cell"], *claim["among"]]
        case "correlation":
            names = []
        case _:
            names = claim["contrast"]
    split = [str(name).partition(" @ ") for name in names]
    return [(row, column or claim["column"]) for row, _, column in split]


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
        if "records" not in claim:
            assert set(cells_of(claim)) <= paper_cells(claim["exhibit"]).keys(), claim["id"]


def test_every_published_cell_has_one_value():
    table = published()
    assert not table.duplicated(["exhibit", "row", "column"]).any()
    assert table.value.notna().all()
    assert set(table.exhibit.str.partition("/")[0]) == set(PAPERS)


def test_the_papers_numbers_agree_with_the_papers_claims():
    verdicts = [v for name in EXHIBITS for v in judge(name, paper_cells(name), faithful=True)]
    values = [v for v in verdicts if v.kind == "value" and v.n]
    assert len(values) > 200
    assert {v.estimate for v in values} == {0.0}
    relations = [v for v in verdicts if v.kind != "value" and v.verdict != "not run"]
    assert len(relations) > 100
    assert [v.id for v in relations if not v.as_claimed] == []
    assert [v.id for v in relations if v.estimate != v.paper] == []


def test_without_runs_nothing_is_judged():
    verdicts = [v for name in EXHIBITS for v in judge(name, {}, faithful=True)]
    assert {v.verdict for v in verdicts} == {"not run"}
    assert {v.id for v in verdicts} >= {c["id"] for c in CLAIMS if c["kind"] != "value"}


# --- reconstructions ------------------------------------------------------------------------------


@pytest.fixture
def verdicts():
    """Verdicts on an exhibit of KR in the paper's profile, by the end of the claim's id."""

    def judged(exhibit, cells):
        prefix = f"kr/{exhibit}/"
        return {v.id.removeprefix(prefix): v for v in judge(f"kr/{exhibit}", cells, faithful=True)}

    return judged


def test_a_claim_on_a_reconstruction_gets_the_direction_only(verdicts):
    cells = {("none", "mean_loss"): {0: 3.0, 1: 3.1}, ("sparse", "mean_loss"): {0: 1.0, 1: 1.1}}
    verdict = verdicts("figure5", cells)["sparse-faster-than-none"]
    assert (verdict.reconstruction, verdict.verdict) == (True, "direction only")
    assert verdict.low > 0
    assert verdict_text(verdict) == "reconstruction, direction only: as claimed"


def test_rows_and_counts_beside_a_reconstruction_are_judged(verdicts):
    cells = {
        ("Teacher", "accuracy"): {0: 91.9, 1: 91.91, 2: 91.92},
        ("KR", "accuracy"): {0: 90.6, 1: 90.65, 2: 90.7},
        ("FitNet", "params"): {None: 0.08},
        ("KR", "params"): {None: 0.06},
    }
    found = verdicts("table1", cells)
    assert found["value-accuracy/Teacher"].verdict == "reproduced"
    assert not found["value-accuracy/Teacher"].reconstruction
    assert found["value-accuracy/KR"].verdict == "direction only"
    assert found["fewer-params-than-fitnet"].verdict == "supported"


def test_no_value_on_the_reconstructed_data_is_evidence(verdicts):
    found = verdicts("table4", {("Teacher", "accuracy"): {0: 61.2, 1: 61.25, 2: 61.3}})
    assert found["value-accuracy/Teacher"].verdict == "direction only"
