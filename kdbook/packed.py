"""The format of a pack: its index and its parts, and what each packed file must hold.

A pack is a folder. The packed files, one after the other, are one stream of bytes; the parts are
pieces of this stream. index.json lists the files in this order and the parts, with sizes and
SHA-256 hashes. It is written last, so a folder without it is no whole pack.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from kdlib import files, store
from kdlib.errors import StoreError
from kdlib.models.architecture import Architecture, file_of

FORMAT, INDEX, PART = 1, "index.json", re.compile(r"part-\d{3,}-[0-9a-f]{8}")


# The files of a pack that belong to the store.
STORED = re.compile(
    r"runs/([0-9a-f]{12}/(record\.jsonl|state\.safetensors|(epoch|logits)-\d{4,}\.safetensors"
    r"|measure-[\w.-]+\.json)|architecture-[0-9a-f]{12}\.json)"
)


def count(number: int, noun: str) -> str:
    """A number and its noun, for a message."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def summary_of(entries: Iterable[Mapping]) -> str:
    """What these entries of an index are: numbers of records, weights, states and other files."""
    entries = [*entries]
    kinds = [(owner(entry["name"]) or ("", ""))[1].partition("-")[0] for entry in entries]
    records, weights, states = map(kinds.count, ("record.jsonl", "epoch", "state.safetensors"))
    others = len(entries) - records - weights - states
    size = sum(entry["size"] for entry in entries)
    return (
        f"{count(records, 'record')}, {count(weights, 'file')} of weights, "
        f"{count(states, 'state')}, {count(others, 'other file')}, {size / 1e6:,.1f} MB"
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_of(name: str, data: bytes) -> dict:
    """The entry of a file or a part in the index."""
    return {"name": name, "size": len(data), "sha256": sha256(data)}


def named_files(naming: Mapping) -> dict[str, str]:
    """The checkpoints and logits that a record's summary or a state names, with fingerprints."""
    return {
        f"{kind}-{int(epoch):04d}.safetensors": fingerprint
        for kind, key in (("epoch", "weights"), ("logits", "logits"))
        for epoch, fingerprint in naming.get(key, {}).items()
    }


def owner(name: str) -> tuple[str, str] | None:
    """The run that a packed file belongs to, and the file's name in the store."""
    if found := re.fullmatch(r"runs/([0-9a-f]{12})/([^/]+)", name):
        return found[1], found[2]
    if found := re.fullmatch(r"results/[^/]+/records/([0-9a-f]{12})\.([^/]+)", name):
        return found[1], "record.jsonl" if found[2] == "jsonl" else found[2]
    return None


def check_content(name: str, data: bytes) -> None:
    """Raise ValueError where a file does not hold what it says that it holds."""
    run_id, kind = owner(name) or ("", name.rpartition("/")[2])
    if kind.endswith(".safetensors"):
        about_tensors(data)
    elif kind == "record.jsonl":
        record_summary(run_id, data)
    elif kind.startswith("measure-"):
        json.loads(data)
    elif kind.startswith("architecture-"):
        try:
            content = json.loads(data)
            found = Architecture(content["base"], tuple(content["kept"].items()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no architecture: {error}") from error
        if file_of(found.name) != kind:
            raise ValueError("its content does not match its name")


def about_tensors(data: bytes) -> dict:
    """What a file of tensors says about itself, when its fingerprint is checked, if it has one."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = json.loads(header["__metadata__"]["about"])
        named_files(said)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no file of tensors: {error}") from error
    if "fingerprint" in said and store.fingerprint(tensors) != said["fingerprint"]:
        raise ValueError("its content does not match its fingerprint")
    if not said.keys() & {"fingerprint", "log"}:
        raise ValueError("it names neither its fingerprint nor its epochs")
    return said


def record_summary(run_id: str, data: bytes) -> dict:
    """The summary of a whole record. Raises ValueError for a damaged one, or of another run."""
    try:
        head, *rows, last = map(json.loads, data.splitlines())
        described = json.dumps([head["engine"], head["run"]], sort_keys=True)
        summary, epochs = last["summary"], head["run"]["recipe"]["epochs"]
        named_files(summary)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no record: {error}") from error
    if sha256(described.encode())[:12] != run_id:
        raise ValueError("it describes another run")
    if len(rows) != math.ceil(summary.get("stopped_after", epochs)):
        raise ValueError("epochs are missing")
    return summary


# --- reading a pack -------------------------------------------------------------------------------


class Pack:
    """A pack in a folder, with its files by name.

    Raises StoreError where the index or a part is missing or damaged, or a name in it leads out of
    the store and the results.
    """

    def __init__(self, out: Path):
        self.out = out
        try:
            index = json.loads((out / INDEX).read_text())
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, but this program reads {FORMAT}")
            self.folder, self.parts = index["folder"], index["parts"]
            self.files = {entry["name"]: entry for entry in index["files"]}
            start = 0
            for entry in self.files.values():
                entry["start"], start = start, start + entry["size"]
            if start != sum(part["size"] for part in self.parts):
                raise ValueError("the parts do not have the size of the files")
            if not all(PART.fullmatch(part["name"]) for part in self.parts):
                raise ValueError("it names other parts than a pack has")
        except FileNotFoundError as error:
            raise StoreError(
                f"There is no {out / INDEX}: the folder holds no pack, or writing it was "
                f"interrupted. Run `python -m kdbook.pack` again, or copy the whole folder."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(out / INDEX, error) from error
        self.targets = {name: self._target(name) for name in self.files}

    def _damaged(self, what: Any, why: Any) -> StoreError:
        return StoreError(
            f"{what} is damaged ({why}). Nothing was unpacked: copy the pack again, or pack again."
        )

    def _target(self, name: str) -> Path:
        """Where a packed file belongs on this machine."""
        path = PurePosixPath(name)
        if STORED.fullmatch(name):
            root = files.home()
        elif (
            path.as_posix() == name
            and path.parts[:2] == ("results", self.folder)
            and self.folder != "published"
            and not any(part.startswith(".") or {*part} & {*"\\:\0"} for part in path.parts)
        ):
            root = files.results()
        else:
            raise self._foreign(name)
        target = root.joinpath(*path.parts[1:])
        if target.is_dir() or not target.resolve().is_relative_to(root):
            raise self._foreign(name)
        return target

    def _foreign(self, name: str) -> StoreError:
        return StoreError(
            f"{self.out / INDEX} names the file {name!r}, which does not belong to the store or to "
            f"the results of its profile. Nothing was unpacked."
        )

    def check(self) -> None:
        """Read all parts and all files, and raise StoreError for the first damaged one."""
        for part in self.parts:
            path = self.out / part["name"]
            if not path.exists():
                raise StoreError(
                    f"{path} is missing. Nothing was unpacked: copy the pack again, or pack again."
                )
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part["sha256"]:
                    raise self._damaged(path, "its hash is another one")
        for name in self.files:
            try:
                check_content(name, self.read(name))
            except ValueError as error:
                raise self._damaged(f"{name} in {self.out}", error) from error

    def read(self, name: str) -> bytes:
        """The content of a file. Raises StoreError where it is damaged."""
        entry, found, start = self.files[name], bytearray(), 0
        end = entry["start"] + entry["size"]
        for part in self.parts:
            first, last = max(entry["start"], start), min(end, start + part["size"])
            if first < last:
                with (self.out / part["name"]).open("rb") as file:
                    file.seek(first - start)
                    found += file.read(last - first)
            start += part["size"]
        if sha256(found) != entry["sha256"]:
            raise self._damaged(f"{name} in {self.out}", "its hash is another one")
        return bytes(found)
