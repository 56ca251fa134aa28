"""Progress of training: a bar for people, plain lines for logs."""

import os
import sys
import time
import warnings
from pathlib import Path

from tqdm import TqdmWarning, tqdm

clock = tqdm.format_interval


class Progress:
    """Counts the epochs of several runs, and shows the speed and the remaining time.

    A bar in a terminal or a notebook, else one line for each finished run. ``$KDLIB_PROGRESS`` =
    bar, lines or quiet overrides this choice. Where ``$KDLIB_LOG`` names a file, one line for each
    epoch is appended to it as well.
    """

    def __init__(self, epochs: int):
        people = "ipykernel" in sys.modules or sys.stderr.isatty()
        self.style = os.environ.get("KDLIB_PROGRESS") or ("bar" if people else "lines")
        self.bar = _bar(epochs, disable=self.style != "bar" or not epochs)
        self.started = time.monotonic()
        self.reached: dict[str, int] = {}  # epochs of each run that are done
        self.log = Path(os.environ["KDLIB_LOG"]) if os.environ.get("KDLIB_LOG") else None

    def begin(self, run, epoch: int) -> None:
        """Note that a run continues after ``epoch`` epochs."""
        if run.id in self.reached:  # some of its epochs were lost
            self.bar.n -= self.reached[run.id] - epoch
        else:
            self.bar.total -= epoch
        self.reached[run.id] = epoch
        self.bar.refresh()

    def epoch(self, run, row: dict, images: int, last: bool) -> None:
        """Note the end of an epoch.

        Args:
            row: of the log.
            images: number of images that the epoch trained on.
            last: whether it is the run's last.
        """
        self.bar.n += 1
        self.reached[run.id] = row["epoch"]
        seconds, ahead = row["seconds"], run.recipe.epochs - row["epoch"]
        speed = f"{clock(seconds * ahead)} left"
        if seconds:
            speed = f"{1 / seconds:.3g} epochs/s · {images / seconds:,.0f} images/s · {speed}"
        passed = time.monotonic() - self.started
        left = passed / self.bar.n * max(0, self.bar.total - self.bar.n)
        line = (
            f"{run} · epoch {row['epoch']}/{run.recipe.epochs} · loss {row['train_loss']:.3f} · "
            f"test {row['test_top1']:.2f} % · {speed} · all runs: {clock(left)} left"
        )
        if self.log:
            with self.log.open("a") as file:
                file.write(line + "\n")
        if self.style == "lines" and last:
            print(line, flush=True)
        self.bar.set_description(str(run), refresh=False)
        self.bar.set_postfix_str(f"test {row['test_top1']:.1f} % · {speed}")

    def skip(self, epochs: int) -> None:
        """Note that so many epochs are not needed."""
        self.bar.total -= epochs
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def _bar(total: int, disable: bool) -> tqdm:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # a notebook without widgets has a text bar
        from tqdm.auto import tqdm as suitable
    return suitable(total=total, unit="epoch", disable=disable)
