"""Trainer: one student in training. Everything a step reads stays at a fixed address."""

import math
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib import losses, store
from kdlib.data import Images
from kdlib.engine.device import environment, worth_compiling
from kdlib.engine.logit_cache import HOST, CachePool
from kdlib.engine.plan import epoch_batches, noise, validation
from kdlib.engine.state import TrainState
from kdlib.engine.teachers import Teachers
from kdlib.errors import NotFinite
from kdlib.methods import Step
from kdlib.models import Staged
from kdlib.runs import Run

# Images an evaluation takes at a time: what fits a CPU's cache, what fills a GPU.
EVAL_CHUNK = {"cpu": 128, "cuda": 2000}
# Saving the resume state may take at most this share of the time spent training: every epoch where
# epochs are long, every few where they are not.
SAVING_SHARE = 0.05


class Trainer:
    """Trains one run on one device, resuming where its store left off.

    A step does no host reads and draws no random numbers. On a CPU it runs eagerly; on a GPU it is
    captured once as a CUDA graph and replayed.

    Args:
        run: what to train.
        train, test: the run's images on the device.
        banks: shelf of label banks, shared by the lanes of a process.
        capture: record the step as a CUDA graph; on a CPU nothing is captured.
    """

    def __init__(
        self, run: Run, train: Images, test: Images, banks: CachePool, capture: bool = True
    ):
        self.run, self.images, self.test = run, train, test
        self.device, self.banks = train.device, banks
        banks.join()
        self.teachers = Teachers(run, banks)
        if run.method.live:
            self.teachers.enliven(0, self.device)
        self.teachers.borrow(train)
        steps = -(-len(train) // run.recipe.batch)
        compiled = worth_compiling(self.device, steps * run.recipe.epochs)
        self.state = TrainState(run, train, self.teachers.live, compiled)
        # Fixed addresses: teachers change in place.
        self.teacher = self.teachers.live and self.state.called(self.teachers.live)
        self.frozen = {n: self.state.called(part) for n, part in self.teachers.frozen.items()}
        shape = (steps, run.recipe.batch)
        self.index = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.view = torch.zeros_like(self.index)
        self.labelled = run.method.labelled and run.method.teacher_at(0) is not None
        self.targets = torch.zeros((*shape, train.classes), device=self.device)
        # Those of the epoch to come, and what tells that they are there.
        self.next_targets: tuple[Tensor, torch.cuda.Event] | None = None
        noises = (*shape, run.method.noises, train.classes)
        self.noise = torch.zeros(noises, device=self.device) if run.method.noises else None
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.meter: dict[str, Tensor] = {}
        # Of this epoch: planned at its beginning, what it has in the end, done so far.
        self.planned = self.steps = self.taken = 0
        self.epoch = 0
        # Of a run that may end before its recipe does.
        self.watched = self.arrived = False
        self.log: list[dict] = []
        # Fingerprints of weights and logits kept, by epoch.
        self.weights: dict[str, str] = {}
        self.logits: dict[str, str] = {}
        # Before the sweeps of labels, which have the lowest priority.
        gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device, priority=-1) if gpu else None
        self.graph = None
        self.capturing = capture and self.stream is not None
        self._resume()

    # --- one epoch --------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Put the epoch's plan, labels and learning rate where the step reads them."""
        self.started = time.perf_counter()
        self._synchronise()
        index, view = self._plan(self.epoch)
        self.steps = self.planned = len(index)
        self.index[: self.steps].copy_(index)
        self.view[: self.steps].copy_(view)
        if self.run.method.live:
            self.teachers.enliven(self.epoch, self.device)
        if self.labelled:
            # Copied here, not indexed in the step: a graph would keep one bank's address for good.
            self.targets[: self.steps].copy_(self._due_labels())
        if self.noise is not None:
            drawn = noise(self.run.seed, self.run.epochs_before + self.epoch, self.noise.shape)
            self.noise.copy_(drawn)
        self.state.set_rates(self.epoch)
        self.cursor.zero_()
        self.taken = 0
        self.watched = self.run.method.may_stop(self.state.networks, self.steps)
        for total in self.meter.values():
            total.zero_()
        self.state.networks.train()
        if self.capturing and self.graph is None:
            self._capture()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def look_ahead(self) -> None:
        """On a GPU, compute the next epoch's labels while this one trains.

        To be called when all lanes whose turn it is have begun their epochs: beginning and ending
        one would wait for what is launched here.
        """
        ahead = self.labelled and self.epoch + 1 < self.run.recipe.epochs
        if self.stream and ahead and self.next_targets is None:
            with self.banks.aside(self.device) as done:
                self.next_targets = self._labels(self.epoch + 1), done

    def _due_labels(self) -> Tensor:
        """This epoch's labels."""
        if self.next_targets is None:
            self.banks.join()
            return self._labels(self.epoch)
        (targets, done), self.next_targets = self.next_targets, None
        torch.cuda.current_stream(self.device).wait_event(done)
        return targets

    def _plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Images and views of an epoch's steps, on the CPU."""
        run, images = self.run, self.images
        epoch += run.epochs_before
        return epoch_batches(run.seed, epoch, len(images), images.views, run.recipe.batch)

    def _labels(self, epoch: int) -> Tensor:
        """The teacher's logits for an epoch's steps, ``[steps, batch, classes]``."""
        index, view = self._plan(epoch)
        bank = self.teachers.bank(epoch, self.images)
        return bank.targets(index.flatten(), view.flatten()).view(*index.shape, -1)

    def advance(self) -> None:
        """One step."""
        if self.graph:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            self.step()
        self.taken += 1

    def look(self) -> None:
        """After a step, end the epoch where the method has arrived. The host waits for the step."""
        if self.watched:
            self._synchronise()
            if self.run.method.arrived(self.state.networks):
                self.steps = self.taken

    def _synchronise(self) -> None:
        """Let what is done next wait for the steps."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def step(self) -> None:
        """The whole of training: gather, forward, loss, backward, update, account."""
        index = self.index.index_select(0, self.cursor)[0]
        view = self.view.index_select(0, self.cursor)[0]
        labels = self.images.labels[index]
        step = Step(
            x=self.images.batch(index, view),
            labels=labels,
            targets=self.targets.index_select(0, self.cursor)[0] if self.labelled else None,
            student=self.state.student,
            teacher=self.teacher,
            parts=self.state.parts,
            frozen=self.frozen,
            noise=None if self.noise is None else self.noise.index_select(0, self.cursor)[0],
        )
        told: dict[str, Tensor] = {}
        for turn in self.state.turns:
            terms = self.run.method.turn(turn, step)
            self.state.update(terms[turn], turn)
            told |= terms
        logits, terms = self.run.method.loss(step)
        self.state.update(terms["loss"])
        self.cursor += 1
        hits = (logits.detach().argmax(1) == labels).float().mean()
        for name, term in {**told, **terms, "top1": 100 * hits}.items():
            if name not in self.meter:
                self.meter[name] = torch.zeros((), device=self.device)
            self.meter[name] += term.detach()

    def end_epoch(self) -> dict:
        """Read the meters once, evaluate, keep what is to be kept, and return the epoch's row."""
        self._synchronise()
        train = {f"train_{name}": total.item() / self.steps for name, total in self.meter.items()}
        for term, value in train.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{term} of {self.run} is {value} in epoch {self.epoch + 1}. The run stopped; "
                    f"its last saved epoch stays in {store.folder(self.run)}. It will not get "
                    f"past this point: describe another run, with a lower learning rate, say."
                )
        row = {"epoch": self.epoch + 1, "lr": self.run.recipe.lr_at(self.epoch), **train}
        row |= self.run.method.told(self.state.networks) | self._evaluate()
        arrived = self.run.method.arrived(self.state.networks)
        last = arrived or self.epoch + 1 == self.run.recipe.epochs
        if last and math.isnan(row["test_ce"]):
            raise NotFinite(f"The weights of {self.run} left the finite numbers in its last steps.")
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.log.append(row)
        self.epoch, self.arrived = self.epoch + 1, arrived
        for epoch in self._to_keep():
            networks = self.state.networks
            self.weights[str(epoch)] = store.save_networks(self.run, epoch, networks)
        if self.run.route:
            self._keep_logits()
        if not self.finished:
            self._save_state()
        return row

    def _to_keep(self) -> set[int]:
        """As which epochs the weights are filed: the last are the recipe's last in every case."""
        kept = {self.epoch} & {*self.run.keep}
        return kept | {self.run.recipe.epochs} if self.finished else kept

    @property
    def finished(self) -> bool:
        return self.arrived or self.epoch == self.run.recipe.epochs

    def close(self) -> None:
        """Write the record of a finished run and drop its resume state."""
        summary = {
            "weights": self.weights,
            "teachers": self.teachers.noted,
            **({"arrived": self.epoch - 1 + self.taken / self.planned} if self.arrived else {}),
            **({"logits": self.logits} if self.run.route else {}),
            "seconds": round(sum(row["seconds"] for row in self.log), 1),
            "environment": environment(self.device, self.state.dtype, self.state.compiled),
        }
        store.write_record(self.run, self.log, summary)
        self._state_path.unlink(missing_ok=True)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """On the test set: accuracy in %, mean cross-entropy, mean KL to this epoch's teacher."""
        self.state.networks.eval()
        bank = self.teachers.bank(self.epoch, self.test)
        networks = self.state.uncompiled()
        student = networks.pop("student")
        whole = {"student": student}
        whole |= {n: part for n, part in networks.items() if isinstance(part.network, Staged)}
        whole |= self.run.method.joined(student, self.teacher, networks)
        sums = torch.zeros(len(whole), 3, device=self.device)
        chunk = EVAL_CHUNK[self.device.type]
        everywhere = (torch.arange(len(self.test), device=d) for d in (self.device, HOST))
        for index, on_host in zip(*(i.split(chunk) for i in everywhere), strict=True):
            x, labels = self.test.batch(index), self.test.labels[index]
            for total, network in zip(sums, whole.values(), strict=True):
                logits = network(x)
                total[0] += (logits.argmax(1) == labels).sum()
                total[1] += F.cross_entropy(logits, labels, reduction="sum")
                if bank:
                    taught = bank.targets(on_host, torch.full_like(on_host, self.test.centre))
                    total[2] += len(index) * losses.kd(logits, taught.float(), temperature=1)
        row = {}
        for name, (top1, ce, kl) in zip(whole, (sums / len(self.test)).tolist(), strict=True):
            prefix = "test" if name == "student" else f"test_{name}"
            row |= {f"{prefix}_top1": 100 * top1, f"{prefix}_ce": ce}
            row |= {f"{prefix}_kl": kl} if bank else {}
        return row

    @torch.no_grad()
    def _keep_logits(self) -> None:
        """Logits of the validation images, for whoever asks how far a student is from here."""
        student = self.state.uncompiled()["student"]
        index = validation(len(self.images)).to(self.device)
        chunks = index.split(EVAL_CHUNK[self.device.type])
        logits = torch.cat([student(self.images.batch(i)) for i in chunks])
        self.logits[str(self.epoch)] = store.save_logits(self.run, self.epoch, logits)

    # --- capture ----------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Record the step as a graph, leaving weights, statistics and momentum as they were.

        Every graph has a memory pool of its own: graphs that replay at the same time must not
        share one. Warm-up runs on the stream that is captured, where library handles live.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            with self.state.unmoved():
                for _ in range(3):  # allocates momentum and meters, fills library caches
                    self.cursor.zero_()
                    self.step()
                self.cursor.zero_()
                # Gradients live inside the graph; outside it they are never touched again.
                self.state.forget_gradients()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.step()
            self.cursor.zero_()
            for total in self.meter.values():
                total.zero_()

    # --- resuming ---------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return store.folder(self.run) / "state.safetensors"

    def _save_state(self) -> None:
        """Weights, momentum and log in one file, so that no crash can tear them apart."""
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
        """Continue from the saved state where there is a whole one that fits."""
        self.last_saved, self.saving_cost = time.perf_counter(), 0.0
        try:
            tensors, about = store.load_tensors(self._state_path)
        except store.StoreError as error:
            if self._state_path.exists():
                warnings.warn(f"{error} {self.run} starts anew.", stacklevel=2)
            return
        if self.teachers.moved_since(about["teachers"]):
            return  # what was learned from other weights does not count
        epochs = len(about["log"])
        passed = {str(epoch) for epoch in self.run.keep if epoch <= epochs}
        if not passed <= about["weights"].keys():
            return  # a checkpoint is asked for now that was not kept then
        if self.run.route and len(about["logits"]) < epochs:
            return
        try:
            self.state.load(tensors)
        except ValueError as error:  # the method has other parts now than it had then
            warnings.warn(f"{self._state_path}: {error} {self.run} starts anew.", stacklevel=2)
            return
        if about["scaler"]:
            self.state.scaler.load_state_dict(about["scaler"])
        self.log, self.epoch = about["log"], epochs
        self.weights, self.logits = about["weights"], about["logits"]
        self.teachers.noted = about["teachers"]
