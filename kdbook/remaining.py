"""What is left to train of the runs that notebooks declare. Nothing is trained here."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kdbook.profile import Profile
from kdlib import files, store
from kdlib.engine.graph import ancestry, incomplete, is_complete
from kdlib.engine.train import RunChain
from kdlib.errors import DataError, NothingFound, StoreError
from kdlib.runs import Run

# Answers of ``is_complete``, shared by many calls. They are valid until a run is trained.
Known = dict[tuple, bool]


@dataclass(frozen=True)
class Followed:
    """How far the runs and chains of a notebook have come.

    Attributes:
        runs: all runs that are known now, with their ancestors: parents first, each once. Each
            keeps all that any declaration asks for.
        unfinished: the incomplete ones among them, parents first.
        awaited: runs whose weights or logits an unfinished chain may still read.
        possible: runs that the chains may have trained besides, such as those of a calibration.
    """

    runs: list[Run]
    unfinished: list[Run]
    awaited: list[Run]
    possible: list[Run]


def unfinished(items: Iterable[Run | RunChain], known: Known | None = None) -> list[Run]:
    """The incomplete runs of these items, with their incomplete ancestors, parents first.

    An empty list means that an exhibit with these items can be rendered. Of a chain only the next
    run is known. Raises as ``follow``.
    """
    return follow(items, known).unfinished


def follow(
    items: Iterable[Run | RunChain], known: Known | None = None, weights: bool = False
) -> Followed:
    """Follow every chain as far as the store and the records allow.

    Runs of which only a record exists are incomplete if ``weights`` are needed.

    A chain may measure a trained run to choose the next one; the measurement is kept. A chain that
    lacks weights waits for the runs that it needs. A chain that found nothing is over.
    """
    known = {} if known is None else known
    passed: list[Run] = []
    last: list[Run] = []
    needed: list[Run] = []
    awaited: list[Run] = []
    retrained: list[Run] = []
    possible: list[Run] = []
    for item in items:
        if isinstance(item, Run):
            passed.append(item)
            last.append(item)
            continue
        runs, waits, lacks_weights = _follow_chain(item, known)
        passed += runs
        last += runs[-1:]
        needed += waits
        retrained += waits if lacks_weights else []
        estimated = item.estimate()
        possible += estimated
        if waits:
            awaited += [*waits, *(parent for run in estimated for parent, _ in run.parents)]
    missing = {run.id: run for run in incomplete(last, weights, known)}
    if retrained:  # reading a damaged file has renamed it: older answers may be wrong
        missing |= {run.id: run for run in incomplete(retrained, True, {})}
    everything = ancestry([*passed, *needed])
    return Followed(
        everything,
        [missing[run.id] for run in everything if run.id in missing],
        awaited,
        ancestry(possible),
    )


def _follow_chain(chain: RunChain, known: Known) -> tuple[list[Run], list[Run], bool]:
    """The known runs of a chain, the runs that it waits for, and whether it lacks their weights."""
    runs: list[Run] = []
    try:
        run = chain.next_run(None)
        while run is not None:
            runs.append(run)
            if not is_complete(run, False, known):
                return runs, [run, *chain.needs(run)], False
            run = chain.next_run(store.find_record(run))
    except NothingFound:
        pass
    except (StoreError, DataError):
        return runs, [runs[-1], *chain.needs(runs[-1])], True
    return runs, [], False


# --- epochs ---------------------------------------------------------------------------------------


def read_about(path: Path) -> dict | None:
    """What a file of tensors says about itself, read from its header; None without a whole one."""
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["about"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def epochs_left(run: Run) -> int:
    """Epochs that an unfinished run still needs, given its resume state in the store."""
    return run.recipe.epochs - len((read_about(store.state_path(run)) or {}).get("log", ()))


# --- rendered exhibits ----------------------------------------------------------------------------


def is_rendered(exhibit: str, profile: Profile, followed: Followed) -> bool:
    """Whether the results hold this exhibit, made of exactly the runs that its notebook declares.

    The provenance beside the files names the runs. Runs of ``possible`` may be among them.
    """
    named: set[str] = set()
    provenances = [*(files.results() / profile.folder / exhibit).glob("*.json")]
    for path in provenances:
        try:
            about = json.loads(path.read_text())
            named.update(about["runs"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not (path.parent / about["file"]).exists():
            return False
    expected = {run.id for run in followed.runs}
    possible = {run.id for run in followed.possible}
    return bool(provenances) and expected <= named <= expected | possible
