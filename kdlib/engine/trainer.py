"""Trainer: trains one student. Everything that a step reads stays at a fixed address."""

import math
import time
from collections import deque

import torch
from torch import Tensor

from kdlib import store
from kdlib.data import Images
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.capture import capture, wants_capture
from kdlib.engine.device import environment, worth_compiling
from kdlib.engine.epoch_data import EpochData
from kdlib.engine.evaluation import evaluate, tested_images, validation_logits
from kdlib.engine.meter import Meter
from kdlib.engine.precision import label_dtype
from kdlib.engine.run_files import RunFiles
from kdlib.engine.state import TrainState
from kdlib.engine.teachers import Teachers
from kdlib.engine.writer import Writer
from kdlib.errors import NotFinite
from kdlib.models import Staged
from kdlib.runs import Run, Step

# Steps that are launched together. On a GPU a student has at most two such blocks in flight: the
# device is never idle, and the host can still stop soon.
BLOCK = {"cpu": 1, "cuda": 32}


class Trainer:
    """Trains one run on one device, from where its saved state left off.

    A step reads nothing on the host and draws no random numbers. On a CPU it runs directly; on a
    GPU it is captured once as a CUDA graph and replayed.

    Args:
        run: the run to train.
        train, test, caches: the run's images on the device, and the process's logit caches.
        writer: writes the files; None makes a new one.
        alike: steps of all runs of this network that are to be trained; decides on compiling.
        stream: the CUDA stream of the steps; None makes a new one.
        capture: capture the step as a CUDA graph; on a CPU nothing is captured.
    """

    def __init__(
        self,
        run: Run,
        train: Images,
        test: Images,
        caches: CachePool,
        writer: Writer | None = None,
        alike: int = 0,
        stream: torch.cuda.Stream | None = None,
        capture: bool = True,
    ):
        self.run, self.images, self.test = run, train, test
        self.device, self.caches = train.device, caches
        self.teachers = Teachers(run, caches)
        if run.method.needs_teacher:
            self.teachers.load_network(0, self.device)
        self.teachers.load_pretrained(train)
        own = -(-len(train) // run.recipe.batch) * run.recipe.epochs
        compiled = worth_compiling(self.device, max(own, alike))
        self.state = TrainState(run, train, self.teachers.network, compiled)
        self.teacher = self.teachers.network and self.state.called(self.teachers.network)
        self.pretrained = {n: self.state.called(m) for n, m in self.teachers.pretrained.items()}
        self.data = EpochData(run, train, self.teachers)
        self.meter = Meter(self.device)
        self.epoch, self.elapsed = 0, 0.0  # and seconds of this epoch before the last stop
        self.planned = self.steps = self.taken = 0  # its steps: at first, in the end, done so far
        self.watched = self.stopped = False  # the method may end the epoch early; ended the run
        self.log: list[dict] = []
        self.files = RunFiles(run, writer or Writer())
        # Teacher passes have the lowest priority, students a higher one.
        gpu = self.device.type == "cuda"
        self.stream = stream or (torch.cuda.Stream(self.device, priority=-1) if gpu else None)
        self.graph, self.capturing = None, gpu and capture and wants_capture()
        self._in_flight: deque[torch.cuda.Event] = deque()
        self._resume()
        self.started = time.perf_counter() - self.elapsed

    # --- one epoch --------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Put the epoch's images, logits and learning rate where the step reads them."""
        self.started = time.perf_counter() - self.elapsed
        self._synchronise()
        if self.run.method.needs_teacher:
            self.teachers.load_network(self.epoch, self.device)
        self.steps = self.planned = self.data.begin(self.epoch)
        self.state.set_rates(self.epoch)
        self.watched = self.run.method.should_stop(self.state.modules, within=self.steps)
        if self.taken and self.watched:  # saved between its last step and its test, perhaps
            self._check_stop()
        self.state.modules.train()
        if self.capturing and self.graph is None:
            self._capture()
        self.data.cursor.fill_(self.taken)
        if not self.taken:
            self.meter.zero()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def look_ahead(self, epoch: int | None = None) -> bool:
        """On a GPU, compute the teacher's logits of an epoch beside the students' steps.

        ``epoch`` None is the one after this. Returns whether that was begun now.
        """
        epoch = self.epoch + 1 if epoch is None else epoch
        ahead = self.stream is not None and epoch < self.run.recipe.epochs
        return ahead and self.data.look_ahead(epoch)

    def advance(self) -> None:
        """One step."""
        if self.graph:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            self.step()
        self.taken += 1

    def advance_block(self) -> None:
        """Some steps of this epoch, at most ``BLOCK``, without a wait for their end."""
        end = self.taken + BLOCK[self.device.type]
        while self.taken < min(end, self.steps):  # the method may end the epoch in this block
            self.advance()
            if self.watched:
                self._check_stop()
        if self.stream:
            stream = self.stream if self.graph else torch.cuda.current_stream(self.device)
            self._in_flight.append(stream.record_event())

    def blocks_in_flight(self) -> int:
        """Blocks of steps that were launched and are not done."""
        while self._in_flight and self._in_flight[0].query():
            self._in_flight.popleft()
        return len(self._in_flight)

    def _check_stop(self) -> None:
        """End the epoch after this step if the method ends the run; the host waits for the step."""
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
        self.meter.add({**logged, **terms, "top1": 100 * hits})

    def end_epoch(self) -> dict:
        """Read the meters once, evaluate, save, and return the epoch's row of the log."""
        self._synchronise()
        train = {f"train_{name}": mean for name, mean in self.meter.means(self.steps).items()}
        for term, value in train.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{term} of {self.run} is {value} in epoch {self.epoch + 1}. The run stopped; "
                    f"its last saved epoch stays in {store.folder(self.run)}. It would stop there "
                    f"again: use another recipe, for example with a lower learning rate."
                )
        method, modules = self.run.method, self.state.modules
        row = {"epoch": self.epoch + 1, "lr": self.run.recipe.lr_at(self.epoch), **train}
        stopped = method.should_stop(modules)
        last = stopped or self.epoch + 1 == self.run.recipe.epochs
        row |= method.metrics(modules) | self._evaluate(last)
        if last and math.isnan(row["test_ce"]):
            raise NotFinite(f"The weights of {self.run} are not finite after its last steps.")
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.log.append(row)
        self.used = self.epoch + self.taken / self.planned
        self.epoch, self.stopped, self.taken, self.elapsed = self.epoch + 1, stopped, 0, 0.0
        self._keep()
        if not self.finished and self.files.may_save():
            self.save()
        return row

    @property
    def finished(self) -> bool:
        return self.stopped or self.epoch == self.run.recipe.epochs

    def _evaluate(self, last: bool) -> dict[str, float]:
        """Test the student, auxiliary networks and composites, against this epoch's teacher."""
        self.state.modules.eval()
        cache = self.teachers.cache(self.epoch, self.test)
        modules = self.state.uncompiled()
        student = modules.pop("student")
        teacher = self.teachers.network and self.state.plain(self.teachers.network)
        networks = {k: m for k, m in modules.items() if isinstance(self.state.modules[k], Staged)}
        classifiers = {"student": student} | networks
        modules |= {name: self.state.plain(m) for name, m in self.teachers.pretrained.items()}
        classifiers |= self.run.method.composites(student, teacher, modules)
        count = None if last else tested_images(self.run)
        return evaluate(classifiers, self.test, cache, count)

    # --- files ------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Save the weights and logits that the run keeps after this epoch.

        The last weights are saved under the recipe's last epoch, even if the run ended before.
        """
        kept = {self.epoch} & {*self.run.keep}
        epochs = kept | {self.run.recipe.epochs} if self.finished else kept
        self.files.keep_weights(epochs, self.state.modules)
        if self.run.save_logits:
            logits = validation_logits(self.state.uncompiled()["student"], self.images)
            self.files.keep_logits(self.epoch, logits)

    def save(self) -> None:
        """Save all that is needed to continue, after an epoch or between two steps of it."""
        self._synchronise()
        about = {
            "log": [*self.log],
            "teachers": {**self.teachers.noted},
            "scaler": self.state.scaler.state_dict(),
            "taken": self.taken,
            "meter": self.meter.means(1) if self.taken else {},
            "elapsed": time.perf_counter() - self.started if self.taken else 0.0,
        }
        self.files.save_state(self.state.tensors(), about, self._environment())

    def close(self) -> None:
        """Write the record of a finished run, and remove its saved state."""
        summary = {
            "teachers": self.teachers.noted,
            **({"stopped_after": self.used} if self.stopped else {}),
            **self.state.curve_means(),
            "seconds": round(sum(row["seconds"] for row in self.log), 1),
        }
        self.files.write_record(self.log, summary, self._environment())

    def _environment(self) -> dict:
        teacher = self.run.method.teacher_at(max(0, self.epoch - 1))
        labels = teacher and label_dtype(self.device, teacher.run.model, self.images.size)
        return environment(self.device, self.state.dtype, self.state.compiled, labels)

    def _resume(self) -> None:
        """Continue from the saved state, if there is a whole one that fits."""
        if not (found := self.files.load_state(self.teachers)):
            return
        tensors, about = found
        try:
            self.state.load(tensors)
        except ValueError as error:  # the method has other modules now
            self.files.warn_of_restart(error)
            return
        if about["scaler"]:
            self.state.scaler.load_state_dict(about["scaler"])
        self.log, self.epoch = about["log"], len(about["log"])
        self.teachers.noted = about["teachers"]
        self.files.continue_from(about)
        self.meter.set(about.get("meter", {}))
        self.taken, self.elapsed = about.get("taken", 0), about.get("elapsed", 0.0)

    # --- capture ----------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Capture the step as a graph. Weights, statistics, momentum and meters stay as they were.

        Every graph has its own memory pool: graphs that replay at the same time must not share one.
        Warm-up steps run on the stream of the capture, to which library handles belong.
        """
        meter = self.meter.means(1)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            with self.state.unchanged():
                for _ in range(3):  # allocates momentum and meters, fills the caches of libraries
                    self.data.cursor.zero_()
                    self.step()
                self.data.cursor.zero_()
                # Gradients lie inside the graph's memory. Nothing outside uses them again.
                self.state.forget_gradients()
                self.graph = capture(self.step, self.device)
                self.capturing = self.graph is not None
            self.meter.set(meter)
        self._synchronise()
