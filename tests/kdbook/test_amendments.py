"""No claim's rule changes without an entry in the log of amendments."""

import hashlib

import pytest

from kdbook import amendments
from kdbook.published import PUBLISHED, all_claims

FIRST = "a1989f60488fd07f"
CLAIM = {"id": "x/t/a", "kind": "gap", "margin": 0.5, "statement": "One.", "where": "here"}


def test_every_change_since_the_first_results_has_an_entry():
    content = (PUBLISHED / "claims-first.json").read_bytes()
    assert hashlib.sha256(content).hexdigest()[:16] == FIRST
    assert amendments.unlogged() == []


@pytest.mark.parametrize(
    "change",
    [{"margin": 0.0}, {"kind": "best"}, {"tolerance": 9}, {"sense": "min"}, {"headline": None}],
)
def test_a_change_without_an_entry_is_refused(monkeypatch, change):
    claims = [dict(claim) for claim in all_claims()]
    claims[0] |= change
    monkeypatch.setattr(amendments, "all_claims", lambda: claims)
    assert claims[0]["id"] in _complaint()


def _complaint():
    try:
        return amendments.unlogged()
    except ValueError as error:  # the claim has an entry, which the change contradicts
        return str(error)


def test_words_may_change():
    words = CLAIM | {"statement": "Another.", "where": "there", "records": "this"}
    assert amendments.rules([words]) == amendments.rules([CLAIM])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([CLAIM], [CLAIM | {"margin": 0.0}]),
        ([CLAIM], [CLAIM | {"tolerance": 1.0}]),
        ([CLAIM], [{k: v for k, v in CLAIM.items() if k != "margin"}]),
        ([CLAIM], []),
        ([], [CLAIM]),
    ],
)
def test_an_entry_can_be_undone(before, after):
    before, after = amendments.rules(before), amendments.rules(after)
    entry = {"date": "2026-01-01", "claims": amendments.changes(before, after)}
    assert amendments.undone(after, [entry]) == before
    other = {"x/t/a": {"kind": "gap", "margin": 99, "tolerance": 99}}
    if before and after:
        other = {}
    with pytest.raises(ValueError, match="Claim x/t/a is not as the entry of 2026-01-01"):
        amendments.undone(other, [entry])


def test_the_table_names_the_verdicts_that_stood():
    table = amendments.as_table().set_index("claim")
    first = table.loc["kr/figure5/sparse-lowest-loss"]
    first = first if first.ndim == 1 else first.iloc[0]
    assert (first.before, first.after) == ("not set", "reconstruction: True")
    assert first.verdicts == "kr/figure5/sparse-lowest-loss (paper): contradicted"
    assert "the rule" in table.index
