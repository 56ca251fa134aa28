"""Functions that the tests of packs use."""

import json

from kdbook.pack import pack
from kdbook.packed import INDEX
from kdbook.profiles import open_profile
from kdlib.files import home, results

SMOKE = open_profile("smoke")
NAME = "kr/table1"


def pack_runs(out, items, measured=(), size=10**8):
    return pack(out, SMOKE, {NAME: items}, measured, size)


def packed_names(out):
    return {entry["name"] for entry in json.loads((out / INDEX).read_text())["files"]}


def weights_in(out):
    return {name for name in packed_names(out) if name.endswith(".safetensors")}


def contents_of(folder):
    """The files below a folder, by name; locks are empty files."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def here():
    return contents_of(home()) | contents_of(results())
