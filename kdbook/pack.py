"""Write what the next machine needs to go on: records, needed weights, resume states, results.

python -m kdbook.pack FOLDER [--profile PROFILE] [--only EXHIBITS] [--data NAME=DATA] [--parts SIZE]

``python -m kdbook.unpack FOLDER`` merges the pack into another store.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from kdbook.cli.declared import declared_runs
from kdbook.cli.notebooks import Notebook
from kdbook.cli.options import chosen, replacement
from kdbook.packed import (
    FORMAT,
    INDEX,
    PART,
    check_content,
    count,
    entry_of,
    named_files,
    summary_of,
)
from kdbook.profiles import PROFILES, Profile, open_profile
from kdbook.remaining import Known, follow, is_rendered, read_about
from kdlib import files, store
from kdlib.engine.train import RunChain
from kdlib.errors import KdlibError, StoreError
from kdlib.models.architecture import MARK, file_of
from kdlib.runs import Run

LEAST_PART = 10_000  # bytes; the index of a pack must fit into a part
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
# Code of a notebook that reads weights contains one of these.
READS_WEIGHTS = re.compile(r"\bmeasure\(|\bchains\.|\.model\(|weights=True")


# --- what goes in ---------------------------------------------------------------------------------


@dataclass
class Contents:
    """The files of a pack.

    Attributes:
        paths: where they are on this machine, by their names in the pack.
        runs, unfinished: numbers of runs, with all ancestors.
        left_out: weights, logits and states in the store that nothing asks for any more.
        damaged: files that are needed, but cannot be packed.
        busy: runs that another process trains now; their states are not packed.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    runs: int = 0
    unfinished: int = 0
    left_out: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    busy: list[Run] = field(default_factory=list)


def collect(
    profile: Profile,
    declared: Mapping[str, list[Run | RunChain]],
    measured: Iterable[str],
    locks: ExitStack,
) -> Contents:
    """What the next machine needs to finish these exhibits.

    The record of a run whose weights are not needed any more goes to the results: in the store a
    record without weights counts as incomplete.

    Args:
        declared: by exhibit, what its notebook trains.
        measured: the exhibits whose notebooks read weights.
        locks: holds the locks of the runs whose states are packed.
    """
    known: Known = {}
    followed = {exhibit: follow(items, known) for exhibit, items in declared.items()}
    every = follow([item for items in declared.values() for item in items], known)
    kept = {run.id for run in [*every.unfinished, *every.awaited]}
    kept |= {parent.id for run in every.unfinished for parent, _ in run.parents}
    for exhibit in measured:
        if not is_rendered(exhibit, profile, followed[exhibit]):
            kept |= {run.id for run in followed[exhibit].runs}
    contents = Contents(runs=len(every.runs), unfinished=len(every.unfinished))
    results = files.results() / profile.folder
    for path in results.rglob("*"):
        name = path.relative_to(files.results()).as_posix()
        if path.is_file() and "/." not in name:
            contents.paths[f"results/{name}"] = path
    for run in {run.id: run for run in [*every.possible, *every.runs]}.values():
        _add_record(contents, run, run.id in kept, f"results/{profile.folder}/records")
    for run in every.unfinished:
        _add_state(contents, run, locks)
    packed = {*contents.paths.values()}
    for run in every.runs:
        contents.left_out += {*store.folder(run).glob("*.safetensors")} - packed
    return contents


def _add_record(contents: Contents, run: Run, kept: bool, records: str) -> None:
    """Add a run's record, measurements and architecture, and its weights if they are ``kept``."""
    own, trained = store.folder(run), store.find_record(run)
    if MARK in run.model and (path := files.home() / file_of(run.model)).exists():
        contents.paths[f"runs/{path.name}"] = path
    if trained is None:
        return
    for path in files.results().glob(f"*/records/{run.id}.*"):
        contents.paths.setdefault(f"{records}/{path.name}", path)
    in_store = trained.in_store and kept
    before = f"runs/{run.id}/" if in_store else f"{records}/{run.id}."
    contents.paths |= {f"{before}{path.name}": path for path in own.glob("measure-*.json")}
    if trained.in_store:
        contents.paths[f"{before}{'record.' * in_store}jsonl"] = own / "record.jsonl"
    if in_store:
        _add_named(contents, run, trained.summary)


def _add_state(contents: Contents, run: Run, locks: ExitStack) -> None:
    """Add the resume state of an unfinished run, and the checkpoints that it names."""
    if not store.state_path(run).exists():
        return
    try:
        locks.enter_context(store.lock(run))
    except Timeout:
        contents.busy.append(run)
        return
    if state := read_about(store.state_path(run)):
        contents.paths[f"runs/{run.id}/state.safetensors"] = store.state_path(run)
        _add_named(contents, run, state)
    else:
        contents.damaged.append(store.state_path(run))


def _add_named(contents: Contents, run: Run, naming: Mapping) -> None:
    for name, fingerprint in named_files(naming).items():
        path = store.folder(run) / name
        if (read_about(path) or {}).get("fingerprint") == fingerprint:
            contents.paths[f"runs/{run.id}/{name}"] = path


# --- writing --------------------------------------------------------------------------------------


def write(out: Path, folder: str, contents: Contents, size: int) -> dict:
    """Write a pack with parts of at most ``size`` bytes, and return its index.

    An older pack in ``out`` stays whole until the new index takes the place of the old one.

    Args:
        folder: the profile's folder of results.

    Raises StoreError where a file cannot be read or written, ValueError where the index alone is
    larger than a part.
    """
    index = {"format": FORMAT, "folder": folder, "parts": [], "files": []}
    for number, part in enumerate(_cut(_stream(contents, index["files"]), size)):
        entry = entry_of(f"part-{number:03d}", part)
        entry["name"] += f"-{entry['sha256'][:8]}"  # so no part takes the place of an older one
        files.write_atomic(out / entry["name"], part)
        index["parts"].append(entry)
    text = json.dumps(index, indent=1)
    if len(text) > size:
        raise ValueError(f"{INDEX} alone has {len(text)} bytes: give --parts at least this size.")
    files.write_atomic(out / INDEX, text)
    names = {part["name"] for part in index["parts"]}
    for path in out.iterdir():
        if PART.fullmatch(path.name) and path.name not in names:
            path.unlink()
    return index


def _stream(contents: Contents, listed: list[dict]) -> Iterator[bytes]:
    """The content of every file that is not damaged; ``listed`` gets an entry for each."""
    for name, path in sorted(contents.paths.items()):
        try:
            data = path.read_bytes()
            check_content(name, data)
        except OSError as error:
            raise StoreError(f"Cannot read {path}: {error.strerror}. Pack again.") from error
        except ValueError:
            contents.damaged.append(path)
            continue
        listed.append(entry_of(name, data))
        yield data


def _cut(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The stream of all chunks in pieces of ``size`` bytes; the last one may be shorter."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


# --- the program ----------------------------------------------------------------------------------


def pack(
    out: Path,
    profile: Profile,
    declared: Mapping[str, list[Run | RunChain]],
    measured: Iterable[str],
    size: int,
) -> str:
    """Pack these exhibits, as ``collect`` and ``write`` do, and say in a line what was packed.

    Raises StoreError as ``write``, and where there is nothing to pack.
    """
    with ExitStack() as locks:
        contents = collect(profile, declared, measured, locks)
        if not (contents.paths or contents.busy or contents.damaged):
            raise StoreError(
                f"There is nothing to pack: {files.home()} has no run of these exhibits, and "
                f"{files.results() / profile.folder} has no results. Are profile, exhibits, data "
                f"and KDLIB_HOME those of the training?"
            )
        index = write(out, profile.folder, contents, size)
    left_out = sum(path.stat().st_size for path in contents.left_out)
    line = (
        f"Packed {count(contents.runs, 'run')}, {contents.unfinished:,} unfinished, into {out}: "
        f"{summary_of(index['files'])} in {count(len(index['parts']), 'part')}. "
        f"Left out: {count(len(contents.left_out), 'file')} of weights that nothing asks "
        f"for now, {left_out / 1e6:,.1f} MB"
    )
    if contents.damaged:
        line += f"; damaged files: {len(contents.damaged):,} (such as {contents.damaged[0]})"
    if contents.busy:
        line += f"; states of runs in training now: {len(contents.busy):,}"
    return f"{line}."


def reads_weights(notebook: Notebook) -> bool:
    """Whether a notebook measures weights, so that records alone cannot render it."""
    cells = json.loads(notebook.path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return any(READS_WEIGHTS.search(source) for source in code)


def size_of(text: str) -> int:
    """Bytes, of a text such as 15M or 1.5G; K, M and G are thousands, millions and billions."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    if not found or (size := int(float(found[1]) * UNITS[found[2]])) < LEAST_PART:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size. Write a size such as 15M or 1G, at least 10K."
        )
    return size


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdbook.pack", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="folder of the pack")
    parser.add_argument("--profile", default="smoke", help=", ".join(PROFILES))
    parser.add_argument("--only", help="exhibits or chapters, separated by commas (default: all)")
    parser.add_argument(
        "--data", action="append", type=replacement, default=[], metavar="NAME=DATA"
    )
    parser.add_argument(
        "--parts",
        type=size_of,
        default="100M",
        help="largest size of a file, such as 15M or 1G (default: 100M)",
    )
    arguments = parser.parse_args()
    try:
        data, notebooks = dict(arguments.data), chosen(arguments.only)
        profile = open_profile(arguments.profile, data=data)
        parameters = {"profile_name": arguments.profile, "data": data or None}
        declared = {n.exhibit: declared_runs(n, **parameters) for n in notebooks}
        measured = [n.exhibit for n in notebooks if reads_weights(n)]
        print(pack(arguments.folder, profile, declared, measured, arguments.parts))
    except (KdlibError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
