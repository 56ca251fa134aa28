"""Files are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from kdlib import files
from kdlib.errors import StoreError


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("fails", ["write", "replace", "interrupt"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path, write = tmp_path / "file", Path.write_bytes
    files.write_atomic(path, "old")
    stop = interrupt if fails == "interrupt" else no_space
    if fails == "replace":
        monkeypatch.setattr(os, "replace", stop)
    else:
        monkeypatch.setattr(Path, "write_bytes", lambda p, b: (write(p, b[:1]), stop()))
    message = None if fails == "interrupt" else f"Cannot write {path}: No space left.*free some"
    with pytest.raises(StoreError if message else KeyboardInterrupt, match=message):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
