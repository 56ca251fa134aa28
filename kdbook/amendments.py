"""The log of amendments: what changed in the claims after the first results.

``claims.yaml`` was written before any run that counts as evidence. Every later change of a claim's
rule is an entry of ``amendments.yaml``: the date, the claims, their keys before and after, why, and
the verdicts that stood before. If all entries are undone, the claims are as first written; their
hashes are in ``claims-first.json``. The keys ``statement``, ``where`` and ``records`` decide no
verdict, so their words may change.

    python -m kdbook.amendments REASONS

adds entries for what differs from the last commit. REASONS is a file with lines ``claim | why``; a
claim may end in ``*``.
"""

import argparse
import datetime
import fnmatch
import hashlib
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pandas as pd
import yaml

from kdbook.published import PUBLISHED, all_claims
from kdbook.wording import rule_text
from kdlib import files

WORDS = {"statement", "where", "records"}
LOG = PUBLISHED / "amendments.yaml"


def rules(claims: list[dict]) -> dict[str, dict]:
    """The keys of each claim that decide its verdict, by the claim's id."""
    return {c["id"]: {k: v for k, v in c.items() if k not in {*WORDS, "id"}} for c in claims}


@lru_cache
def amendments() -> list[dict]:
    """The entries of the log, the first one first."""
    return yaml.safe_load(LOG.read_text())


def undone(current: dict[str, dict], entries: list[dict]) -> dict[str, dict]:
    """The rules before all entries.

    Raises ValueError where a claim is not as the last entry on it says.
    """
    rules_then = {name: dict(rule) for name, rule in current.items()}
    for entry in reversed(entries):
        for name, change in entry.get("claims", {}).items():
            before, after = change["before"], change["after"]
            found = rules_then.pop(name, None)
            left = after and found and {key: found.get(key) for key in after}
            if (found is None) != (after is None) or left != after:
                raise ValueError(
                    f"Claim {name} is not as the entry of {entry['date']} in {LOG.name} leaves it. "
                    f"Add an entry for the later change."
                )
            if before is not None:
                kept = {key: value for key, value in (found or {}).items() if key not in after}
                rules_then[name] = kept | before if after else before
    return rules_then


def fingerprints(claims: dict[str, dict]) -> dict[str, str]:
    """A hash of each rule."""
    text = {name: json.dumps(rule, sort_keys=True) for name, rule in claims.items()}
    return {name: hashlib.sha256(rule.encode()).hexdigest()[:16] for name, rule in text.items()}


def unlogged() -> list[str]:
    """The claims that changed since they were first written without an entry in the log."""
    first = json.loads((PUBLISHED / "claims-first.json").read_text())
    now = fingerprints(undone(rules(all_claims()), amendments()))
    return sorted(name for name in first.keys() | now.keys() if first.get(name) != now.get(name))


def as_table() -> pd.DataFrame:
    """One row per entry and claim: date, claim, before, after, why, verdicts."""
    rows = []
    for entry in amendments():
        stood = entry.get("verdicts", {})
        for name, change in entry.get("claims", {"the rule": entry.get("rule")}).items():
            before, after = (rule_text(change[side]) for side in ("before", "after"))
            verdicts = "; ".join(
                f"{k}: {v}" for k, v in stood.items() if re.match(rf"{re.escape(name)}[ /]", k)
            )
            rows.append((entry["date"], name, before, after, entry["why"], verdicts))
    return pd.DataFrame(rows, columns=["date", "claim", "before", "after", "why", "verdicts"])


# --- adding an entry ------------------------------------------------------------------------------


def changes(old: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """What an entry says of each claim that differs: its keys before and after, or None."""
    found = {}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before and after:
            keys = [k for k in before | after if before.get(k) != after.get(k)]
            before = {key: before[key] for key in keys if key in before}
            after = {key: after.get(key) for key in keys}
        if before != after:
            found[name] = {"before": before, "after": after}
    return found


def standing(claim: str) -> dict[str, str]:
    """The committed verdicts on a claim, by the claim (or its row) and the profile."""
    found = {}
    for path in sorted(files.results().glob("*/*/*/verdicts.csv")):
        table = pd.read_csv(path)
        table = table[(table.id == claim) | table.id.str.startswith(claim + "/")]
        table = table[table.verdict != "not run"]
        found |= {f"{row.id} ({path.parts[-4]})": row.verdict for row in table.itertuples()}
    return found


def add_entries(reasons: Path, since: str = "HEAD") -> int:
    """Append entries for all changes since a commit, one for each reason; return their number.

    Raises ValueError where a reason is missing or cannot be read, or git knows no such commit.
    """
    why = _read(reasons)
    entries: dict[str, dict] = {}
    for name, change in changes(rules(_committed(since)), rules(all_claims())).items():
        reason = next((why[p] for p in sorted(why, reverse=True) if fnmatch.fnmatch(name, p)), None)
        if reason is None:
            raise ValueError(f"{name} changed, and {reasons} has no reason. Add: {name} | why")
        today = datetime.date.today().isoformat()
        entry = entries.setdefault(reason, {"date": today, "why": reason, "claims": {}})
        entry["claims"][name] = change
        if stood := standing(name):
            entry.setdefault("verdicts", {}).update(stood)
    with LOG.open("a") as log:
        for entry in entries.values():
            log.write("\n" + yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=96))
    return len(entries)


def _read(reasons: Path) -> dict[str, str]:
    try:
        lines = [line.partition("|") for line in reasons.read_text().splitlines() if "|" in line]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"The file of reasons {reasons} cannot be read: {why}.") from error
    return {claim.strip(): text.strip() for claim, _, text in lines}


def _committed(since: str) -> list[dict]:
    path = (PUBLISHED / "claims.yaml").relative_to(files.ROOT).as_posix()
    command = ["git", "show", f"{since}:{path}"]
    try:
        done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
    except OSError as error:
        raise ValueError("git is needed to find what changed, and it is not installed.") from error
    if done.returncode:
        raise ValueError(f"git cannot show {path} at {since}: {done.stderr.strip()}")
    return yaml.safe_load(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdbook.amendments", description=__doc__.split("\n")[0]
    )
    parser.add_argument("reasons", type=Path, help="a file with lines: claim | why")
    parser.add_argument("--since", default="HEAD", help="the commit to compare with")
    options = parser.parse_args()
    try:
        number = add_entries(options.reasons, options.since)
    except (ValueError, yaml.YAMLError) as error:
        print(error, file=sys.stderr)
        return 1
    if number:
        print(f"Entries added to {LOG.relative_to(files.ROOT)}: {number}.")
    else:
        print(f"No claim's rule differs from {options.since}: there is nothing to add.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
