"""Trainer: trains one student. Everything that a step reads stays at a fixed address."""

import math
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from kdlib import store
from kdlib.data import Images
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.device import environment, worth_compiling
from kdlib.engine.epoch_data import EpochData
from kdlib.engine.evaluation import evaluate, validation_logits
from kdlib.engine.state import TrainState
from kdlib.engine.teachers import Teachers
from kdlib.errors import NotFinite, StoreError
from kdlib.models import Staged
from kdlib.runs import Run, Step

# Saving the resume state may take at most this share of the time of training. Where epochs are
# short, it is saved every few epochs.
SAVING_SHARE = 0.05


class Trainer:
    """Trains one run on one device, from where its resume state left off.

    A step reads nothing on the host and draws no random numbers. On a CPU it runs directly; on a
    GPU it is captured once as a CUDA graph and replayed.

    Args:
        run: the run to train.
        train, test: the run's images on the device.
        caches: the logit caches of the process.
        capture: capture the step as a CUDA graph; on a CPU nothing is captured.
    """

    def __init__(
        self, run: Run, train: Images, test: Images, caches: CachePool, capture: bool = True
    ):
        self.run, self.images, self.test = run, train, test
        self.device, self.caches = train.device, caches
        caches.join()
        self.teachers = Teachers(run, caches)
        if run.method.needs_teacher:
            self.teachers.load_network(0, self.device)
        self.teachers.load_pretrained(train)
        steps = -(-len(train) // run.recipe.batch)
        compiled = worth_compiling(self.device, steps * run.recipe.epochs)
        self.state = TrainState(run, train, self.teachers.network, compiled)
        network, pretrained = self.teachers.network, self.teachers.pretrained
        self.teacher = network and self.state.called(network)
        self.pretrained = {name: self.state.called(m) for name, m in pretrained.items()}
        self.data = EpochData(run, train, self.teachers)
        self.meter: dict[str, Tensor] = {}
        # Steps of this epoch: planned at its beginning, its number in the end, done so far.
        self.planned = self.steps = self.taken = 0
        self.epoch = 0
        # Whether the epoch may end early, and whether the method has ended the run.
        self.watched = self.stopped = False
        self.log: list[dict] = []
        # Fingerprints of the weights and logits that are kept, by epoch.
        self.weights: dict[str, str] = {}
        self.logits: dict[str, str] = {}
        # Teacher passes have the lowest priority, students a higher one.
        gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device, priority=-1) if gpu else None
        self.graph = None
        self.capturing = capture and self.stream is not None
        self._resume()

    # --- one epoch --------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Put the epoch's images, logits and learning rate where the step reads them."""
        self.started = time.perf_counter()
        self._synchronise()
        if self.run.method.needs_teacher:
            self.teachers.load_network(self.epoch, self.device)
        self.steps = self.planned = self.data.begin(self.epoch)
        self.state.set_rates(self.epoch)
        self.taken = 0
        self.watched = self.run.method.should_stop(self.state.modules, within=self.steps)
        self._reset_meter()
        self.state.modules.train()
        if self.capturing and self.graph is None:
            self._capture()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def look_ahead(self) -> None:
        """On a GPU, compute the teacher's logits of the next epoch while this one trains.

        Call it when all trainers have begun their epochs: the beginning or the end of an epoch
        would wait for this work.
        """
        if self.stream and self.epoch + 1 < self.run.recipe.epochs:
            self.data.look_ahead(self.epoch + 1)

    def advance(self) -> None:
        """One step."""
        if self.graph:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            self.step()
        self.taken += 1

    def check_stop(self) -> None:
        """End the epoch after this step if the method ends the run; the host waits for the step."""
        if self.watched:
            self._synchronise()
            if self.run.method.should_stop(self.state.modules):
                self.steps = self.taken

    def _synchronise(self) -> None:
        """Let the next work on the current stream wait for the steps."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def step(self) -> None:
        """All of training: batch, forward pass, loss, backward pass, update, meters."""
        step = Step(
            **self.data.batch(),
            student=self.state.student,
            teacher=self.teacher,
            aux=self.state.aux,
            pretrained=self.pretrained,
        )
        logged: dict[str, Tensor] = {}
        others = {*self.state.optimizers}
        for optimizer, terms in self.run.method.extra_updates(step):
            self.state.update(terms[optimizer], {optimizer})
            logged |= terms
            others.discard(optimizer)
        logits, terms = self.run.method.loss(step)
        self.state.update(terms["loss"], others)
        self.data.cursor += 1
        self.state.add_to_curve(terms)
        hits = (logits.detach().argmax(1) == step.labels).float().mean()
        for name, term in {**logged, **terms, "top1": 100 * hits}.items():
            if name not in self.meter:
                self.meter[name] = torch.zeros((), device=self.device)
            self.meter[name] += term.detach()

    def end_epoch(self) -> dict:
        """Read the meters once, evaluate, save, and return the epoch's row of the log."""
        self._synchronise()
        train = {f"train_{name}": total.item() / self.steps for name, total in self.meter.items()}
        for term, value in train.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{term} of {self.run} is {value} in epoch {self.epoch + 1}. The run stopped; "
                    f"its last saved epoch stays in {store.folder(self.run)}. It would stop there "
                    f"again: use another recipe, for example with a lower learning rate."
                )
        method, modules = self.run.method, self.state.modules
        row = {"epoch": self.epoch + 1, "lr": self.run.recipe.lr_at(self.epoch), **train}
        row |= method.metrics(modules) | self._evaluate()
        stopped = method.should_stop(modules)
        last = stopped or self.epoch + 1 == self.run.recipe.epochs
        if last and math.isnan(row["test_ce"]):
            raise NotFinite(f"The weights of {self.run} are not finite after its last steps.")
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.log.append(row)
        self.epoch, self.stopped = self.epoch + 1, stopped
        for epoch in self._epochs_to_save():
            self.weights[str(epoch)] = store.save_modules(self.run, epoch, modules)
        if self.run.save_logits:
            logits = validation_logits(self.state.uncompiled()["student"], self.images)
            self.logits[str(self.epoch)] = store.save_logits(self.run, self.epoch, logits)
        if not self.finished:
            self._save_state()
        return row

    def _epochs_to_save(self) -> set[int]:
        """The epochs under which the present weights are saved.

        The last weights are always saved under the recipe's last epoch, although the method may
        have ended the run before.
        """
        kept = {self.epoch} & {*self.run.keep}
        return kept | {self.run.recipe.epochs} if self.finished else kept

    @property
    def finished(self) -> bool:
        return self.stopped or self.epoch == self.run.recipe.epochs

    def _evaluate(self) -> dict[str, float]:
        """Test the student, auxiliary networks and composites, against this epoch's teacher."""
        self.state.modules.eval()
        cache = self.teachers.cache(self.epoch, self.test)
        modules = self.state.uncompiled()
        student = modules.pop("student")
        is_network = {n: isinstance(self.state.modules[n], Staged) for n in modules}
        classifiers = {"student": student}
        classifiers |= {name: m for name, m in modules.items() if is_network[name]}
        classifiers |= self.run.method.composites(student, self.teacher, modules)
        return evaluate(classifiers, self.test, cache)

    def close(self) -> None:
        """Write the record of a finished run, and remove its resume state."""
        stopped_after = self.epoch - 1 + self.taken / self.planned
        summary = {
            "weights": self.weights,
            "teachers": self.teachers.noted,
            **({"stopped_after": stopped_after} if self.stopped else {}),
            **({"logits": self.logits} if self.run.save_logits else {}),
            **self.state.curve_means(),
            "seconds": round(sum(row["seconds"] for row in self.log), 1),
            "environment": environment(self.device, self.state.dtype, self.state.compiled),
        }
        store.write_record(self.run, self.log, summary)
        self._state_path.unlink(missing_ok=True)

    # --- capture ----------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Capture the step as a graph. Weights, statistics and momentum stay as they were.

        Every graph has a memory pool of its own: graphs that replay at the same time must not share
        one. Warm-up steps run on the stream of the capture, to which library handles belong.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            with self.state.unchanged():
                for _ in range(3):  # allocates momentum and meters, fills the caches of libraries
                    self.data.cursor.zero_()
                    self.step()
                self.data.cursor.zero_()
                # Gradients lie inside the graph's memory. Nothing outside uses them again.
                self.state.forget_gradients()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.step()
            self.data.cursor.zero_()
            self._reset_meter()

    def _reset_meter(self) -> None:
        for total in self.meter.values():
            total.zero_()

    # --- resuming ---------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return store.folder(self.run) / "state.safetensors"

    def _save_state(self) -> None:
        """Save weights, momentum and log in one file, so that a crash cannot separate them."""
        now = time.perf_counter()
        if now - self.last_saved < self.saving_cost / SAVING_SHARE:
            return
        about = {
            "log": self.log,
            "weights": self.weights,
            "logits": self.logits,
            "teachers": self.teachers.noted,
            "scaler": self.state.scaler.state_dict(),
        }
        store.save_tensors(self._state_path, self.state.tensors(), about)
        self.last_saved = time.perf_counter()
        self.saving_cost = self.last_saved - now

    def _resume(self) -> None:
        """Continue from the saved state, if there is a whole one that fits."""
        self.last_saved, self.saving_cost = time.perf_counter(), 0.0
        try:
            tensors, about = store.load_tensors(self._state_path)
        except StoreError as error:
            if self._state_path.exists():
                warnings.warn(f"{error} {self.run} starts from the beginning.", stacklevel=2)
            return
        if self.teachers.changed_since(about["teachers"]):
            return
        epochs = len(about["log"])
        passed = {str(epoch) for epoch in self.run.keep if epoch <= epochs}
        if not passed <= about["weights"].keys():
            return  # a checkpoint is asked for now that was not kept then
        if self.run.save_logits and len(about["logits"]) < epochs:
            return
        try:
            self.state.load(tensors)
        except ValueError as error:  # the method has other modules now
            warnings.warn(
                f"{self._state_path}: {error} {self.run} starts from the beginning.", stacklevel=2
            )
            return
        if about["scaler"]:
            self.state.scaler.load_state_dict(about["scaler"])
        self.log, self.epoch = about["log"], epochs
        self.weights, self.logits = about["weights"], about["logits"]
        self.teachers.noted = about["teachers"]
