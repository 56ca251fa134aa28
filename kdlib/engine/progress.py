"""Progress: a bar for people, plain lines for logs."""

import os
import sys
import time
from pathlib import Path

from tqdm import TqdmWarning


class Progress:
    """Counts epochs of several runs; tells the speed of each lane and the time left.

    It is told once an epoch, when that epoch's numbers come off the device. A bar in a terminal or
    a notebook; otherwise one plain line per finished run. Where ``$KDLIB_LOG`` names a file, one
    plain line per epoch goes there in every case. ``$KDLIB_PROGRESS`` = bar, lines or quiet
    overrules the choice.
    """

    def __init__(self, epochs: int):
        self.epochs, self.done, self.started = epochs, 0, time.monotonic()
        self.reached: dict[str, int] = {}  # epochs of each run that are not to come
        self.style = os.environ.get("KDLIB_PROGRESS") or _style()
        self.bar = _bar(epochs) if self.style == "bar" and epochs else None
        self.log = Path(os.environ["KDLIB_LOG"]) if os.environ.get("KDLIB_LOG") else None

    def begin(self, run, epoch: int) -> None:
        """Tell that a run goes on after so many epochs, saved before or here."""
        lost = self.reached.get(run.id, 0) - epoch
        if run.id in self.reached:
            self.done -= lost
        else:
            self.epochs += lost
        self.reached[run.id] = epoch
        self._renew()

    def epoch(self, run, row: dict, images: int, last: bool) -> None:
        """Tell that an epoch ended: its row of the log, the images it trained on, whether it is
        the run's last."""
        self.done += 1
        self.reached[run.id] = row["epoch"]
        seconds, ahead = row["seconds"], run.recipe.epochs - row["epoch"]
        speed = "in no time"
        if seconds:
            speed = f"{1 / seconds:.3g} epochs/s · {images / seconds:,.0f} images/s"
        speed += f" · {_clock(seconds * ahead)} left"
        line = (
            f"{run} · epoch {row['epoch']}/{run.recipe.epochs} · loss {row['train_loss']:.3f} · "
            f"test {row['test_top1']:.2f} % · {speed} · all runs: {self._left()} left"
        )
        if self.log:
            with self.log.open("a") as file:
                file.write(line + "\n")
        if self.bar is not None:
            self.bar.set_description(str(run), refresh=False)
            self.bar.set_postfix_str(f"test {row['test_top1']:.1f} % · {speed}", refresh=False)
            self._renew()
            self.bar.refresh()
        elif self.style == "lines" and last:
            print(line, flush=True)

    def skip(self, epochs: int) -> None:
        """Tell that so many epochs are not needed."""
        self.epochs -= epochs
        self._renew()

    def _renew(self) -> None:
        if self.bar is not None:
            self.bar.n, self.bar.total = self.done, self.epochs

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
