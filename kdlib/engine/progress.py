"""Progress: a bar for people, plain lines for logs."""

import os
import sys
import time
from pathlib import Path

from tqdm import TqdmWarning


class Progress:
    """Counts epochs of several runs and estimates the time left.

    A bar in a terminal or a notebook; otherwise one plain line per finished run. Where
    ``$KDLIB_LOG`` names a file, one plain line per epoch goes there in every case.
    ``$KDLIB_PROGRESS`` = bar, lines or quiet overrules the choice.
    """

    def __init__(self, epochs: int):
        self.epochs, self.done, self.started = epochs, 0, time.monotonic()
        self.style = os.environ.get("KDLIB_PROGRESS") or _style()
        self.bar = _bar(epochs) if self.style == "bar" and epochs else None
        self.log = Path(os.environ["KDLIB_LOG"]) if os.environ.get("KDLIB_LOG") else None

    def epoch(self, run, row: dict, images: int, last: bool) -> None:
        """Tell that an epoch ended: its row of the log, the images it trained on, whether it is
        the run's last."""
        self.done += 1
        speed = f"{images / row['seconds']:,.0f} images/s" if row["seconds"] else "in no time"
        ahead = run.recipe.epochs - row["epoch"]
        line = (
            f"{run} · epoch {row['epoch']}/{run.recipe.epochs} · "
            f"loss {row['train_loss']:.3f} · test {row['test_top1']:.2f} % · {speed} · "
            f"{_clock(row['seconds'] * ahead)} left · all runs: {self._left()} left"
        )
        if self.log:
            with self.log.open("a") as file:
                file.write(line + "\n")
        if self.bar is not None:
            self.bar.set_description(str(run), refresh=False)
            told = f"test {row['test_top1']:.1f} %, {speed}"
            self.bar.set_postfix_str(told, refresh=False)
            self.bar.update()
        elif self.style == "lines" and last:
            print(line, flush=True)

    def skip(self, epochs: int) -> None:
        """Tell that so many epochs are not needed."""
        self.epochs -= epochs
        if self.bar is not None:
            self.bar.total = self.epochs

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _left(self) -> str:
        passed = time.monotonic() - self.started
        return _clock(passed / self.done * (self.epochs - self.done))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _style() -> str:
    notebook = "ipykernel" in sys.modules
    return "bar" if notebook or sys.stderr.isatty() else "lines"


def _bar(total: int):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)  # a notebook without widgets gets a text bar
        from tqdm.auto import tqdm
    return tqdm(total=total, unit="epoch")
