"""Files are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from kdlib import files
from kdlib.errors import StoreError


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["write", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    if where == "replace":
        monkeypatch.setattr(os, "replace", no_space)
    else:
        write = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda p, b: (write(p, b[:1]), no_space()))
    with pytest.raises(StoreError, match=f"Cannot write {path}: No space left.*free some space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, "old")

    def interrupt():
        with files.replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
