"""RunFiles: the files of one run in training. They are written while training goes on."""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from torch import Tensor, nn

from kdlib import store
from kdlib.engine.teachers import Teachers
from kdlib.engine.writer import Writer, on_host
from kdlib.errors import StoreError
from kdlib.runs import Run


class RunFiles:
    """Weights and logits that the run keeps, its saved state, and its record.

    Attributes:
        weights, logits: fingerprints by epoch; the writer fills them in.
        machines: the environments in which the run was trained before, each once.
    """

    def __init__(self, run: Run, writer: Writer):
        self.run, self.writer = run, writer
        self.weights: dict[str, str] = {}
        self.logits: dict[str, str] = {}
        self.machines: list[dict] = []
        self.state_path = store.state_path(run)
        self._saved, self._cost = time.perf_counter(), 0.0
        self._last: Future | None = None

    # --- what the run keeps -----------------------------------------------------------------------

    def keep_weights(self, epochs: Iterable[int], modules: nn.ModuleDict) -> None:
        """Save the present weights under these epochs."""
        if epochs := [*epochs]:
            state = on_host(modules.state_dict())
            for epoch in epochs:
                self._keep(self.weights, epoch, store.save_modules, state)

    def keep_logits(self, epoch: int, logits: Tensor) -> None:
        """Save the logits of the validation images."""
        self._keep(self.logits, epoch, store.save_logits, logits.half().cpu())

    def _keep(self, fingerprints: dict[str, str], epoch: int, save: Callable, content) -> None:
        def work() -> None:
            fingerprints[str(epoch)] = save(self.run, epoch, content)

        self._last = self.writer.write(work)

    def wait(self) -> None:
        """Wait until all files of this run are written, since work is done in order."""
        if self._last:
            self._last.result()

    def write_record(self, rows: list[dict], summary: dict, environment: dict) -> None:
        """Write the record of a finished run, and remove its saved state."""
        self.wait()
        *earlier, now = self._with(environment)
        summary |= {"weights": self.weights}
        summary |= {"logits": self.logits} if self.run.save_logits else {}
        summary |= {"environment": now}
        summary |= {"earlier_environments": earlier} if earlier else {}
        store.write_record(self.run, rows, summary)
        self.state_path.unlink(missing_ok=True)

    def _with(self, environment: dict) -> list[dict]:
        """The environments of all machines that trained the run; the present one is the last."""

        def machine(about: dict) -> dict:
            return about | {"peak_memory_mb": None}

        others = [e for e in self.machines if machine(e) != machine(environment)]
        return [*others, environment]

    # --- the saved state --------------------------------------------------------------------------

    def may_save(self) -> bool:
        """Whether saving has taken so little time until now that a state may be saved again."""
        return self.writer.may_save(time.perf_counter() - self._saved, self._cost)

    def save_state(self, tensors: dict[str, Tensor], about: dict, environment: dict) -> None:
        """Save all that is needed to continue, in one file, so that a crash cannot separate it.

        Args:
            tensors: weights, momentum and meters.
            about: what else is needed, as plain JSON.
        """
        self._saved = started = time.perf_counter()
        self._cost = math.inf  # one at a time
        tensors = on_host(tensors)
        # The writer fills in these fingerprints before it comes to this work.
        about |= {"weights": self.weights, "logits": self.logits}
        about |= {"machines": self._with(environment)}

        def work() -> None:
            store.save_tensors(self.state_path, tensors, about)
            self._cost = time.perf_counter() - started

        self._last = self.writer.write(work)

    def load_state(self, teachers: Teachers) -> tuple[dict[str, Tensor], dict] | None:
        """The saved tensors and ``about``; None where there is no whole state that fits.

        A state does not fit if a teacher has other weights now, or if the run is asked to keep
        weights or logits that it did not keep. A damaged state is named in a warning.
        """
        try:
            tensors, about = store.load_tensors(self.state_path)
        except StoreError as error:
            if self.state_path.exists():
                self.warn_of_restart(error)
            return None
        if teachers.changed_since(about["teachers"]):
            return None
        epochs = len(about["log"])
        passed = {str(epoch) for epoch in self.run.keep if epoch <= epochs}
        if not passed <= about["weights"].keys():
            return None
        if self.run.save_logits and len(about["logits"]) < epochs:
            return None
        return tensors, about

    def continue_from(self, about: dict) -> None:
        """Take over the fingerprints and machines of a saved state."""
        self.weights, self.logits = about["weights"], about["logits"]
        # States of earlier versions do not name their machine.
        self.machines = about.get("machines", [])

    def warn_of_restart(self, error: Exception) -> None:
        warnings.warn(
            f"{self.state_path}: {error} {self.run} starts from the beginning.", stacklevel=4
        )
