"""No claim's rule changes without an entry in the log of amendments."""

import hashlib
import sys

import pytest
import yaml

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
    assert (first.before, first.after) == ("not set", "on our reading")
    assert first.verdicts == "kr/figure5/sparse-lowest-loss (paper): contradicted"
    assert "the rule" in table.index


# --- the program ----------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """Call the program; the log and the claims of the last commit belong to the test."""
    log = tmp_path / "amendments.yaml"
    log.write_text("[]\n")
    monkeypatch.setattr(amendments, "LOG", log)
    monkeypatch.setattr(amendments.files, "ROOT", tmp_path)

    def call(*words, committed=None):
        if committed is not None:
            monkeypatch.setattr(amendments, "_committed", lambda since: committed)
        monkeypatch.setattr(sys, "argv", ["amendments", *map(str, words)])
        status = amendments.main()
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    call.log = log
    return call


def test_a_change_gets_an_entry(program, tmp_path):
    claims = [dict(claim) for claim in all_claims()]
    claims[0]["headline"] = "before"
    reasons = tmp_path / "reasons.txt"
    reasons.write_text("other | no\n")
    status, text = program(reasons, committed=claims)
    name = claims[0]["id"]
    assert (status, text) == (
        1,
        f"{name} changed, and {reasons} has no reason. Add: {name} | why\n",
    )
    reasons.write_text(f"{name} | Because.\n")
    assert program(reasons, committed=claims) == (0, "Entries added to amendments.yaml: 1.\n")
    (entry,) = yaml.safe_load(program.log.read_text().removeprefix("[]\n"))
    assert (entry["why"], [*entry["claims"]]) == ("Because.", [name])


def test_where_nothing_can_be_added_one_sentence_says_why(program, tmp_path):
    reasons = tmp_path / "reasons.txt"
    missing = f"The file of reasons {reasons} cannot be read: No such file or directory.\n"
    assert program(reasons, committed=all_claims()) == (1, missing)
    reasons.write_text("a | b\n")
    nothing = "No claim's rule differs from HEAD: there is nothing to add.\n"
    assert program(reasons, committed=all_claims()) == (0, nothing)
    assert program.log.read_text() == "[]\n"


def test_an_unknown_commit_is_named(monkeypatch):
    with pytest.raises(
        ValueError, match=r"git cannot show results/published/claims\.yaml at nowhere"
    ):
        amendments._committed("nowhere")
