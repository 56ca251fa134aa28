"""A reader's choices for a profile: an environment variable, and data sets as text."""

import os


def keep_route() -> int:
    """``$KDLIB_KEEP_ROUTE``, which ``./run_all.sh --keep-route`` sets."""
    text = os.environ.get("KDLIB_KEEP_ROUTE") or "1"
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"KDLIB_KEEP_ROUTE is {text!r}. Set it to a number of epochs, 1 or more.")
    return int(text)


def replaced_data(text: str) -> dict[str, str]:
    """The data sets of ``NAME=DATA,NAME=DATA``, by the names that they replace."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(paper and own for paper, _, own in pairs):
        raise ValueError(
            f"{text!r} is no choice of data sets. Write NAME=DATA, such as cifar100=folder:PATH."
        )
    return {paper: own for paper, _, own in pairs}
