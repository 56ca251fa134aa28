"""The project's folders, and writing files so that nothing half-written is read as complete."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from kdlib.errors import StoreError

_CHECKOUT = Path(__file__).resolve().parent.parent
# Folders lie in the checkout; where kdlib is installed without one, in the current folder.
ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").exists() else Path.cwd()


def home() -> Path:
    """The store of runs and caches: ``$KDLIB_HOME``, else ``runs/`` in the project."""
    return Path(os.environ.get("KDLIB_HOME") or ROOT / "runs").resolve()


def data_root() -> Path:
    """Downloaded data sets: ``$KDLIB_DATA``, else ``data/`` in the project."""
    return Path(os.environ.get("KDLIB_DATA") or ROOT / "data").resolve()


def results() -> Path:
    """Published values and our results: ``$KDLIB_RESULTS``, else ``results/`` in the project."""
    return Path(os.environ.get("KDLIB_RESULTS") or ROOT / "results").resolve()


def own_or_committed(own: Path, name: str) -> Iterator[Path]:
    """Where a file may be: in the store, then among the committed records of every profile."""
    yield own
    yield from sorted(results().glob(f"*/records/{name}"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write; on leaving, it is synced and takes the place of ``path``.

    Raises:
        StoreError: the folder cannot be written or the disk is full. The old content of ``path``
            is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:  # safetensors reports a full disk by its own error
        forbidden = getattr(error, "errno", None) not in (None, errno.ENOSPC, errno.EDQUOT)
        advice = "make the folder writable" if forbidden else "free some space there"
        raise StoreError(
            f"Cannot write {path}: {getattr(error, 'strerror', None) or error}. The old content is "
            f"not lost: {advice}, or name another folder with KDLIB_HOME (runs) or KDLIB_RESULTS "
            f"(results)."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing. Raises as ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
