"""Merge a pack into the store and the results of this machine; nothing that is here is lost.

python -m kdbook.unpack FOLDER      FOLDER was written by python -m kdbook.pack

Everything is checked before the first file is written.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

from filelock import Timeout

from kdbook.packed import (
    Pack,
    about_tensors,
    check_content,
    count,
    named_files,
    owner,
    record_summary,
    sha256,
    summary_of,
)
from kdlib import files, store
from kdlib.errors import KdlibError

STATE, RECORD = "state.safetensors", "record.jsonl"


# --- merging --------------------------------------------------------------------------------------


def _reached(state: dict) -> tuple[int, int]:
    """How far a saved run has come: its epochs, and steps of the next one."""
    return len(state.get("log", ())), state.get("taken", 0)


class Merge:
    """Writes the files of a pack that are not here.

    Attributes:
        written: names of files.
        there: number of files.
        skipped: names of files by the reason why they were not written.
    """

    def __init__(self, pack: Pack):
        self.pack = pack
        self.written: list[str] = []
        self.there = 0
        self.skipped: dict[str, list[str]] = defaultdict(list)

    def everything(self) -> None:
        runs, others = defaultdict(dict), []
        for name in self.pack.files:
            if found := owner(name):
                runs[found[0]][name] = found[1]
            else:
                others.append(name)
        for run_id, names in runs.items():
            self._run(run_id, names)

        def parent(name: str) -> PurePosixPath:
            return PurePosixPath(name).parent

        for folder, names in groupby(sorted(others, key=parent), parent):
            if folder.name in ("runs", "records"):  # architectures: their names are their hashes
                for name in names:
                    self._put(name, self._intact(name))
            else:
                self._results([*names])

    def _put(self, name: str, valid: bool) -> None:
        """Write a file, unless there is a ``valid`` one."""
        if valid:
            self.there += 1
        else:
            files.write_atomic(self.pack.targets[name], self.pack.read(name))
            self.written.append(name)

    def _skip(self, names: Iterable[str], reason: str) -> None:
        self.skipped[reason] += names

    def _intact(self, name: str) -> bool:
        """Whether there is a file in this place that holds what it says that it holds."""
        try:
            check_content(name, self.pack.targets[name].read_bytes())
        except (OSError, ValueError):
            return False
        return True

    # --- one run ------------------------------------------------------------------------------

    def _run(self, run_id: str, names: dict[str, str]) -> None:
        """Merge the files of a run, with its lock if they belong to the store."""
        if not any(name.startswith("runs/") for name in names):
            return self._locked_run(run_id, names)
        try:
            with store.lock(SimpleNamespace(id=run_id)):
                return self._locked_run(run_id, names)
        except Timeout:
            return self._skip(names, "in training here now")

    def _locked_run(self, run_id: str, names: dict[str, str]) -> None:
        """A run stays whole: its record, its state and its weights come from one training.

        A record here counts more than a packed one. Weights that neither a record nor a state names
        are leftovers of an interrupted training.
        """
        mine, in_store = _own_summary(run_id)
        theirs = None
        for name in sorted(names):  # the record in the store is the newest, and the last
            if names[name] == RECORD:
                theirs = record_summary(run_id, self.pack.read(name))
        if mine and not (theirs and _agree(mine, theirs)):
            reason = "trained with other weights here" if theirs else "trained here already"
            return self._skip(names, reason)
        stored = {file: name for name, file in names.items() if name.startswith("runs/")}
        named = named_files(mine or theirs) if in_store or RECORD in stored else {}
        if STATE in stored:
            named = self._choose_state(stored, named, in_store) | named
        for file, name in stored.items():
            if file.startswith(("epoch-", "logits-")):
                self._put_weights(name, named.get(file))
        if STATE in stored:
            self._put(stored[STATE], False)
        for name, file in names.items():
            if file.startswith("measure-"):
                self._put(name, self._intact(name))
        for name, file in names.items():  # last, so that a record never names missing weights
            if file == RECORD:
                self._put(name, self._intact(name))
        return None

    def _choose_state(
        self, stored: dict[str, str], named: dict[str, str], trained: bool
    ) -> dict[str, str]:
        """Remove the packed state from ``stored`` unless it is needed and fits to ``named``.

        Returns the checkpoints and logits that the state of this run names from now on.
        """
        name = stored[STATE]
        own, theirs = self._about_own(name), about_tensors(self.pack.read(name))
        weights = named_files(theirs)
        if trained:
            reason, weights = "trained here already", {}
        elif own and _reached(own) >= _reached(theirs):
            reason, weights = "trained as far here", named_files(own)
        elif not weights.keys() <= stored.keys():
            reason, weights = "its checkpoints are not in the pack", {}
        elif any(named.get(file, weights[file]) != weights[file] for file in weights):
            reason, weights = "of another training than the record", {}
        else:
            return weights
        self._skip([stored.pop(STATE)], reason)
        return weights

    def _put_weights(self, name: str, expected: str | None) -> None:
        """Write a checkpoint or logits if the run's record or state names them."""
        theirs = about_tensors(self.pack.read(name)).get("fingerprint")
        there = bool(theirs) and (self._about_own(name) or {}).get("fingerprint") == theirs
        if there or (theirs and theirs == expected):
            self._put(name, there)
        else:
            self._skip([name], "of another training than the run here")

    def _about_own(self, name: str) -> dict | None:
        """What the whole file of tensors in this place says about itself."""
        try:
            return about_tensors(self.pack.targets[name].read_bytes())
        except (OSError, ValueError):
            return None

    # --- rendered results ---------------------------------------------------------------------

    def _results(self, names: list[str]) -> None:
        """Merge one folder of results; where some of it differs, the newer rendering wins."""
        here = {name: self.pack.targets[name] for name in names}
        present = {name: path.read_bytes() for name, path in here.items() if path.exists()}
        differing = [n for n, data in present.items() if sha256(data) != self._hash(n)]
        packed = {name: self.pack.read(name) for name in differing}
        if differing and _written(packed.values()) <= _written(present.values()):
            return self._skip(names, "rendered here, too")
        for name in names:
            self._put(name, name in present and name not in differing)
        return None

    def _hash(self, name: str) -> str:
        return self.pack.files[name]["sha256"]

    def summary(self) -> str:
        """One line: what was merged, what was there, what was skipped and why."""
        merged = summary_of(self.pack.files[name] for name in self.written)
        line = f"Merged {merged}; {count(self.there, 'file')} already there"
        for reason, names in self.skipped.items():
            line += f"; skipped {len(names)}: {reason} ({names[0]}{', …' * (len(names) > 1)})"
        return f"{line}."


def _own_summary(run_id: str) -> tuple[dict | None, bool]:
    """The summary of a run's whole record on this machine, and whether it is in the store."""
    own = files.home() / run_id / RECORD
    for path in files.own_or_committed(own, f"{run_id}.jsonl"):
        try:
            return record_summary(run_id, path.read_bytes()), path == own
        except (OSError, ValueError):
            continue
    return None, False


def _agree(mine: dict, theirs: dict) -> bool:
    """Whether two records are of one training: all weights that both name are the same."""
    first, second = named_files(mine), named_files(theirs)
    same = all(first[file] == second[file] for file in first.keys() & second.keys())
    return same and mine.get("teachers") == theirs.get("teachers")


def _written(contents: Iterable[bytes]) -> str:
    """The latest time that provenances or executed notebooks give; '' without any."""
    times = [""]
    for content in contents:
        try:
            about = json.loads(content)
            papermill = about.get("metadata", {}).get("papermill", {})
            times.append(about.get("written") or papermill.get("end_time") or "")
        except (ValueError, AttributeError):
            continue  # an image, or a table
    return max(times)


def unpack(out: Path) -> str:
    """Check a pack, merge it, and say in a line what was done. Raises StoreError as ``Pack``."""
    pack = Pack(out)
    pack.check()
    merge = Merge(pack)
    merge.everything()
    return merge.summary()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdbook.unpack", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="folder of the pack")
    try:
        print(unpack(parser.parse_args().folder))
    except KdlibError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
