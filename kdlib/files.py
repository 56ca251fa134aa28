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
        StoreError: the folder cannot be written or the disk is full; what stood at ``path`` before
            still stands there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # its word for what the system refuses
        raise StoreError(
            f"Cannot write {path}: {error}. Nothing that stood there is lost: free some space "
            f"there, or name another folder with KDLIB_HOME (runs) or KDLIB_RESULTS (results)."
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space there" if full else "make the folder writable"
        raise StoreError(
            f"Cannot write {path}: {error.strerror or error}. Nothing that stood there is lost: "
            f"{advice}, or name another folder with KDLIB_HOME (runs) or KDLIB_RESULTS (results)."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing. Raises as ``replacing``."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
