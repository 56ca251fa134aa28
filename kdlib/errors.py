"""Errors: each message says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class KdlibError(Exception):
    """Base of every error that kdlib raises on purpose."""


class UnknownName(KdlibError, ValueError):
    """A name that does not exist; the message gives the closest names that do."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]):
        valid = sorted(valid)
        close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(valid)}."
        super().__init__(f"There is no {kind} {name!r}. {hint}")


class DataError(KdlibError, OSError):
    """A data set that is missing or damaged."""


class StoreError(KdlibError, OSError):
    """A run, record or result that cannot be read or written."""


class NothingFound(KdlibError, ValueError):
    """A chain of runs that ended without a result."""


class NotFinite(KdlibError, ArithmeticError):
    """A loss that is infinite or not a number."""


class OutOfTime(KdlibError):
    """Training stopped at its deadline; all that was trained is saved."""
