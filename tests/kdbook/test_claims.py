import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kdbook.claims import interval, judge, paper_cells
from kdbook.exhibits import worded
from kdbook.scorecard import PAPERS
from kdbook import claims

NOT_RUN = {}


def seeds(*values):
    return dict(enumerate(values))


@pytest.fixture
def published(monkeypatch):
    """A paper of ours: ``published(row=printed number, ...)`` in the column top1 of x/table1."""

    def publish(**cells):
        table = pd.DataFrame(
            [("x/table1", row, "top1", float(text), "%", "") for row, text in cells.items()],
            columns=["exhibit", "row", "column", "value", "unit", "note"],
        )
        table["digits"] = [len(text.partition(".")[2]) for text in cells.values()]
        monkeypatch.setattr(claims, "published", lambda: table)

    publish()
    return publish


@pytest.fixture
def verdicts(published, monkeypatch):
    """All verdicts on one claim, given our cells by row (in column top1) or (row, column)."""

    def say(claim, cells, faithful=True):
        whole = {"id": "x/table1/claim", "exhibit": "x/table1", "says": "", "where": "", **claim}
        monkeypatch.setattr(claims, "all_claims", lambda: [{"column": "top1", **whole}])
        cells = {k if isinstance(k, tuple) else (k, "top1"): v for k, v in cells.items()}
        return judge("x/table1", cells, faithful)

    return say


@pytest.fixture
def verdict(verdicts):
    def say(claim, cells, faithful=True):
        (only,) = verdicts(claim, cells, faithful)
        return only

    return say


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tests", [1, 3])
def test_the_interval_is_students(tests):
    values = np.array([70.1, 71.3, 69.8, 70.6])
    expected = stats.t.interval(
        1 - 0.05 / tests, df=3, loc=values.mean(), scale=values.std(ddof=1) / 2
    )
    assert interval(values, tests) == pytest.approx(expected)


def test_one_value_bounds_nothing():
    assert all(map(math.isnan, interval(np.array([70.0]))))


# --- values ---------------------------------------------------------------------------------------

VALUE = {"kind": "value", "tolerance": 1.0}


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (seeds(70.0, 70.2, 70.1), "reproduced"),
        (seeds(69.5, 69.4, 69.6), "reproduced"),
        (seeds(75.0, 75.2, 75.1), "differs"),
        (seeds(65.0, 65.2, 65.1), "differs"),
        (seeds(70.5, 71.9, 70.9), "inconclusive"),
        (seeds(60.0, 70.0, 80.0), "inconclusive"),
        (seeds(70.0), "inconclusive"),
        (seeds(), "not run"),
    ],
)
def test_a_value_is_judged_by_its_whole_interval(verdict, published, ours, expected):
    published(a="70.0")
    assert verdict(VALUE, {"a": ours}).verdict == expected


def test_a_value_is_told_as_its_difference_from_the_papers(verdict, published):
    published(a="70.0")
    ours = verdict(VALUE, {"a": seeds(71.0, 71.2, 71.4)})
    low, high = stats.t.interval(0.95, df=2, loc=1.2, scale=0.2 / math.sqrt(3))
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((1.2, low, high))
    assert (ours.paper, ours.tolerance, ours.unit, ours.n) == (70.0, 1.0, "%", 3)
    assert ours.as_claimed is None


def test_every_row_of_a_column_is_judged(verdicts, published):
    published(a="70.0", b="60.0", c="50.0")
    cells = {"a": seeds(70.0, 70.1), "b": seeds(65.0, 65.1)}
    told = {v.id: v.verdict for v in verdicts(VALUE, cells)}
    assert told == {
        "x/table1/claim/a": "reproduced",
        "x/table1/claim/b": "differs",
        "x/table1/claim/c": "not run",
    }
    assert [v.id for v in verdicts(VALUE | {"rows": ["b"]}, cells)] == ["x/table1/claim/b"]


@pytest.mark.parametrize(
    ("printed", "ours", "expected"),
    [
        ("5.4", 5.449, "reproduced"),
        ("5.4", 5.45, "reproduced"),
        ("5.4", 5.46, "differs"),
        ("11", 10.951, "reproduced"),
        ("11", 11.6, "differs"),
        ("0.25", 0.256, "differs"),
    ],
)
@pytest.mark.parametrize("faithful", [True, False])
def test_a_count_is_reproduced_to_the_printed_digit_in_every_profile(
    verdict, published, printed, ours, expected, faithful
):
    published(a=printed)
    claim = {"kind": "value", "tolerance": "printed", "deterministic": True}
    assert verdict(claim, {"a": {None: ours}}, faithful).verdict == expected


def test_a_value_of_another_profile_says_nothing(verdict, published):
    published(a="70.0")
    told = verdict(VALUE, {"a": seeds(70.0, 70.1, 70.2)}, faithful=False)
    assert (told.verdict, told.as_claimed) == ("direction only", None)


# --- gaps -----------------------------------------------------------------------------------------

GAP = {"kind": "gap", "contrast": {"a": 1, "b": -1}}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (seeds(71.0, 71.2, 71.1), seeds(70.0, 70.1, 70.2), "supported"),
        (seeds(69.0, 69.2, 69.1), seeds(70.0, 70.1, 70.2), "contradicted"),
        (seeds(71.0, 69.0, 71.1), seeds(70.0, 70.1, 70.2), "inconclusive"),
        (seeds(71.0), seeds(70.0), "inconclusive"),
        (seeds(71.0, 71.2), NOT_RUN, "not run"),
        (seeds(71.0, 71.2), {7: 70.0, 8: 70.1}, "not run"),
    ],
)
def test_a_gap_is_judged_by_the_side_of_its_interval(verdict, a, b, expected):
    assert verdict(GAP, {"a": a, "b": b}).verdict == expected


def test_a_gap_is_paired_by_seed(verdict):
    """Seeds differ by ten points, methods by one."""
    told = verdict(GAP, {"a": seeds(60.9, 71.0, 81.1), "b": {2: 80.0, 1: 70.0, 0: 60.0}})
    assert told.verdict == "supported"
    assert told.estimate == pytest.approx(1.0)
    assert (told.low, told.high) == pytest.approx(interval(np.array([0.9, 1.0, 1.1])))


def test_a_gap_counts_the_seeds_that_both_sides_have(verdict):
    told = verdict(GAP, {"a": seeds(70.9, 71.0, 71.1, 99.0), "b": seeds(70.0, 70.0, 70.0)})
    assert told.n == 3
    assert told.estimate == pytest.approx(1.0)


def test_a_gap_must_exceed_its_margin(verdict):
    cells = {"a": seeds(70.4, 70.5, 70.45), "b": seeds(70.0, 70.0, 70.0)}
    assert verdict(GAP, cells).verdict == "supported"
    assert verdict(GAP | {"margin": 1.0}, cells).verdict == "contradicted"
    assert verdict(GAP | {"margin": -0.5}, cells).verdict == "supported"


@pytest.mark.parametrize(("a", "as_claimed"), [(71.0, True), (69.0, False)])
def test_another_profile_tells_the_direction_only(verdict, a, as_claimed):
    told = verdict(GAP, {"a": seeds(a, a), "b": seeds(70.0, 70.0)}, faithful=False)
    assert (told.verdict, told.as_claimed) == ("direction only", as_claimed)


def test_the_papers_own_gap_stands_beside_ours(verdict, published):
    published(a="72.5", b="70.0")
    told = verdict(GAP, {"a": seeds(71.0, 71.0), "b": seeds(70.0, 70.1)})
    assert (told.paper, told.unit) == (2.5, "%")


def test_a_contrast_weighs_cells_of_several_columns(verdict):
    claim = {"kind": "gap", "contrast": {"a": 2, "a @ loss": -1, "b @ loss": 0.5}}
    cells = {"a": seeds(3.0, 4.0), ("a", "loss"): seeds(1.0, 1.0), ("b", "loss"): {None: 2.0}}
    told = verdict(claim, cells)
    assert told.estimate == pytest.approx(np.mean([2 * 3 - 1 + 1, 2 * 4 - 1 + 1]))
    assert told.n == 2


def test_a_counted_gap_holds_in_every_profile(verdict):
    cells = {"a": {None: 3.0}, "b": {None: 2.0}}
    counted = GAP | {"deterministic": True}
    assert verdict(counted, cells, faithful=False).verdict == "supported"
    assert verdict(counted, cells | {"b": {None: 4.0}}, faithful=False).verdict == "contradicted"


# --- several gaps at once -------------------------------------------------------------------------

ORDER = {"kind": "ordering", "order": ["a", "b", "c"]}


def test_an_ordering_needs_every_step(verdict):
    a, b, c = seeds(72.0, 72.1, 72.2), seeds(71.0, 71.1, 71.0), seeds(69.0, 69.2, 69.1)
    told = verdict(ORDER, {"a": a, "b": b, "c": c})
    assert told.verdict == "supported"
    assert told.estimate == pytest.approx(np.mean([1.0, 1.0, 1.2]))
    assert verdict(ORDER, {"a": a, "b": c, "c": b}).verdict == "contradicted"
    assert verdict(ORDER, {"a": a, "b": b}).verdict == "not run"


def test_an_ordering_is_corrected_for_its_number_of_steps(verdict):
    """A step that would count alone does not among two."""
    step = np.array([0.5, 1.0, 1.1])
    assert interval(step, tests=2)[0] < 0 < interval(step)[0]
    cells = {"a": seeds(*step), "b": seeds(0.0, 0.0, 0.0), "c": seeds(-5.0, -5.1, -5.2)}
    assert verdict(ORDER, cells).verdict == "inconclusive"
    assert verdict(ORDER | {"order": ["a", "b"]}, cells).verdict == "supported"


@pytest.mark.parametrize("single", ["a", "b", "c"])
def test_an_ordering_with_one_seed_of_a_method_is_inconclusive(verdict, single):
    cells = {"a": seeds(72.0, 72.1), "b": seeds(71.0, 71.1), "c": seeds(69.0, 69.2)}
    cells[single] = {0: cells[single][0]}
    assert verdict(ORDER, cells).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("sense", "b", "c", "expected"),
    [
        ("max", 69.0, 68.0, "supported"),
        ("max", 69.0, 71.0, "contradicted"),
        ("min", 71.0, 72.0, "supported"),
        ("min", 69.0, 72.0, "contradicted"),
    ],
)
def test_the_best_beats_every_rival(verdict, sense, b, c, expected):
    claim = {"kind": "best", "cell": "a", "among": ["b", "c"], "sense": sense}
    cells = {"a": seeds(70.0, 70.1), "b": seeds(b, b + 0.1), "c": seeds(c, c + 0.1)}
    told = verdict(claim, cells)
    assert told.verdict == expected
    sign = 1 if sense == "max" else -1
    assert told.estimate == pytest.approx(min(sign * (70 - b), sign * (70 - c)))
    assert verdict(claim, {**cells, "c": NOT_RUN}).verdict == "not run"


# --- equality and correlation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (seeds(70.0, 70.1, 70.2), "supported"),
        (seeds(71.0, 71.1, 71.2), "contradicted"),
        (seeds(69.0, 69.1, 69.2), "contradicted"),
        (seeds(70.4, 70.7, 70.1), "inconclusive"),
    ],
)
def test_equality_needs_the_interval_within_the_tolerance(verdict, a, expected):
    told = verdict(GAP | {"kind": "equal", "tolerance": 0.5}, {"a": a, "b": seeds(70, 70.1, 70.2)})
    assert told.verdict == expected
    assert told.tolerance == 0.5


def points(x, y):
    cells = {(f"row {k}", "x"): seeds(value) for k, value in enumerate(x)}
    return cells | {(f"row {k}", "y"): seeds(value) for k, value in enumerate(y)}


CORRELATION = {"kind": "correlation", "x": "x", "y": "y", "at_least": 0.8}
X = np.arange(12.0)
NOISE = np.random.default_rng(0).normal(size=12)


@pytest.mark.parametrize(
    ("claim", "y", "expected"),
    [
        ({}, X + NOISE, "supported"),
        ({}, X + 5 * NOISE, "inconclusive"),
        ({}, -X + NOISE, "contradicted"),
        ({"at_least": None, "at_most": -0.5}, -X + NOISE, "supported"),
        ({"at_least": None, "at_most": -0.5}, X + NOISE, "contradicted"),
    ],
)
def test_a_correlation_is_judged_by_size_and_interval(verdict, claim, y, expected):
    claim = {key: value for key, value in (CORRELATION | claim).items() if value is not None}
    told = verdict(claim, points(X, y))
    assert told.verdict == expected
    sign = 1 if "at_least" in claim else -1
    pearson = stats.pearsonr(X, sign * y)
    bounds = pearson.confidence_interval(0.95)
    expected = (pearson.statistic, bounds.low, bounds.high)
    assert (told.estimate, told.low, told.high) == pytest.approx(expected)
    assert told.as_claimed == (pearson.statistic > 0)
    assert told.n == 12


@pytest.mark.parametrize(("count", "expected"), [(2, "not run"), (3, "inconclusive")])
def test_a_correlation_needs_points(verdict, count, expected):
    assert verdict(CORRELATION, points(X[:count], (X + NOISE)[:count])).verdict == expected


def test_a_correlation_of_what_is_all_alike_says_nothing(verdict):
    told = verdict(CORRELATION, points(X, 0 * X))
    assert (told.verdict, told.as_claimed, told.n) == ("inconclusive", None, 12)
    assert np.isnan(told.estimate)


def test_an_unknown_kind_of_claim_is_named(verdict):
    with pytest.raises(ValueError, match="x/table1/claim: unknown kind 'guess'"):
        verdict({"kind": "guess"}, {})


# --- the claims of the four papers ----------------------------------------------------------------

NEEDED = {
    "value": {"column", "tolerance"},
    "gap": {"contrast"},
    "equal": {"contrast", "tolerance"},
    "ordering": {"order"},
    "best": {"cell", "among"},
    "correlation": {"x", "y"},
}
CLAIMS = claims.all_claims()


def cells_of(claim):
    """The (row, column) that a claim names."""
    published = claims.published()
    match claim["kind"]:
        case "value":
            rows = published[published.exhibit == claim["exhibit"]]
            names = claim.get("rows", rows[rows.column == claim["column"]].row)
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


def test_every_claim_says_what_it_claims_and_where_the_paper_does():
    for claim in CLAIMS:
        assert {"id", "exhibit", "says", "where", "kind"} | NEEDED[claim["kind"]] <= claim.keys()
        assert claim["id"].startswith(claim["exhibit"] + "/")
        assert claim["exhibit"].partition("/")[0] in PAPERS
        assert ("at_least" in claim) + ("at_most" in claim) == (claim["kind"] == "correlation")


def test_claims_have_names_of_their_own():
    assert len({claim["id"] for claim in CLAIMS}) == len(CLAIMS) > 200


def test_every_cell_of_a_claim_is_published_unless_the_paper_only_draws_it():
    missing = {
        (claim["id"], cell)
        for claim in CLAIMS
        if "records" not in claim
        for cell in cells_of(claim)
        if cell not in paper_cells(claim["exhibit"])
    }
    assert missing == set()


def test_every_published_cell_has_one_value():
    table = claims.published()
    assert not table.duplicated(["exhibit", "row", "column"]).any()
    assert table.value.notna().all()
    assert set(table.exhibit.str.partition("/")[0]) == set(PAPERS)


def test_the_papers_numbers_agree_with_the_papers_claims():
    exhibits = dict.fromkeys(claim["exhibit"] for claim in CLAIMS)
    told = [v for name in exhibits for v in judge(name, paper_cells(name), faithful=True)]
    values = [v for v in told if v.kind == "value" and v.n]
    assert len(values) > 200
    assert {v.estimate for v in values} == {0.0}
    relations = [v for v in told if v.kind != "value" and v.verdict != "not run"]
    assert len(relations) > 100
    assert [v.id for v in relations if not v.as_claimed] == []
    assert [v.id for v in relations if v.estimate != v.paper] == []


def test_without_runs_nothing_is_judged():
    exhibits = dict.fromkeys(claim["exhibit"] for claim in CLAIMS)
    told = [v for name in exhibits for v in judge(name, {}, faithful=True)]
    assert {v.verdict for v in told} == {"not run"}
    assert {v.id for v in told} >= {c["id"] for c in CLAIMS if c["kind"] != "value"}


# --- reconstructions ------------------------------------------------------------------------------


def test_what_is_claimed_of_a_reconstruction_is_of_the_direction_only():
    cells = {("none", "mean_loss"): {0: 3.0, 1: 3.1}, ("sparse", "mean_loss"): {0: 1.0, 1: 1.1}}
    (verdict,) = [
        v for v in judge("kr/figure5", cells, faithful=True) if v.id.endswith("faster-than-none")
    ]
    assert verdict.reconstruction
    assert verdict.verdict == "direction only"
    assert verdict.low > 0
    assert worded(verdict) == "reconstruction, direction only: as claimed"


def test_rows_and_counts_beside_a_reconstruction_are_judged():
    cells = {
        ("Teacher", "accuracy"): {0: 91.9, 1: 91.91, 2: 91.92},
        ("KR", "accuracy"): {0: 90.6, 1: 90.65, 2: 90.7},
        ("FitNet", "params"): {None: 0.08},
        ("KR", "params"): {None: 0.06},
    }
    verdicts = {v.id.removeprefix("kr/table1/"): v for v in judge("kr/table1", cells, True)}
    assert verdicts["value-accuracy/Teacher"].verdict == "reproduced"
    assert not verdicts["value-accuracy/Teacher"].reconstruction
    assert verdicts["value-accuracy/KR"].verdict == "direction only"
    assert verdicts["fewer-params-than-fitnet"].verdict == "supported"


def test_no_value_of_the_calibrated_data_is_evidence():
    cells = {("Teacher", "accuracy"): {0: 61.2, 1: 61.25, 2: 61.3}}
    verdicts = {v.id: v for v in judge("kr/table4", cells, faithful=True)}
    assert verdicts["kr/table4/value-accuracy/Teacher"].verdict == "direction only"
