"""run_all --verify: train committed runs again and say whether every bit is equal."""

import argparse
import sys
import time
from collections.abc import Mapping
from random import Random, SystemRandom

from kdbook.cli import STARTED
from kdbook.cli.notebooks import all_notebooks
from kdbook.packed import count
from kdbook.recorded import Recorded, Records
from kdbook.verify import Comparison, check_data, fresh_store, retrain
from kdlib.engine.deadline import Deadline
from kdlib.errors import KdlibError, OutOfTime
from kdlib.runs import Run

ALL = "all"
# The exit status. 2 is that of wrong arguments, too.
EQUAL, DIFFERENT, NOT_VERIFIED, ON_ANOTHER_MACHINE = 0, 1, 2, 3


def run_verify(arguments: argparse.Namespace) -> int:
    """Verify some committed runs; the exit status of the program.

    Raises KdlibError where a name is unknown, a record is damaged or a data set is missing.
    """
    seconds = 60 * arguments.minutes - (time.monotonic() - STARTED) if arguments.minutes else None
    deadline = Deadline(seconds) if seconds else Deadline()
    seed = SystemRandom().randrange(10_000) if arguments.seed is None else arguments.seed
    records = Records(arguments.profile_name)
    chosen = choose(records, arguments.verify, Random(seed), bool(arguments.minutes))
    where = ", ".join(str(folder) for folder in records.folders)
    print(
        f"{count(len(records.by_id), 'recorded run')} in {where}. The choice is random; "
        f"--seed {seed} makes it again.",
        flush=True,
    )
    if arguments.dry_run:
        for record in chosen:
            print(f"would train {title(record.run, records)}: {cost(record, records, ())}")
        return EQUAL
    verification = Verification(records, arguments.data, deadline, limited=bool(arguments.minutes))
    with fresh_store(chosen):
        verification.of_all(chosen)
    return verification.conclude(len(chosen))


def choose(records: Records, names: list[str], random: Random, many: bool) -> list[Recorded]:
    """The records to verify.

    Args:
        names: exhibits, or ids of runs. Without any, every record may be chosen.
        many: choose all, in random order, instead of a short run for each name. The name ``all``
            does the same.

    Raises the errors of ``Records.of``.
    """
    many, names = many or ALL in names, [name for name in names if name != ALL]
    exhibits = [n.exhibit for n in all_notebooks()]
    pools = [records.of(name, exhibits) for name in names] or [[*records.by_id.values()]]
    if many:
        return records.shuffled((record for pool in pools for record in pool), random)
    found = [records.a_short_one(pool, random) for pool in pools]
    return [*{record.run.id: record for record in found}.values()]


class Verification:
    """Trains chosen runs again and prints what came out.

    Attributes:
        found: a comparison for each run that was trained again, ancestors too, by id.
        complete, late, failed: numbers of chosen runs that were trained again, for which there was
            no time, and that could not be trained.
    """

    def __init__(
        self, records: Records, data: Mapping[str, str], deadline: Deadline, limited: bool
    ):
        self.records, self.data, self.deadline, self.limited = records, data, deadline, limited
        self.found: dict[str, Comparison] = {}
        self.complete = self.late = self.failed = 0
        self._recorded = self._spent = 0.0  # seconds of the complete ones, when recorded and now

    def of_all(self, chosen: list[Recorded]) -> None:
        """Verify these runs, as far as there is time; the first one is begun in any case."""
        for record in chosen:
            expected = record.seconds(self.records.by_id, self.found)
            pace = self._spent / self._recorded if self._recorded else 1.0
            if self.limited and record is not chosen[0] and expected * pace > self.deadline.left:
                self.late += 1
                continue
            words = cost(record, self.records, self.found)
            print(f"\n{title(record.run, self.records)}: {words}", flush=True)
            started = time.monotonic()
            try:
                self._verify(record)
            except OutOfTime:
                self.late += 1
            except KdlibError as error:
                self.failed += 1
                print(f"    {error}", file=sys.stderr, flush=True)
            else:
                self.complete += 1
                self._recorded += expected
                self._spent += time.monotonic() - started

    def _verify(self, record: Recorded) -> None:
        check_data(record, self.data)
        for comparison in retrain(record, self.records.by_id, self.deadline):
            if comparison.run.id not in self.found:
                self.found[comparison.run.id] = comparison
                print(report(comparison, record.run), flush=True)

    def conclude(self, asked: int) -> int:
        """Print the result of all; the exit status."""
        compared = [c for c in self.found.values() if c.recorded]
        different = [c for c in compared if not c.equal]
        wrong = [c for c in different if c.alike]
        if self.late:
            print(f"\nThere was no time for {self.late} of {asked} chosen runs.")
        if self.failed:
            print(f"\n{self.failed} of {asked} chosen runs could not be trained.", file=sys.stderr)
        equal = len(compared) - len(different)
        runs = count(len(compared), "recorded run")
        print(f"\nTrained again: {runs}, {equal} equal in every bit.")
        if logs := sum(c.weights is None for c in compared):
            print(f"Of {logs} of them only the log was compared.")
        if wrong:
            print(
                f"{len(wrong)} differ on a machine with the same description: the record or the "
                f"code was changed, or the processor has other instructions than the recorded one."
            )
            return DIFFERENT
        if self.failed or not self.complete:
            return NOT_VERIFIED
        if different:
            print(
                f"{len(different)} differ where that is expected: this machine has another "
                f"description than the one that trained the run or an ancestor, or it is a GPU. "
                f"Rounding depends on the device, the threads, the precision and the version of "
                f"torch. The difference is no error, and no proof either."
            )
            return ON_ANOTHER_MACHINE
        return EQUAL


# --- text -----------------------------------------------------------------------------------------


def title(run: Run, records: Records) -> str:
    exhibits = ", ".join(records.exhibits_of(run))
    return f"{exhibits}{' · ' * bool(exhibits)}{run}"


def cost(record: Recorded, records: Records, done: Mapping[str, Comparison]) -> str:
    """What is trained for a run, and how long that took when it was recorded."""
    left = [run for run in record.ancestry if run.id not in done]
    ancestors = len(left) - 1
    teachers = f" with {count(ancestors, 'ancestor')}" if ancestors > 0 else ""
    epochs = sum(run.recipe.epochs for run in left)
    seconds = record.seconds(records.by_id, done)
    return f"{count(epochs, 'epoch')}{teachers}, {seconds:,.0f} s when recorded"


def report(comparison: Comparison, chosen: Run) -> str:
    """Some lines: both machines, and what is equal or how far apart."""
    trained, recorded = comparison.trained, comparison.recorded
    lines = [] if comparison.run.id == chosen.id else [f"  ancestor {comparison.run}"]
    here = machine(trained.summary["environment"])
    if recorded is None:
        last = trained.summary["weights"][str(trained.run.recipe.epochs)]
        lines.append(f"    no committed record; its last weights here: {last}")
        return "\n".join(lines)
    then = machine(recorded.environment)
    both = then == here
    lines += [f"    both: {here}"] if both else [f"    recorded: {then}", f"    here:     {here}"]
    rows, names = recorded.rows, [n for n in recorded.rows[0] if n != "seconds"]
    weights = [*map(int, recorded.summary["weights"])]
    if comparison.since is None:
        size = f"{count(len(rows), 'epoch')} of {count(len(names), 'column')}"
        lines.append(f"    the log is equal in every bit: {size}")
    else:
        apart = ", ".join(f"{n} by {d:.2g}" for n, d in comparison.columns.items())
        since = f"since epoch {comparison.since} of {len(rows)}"
        lines.append(f"    DIFFERENT log {since}, at most {apart}")
        top1 = [r.rows[-1].get("test_top1", float("nan")) for r in (recorded, trained)]
        lines.append(f"    last test accuracy: {top1[0]:.2f} % recorded, {top1[1]:.2f} % here")
    if comparison.weights is None:
        lines.append(
            "    the weights were not compared: an earlier version of kdlib recorded their hash, "
            "with the loss curve in it"
        )
    elif same := [epoch for epoch in weights if epoch not in comparison.weights]:
        lines.append(f"    the weights after epoch {listed(same)} are equal in every bit")
    if comparison.weights:
        lines.append(f"    DIFFERENT weights after epoch {listed(comparison.weights)}")
    if comparison.others:
        lines.append(f"    DIFFERENT in the summary: {', '.join(comparison.others)}")
    return "\n".join(lines)


def listed(epochs: list[int] | tuple[int, ...]) -> str:
    """Some epochs, the first and the last of many."""
    few = [*map(str, epochs)]
    return ", ".join(few) if len(few) < 5 else f"{few[0]}, …, {few[-1]} ({len(few)} of them)"


def machine(environment: Mapping) -> str:
    """The device, the threads, the precision and the versions of a record, in words."""
    parts = [
        environment["device"],
        environment.get("instructions"),
        count(environment["threads"], "thread"),
        environment["precision"],
        (labels := environment.get("label_precision")) and f"labels in {labels}",
        "compiled" if environment.get("compiled") else None,
        f"torch {environment['torch']}",
        f"Python {environment['python']}",
    ]
    return ", ".join(filter(None, parts))
