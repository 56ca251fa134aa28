"""Lane: one student in training. Everything a step reads stays at a fixed address."""

import math
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib import losses, store
from kdlib.data import Images
from kdlib.engine.bank import LabelBank, Shelf
from kdlib.engine.device import environment, half_precision, training_dtype
from kdlib.engine.plan import epoch_batches, mix
from kdlib.errors import NotFinite
from kdlib.models import build_model, load_weights
from kdlib.runs import Run

# Images an evaluation takes at a time: what fits a CPU's cache, what fills a GPU.
EVAL_CHUNK = {"cpu": 128, "cuda": 2000}
# Saving the resume state may take at most this share of the time spent training: every epoch where
# epochs are long, every few where they are not.
SAVING_SHARE = 0.05


class Lane:
    """Trains one run on one device, resuming where its store left off.

    A step does no host reads and draws no random numbers. On a CPU it runs eagerly; on a GPU it is
    captured once as a CUDA graph and replayed.

    Args:
        run: what to train.
        train, test: the run's images on the device.
        banks: shelf of label banks, shared by the lanes of a process.
        capture: record the step as a CUDA graph; on a CPU nothing is captured.
    """

    def __init__(self, run: Run, train: Images, test: Images, banks: Shelf, capture: bool = True):
        self.run, self.images, self.test, self.banks = run, train, test, banks
        self.device = train.device
        self.dtype = training_dtype(self.device)
        self.model = build_model(
            run.model, train.classes, train.channels, seed=mix("weights", run.seed)
        ).to(self.device, memory_format=torch.channels_last)
        # A tensor rate can change between replays; only the fused SGD takes one without a sync.
        self.lr = torch.tensor(run.recipe.lr, device=self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.lr,
            momentum=run.recipe.momentum,
            weight_decay=run.recipe.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)
        steps = -(-len(train) // run.recipe.batch)
        shape = (steps, run.recipe.batch)
        self.index = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.view = torch.zeros_like(self.index)
        self.targets = torch.zeros((*shape, train.classes), device=self.device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.meter: dict[str, Tensor] = {}
        self.steps = 0
        self.epoch = 0
        self.log: list[dict] = []
        # Fingerprints: of the weights kept, by epoch, and of the teachers, by id@epoch.
        self.weights: dict[str, str] = {}
        self.teachers: dict[str, str] = {}
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.graph = None
        self.capturing = capture and self.stream is not None
        self._resume()

    # --- one epoch --------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Put the epoch's plan, labels and learning rate where the step reads them."""
        self.started = time.perf_counter()
        recipe, images = self.run.recipe, self.images
        index, view = epoch_batches(
            self.run.seed, self.epoch, len(images), images.views, recipe.batch
        )
        self.steps = len(index)
        self.index[: self.steps].copy_(index)
        self.view[: self.steps].copy_(view)
        if bank := self._bank(self.images):
            # Copied here, not indexed in the step: a graph would keep one bank's address for good.
            flat = bank.targets(
                self.index[: self.steps].flatten(), self.view[: self.steps].flatten()
            )
            self.targets[: self.steps].copy_(flat.view(self.steps, recipe.batch, -1))
        self.lr.fill_(recipe.lr_at(self.epoch))
        self.cursor.zero_()
        for total in self.meter.values():
            total.zero_()
        self.model.train()
        if self.capturing and self.graph is None:
            self._capture()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def advance(self) -> None:
        """One step."""
        if self.graph:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            self.step()

    def step(self) -> None:
        """The whole of training: gather, forward, loss, backward, update, account."""
        index = self.index.index_select(0, self.cursor)[0]
        view = self.view.index_select(0, self.cursor)[0]
        targets = self.targets.index_select(0, self.cursor)[0]
        labels = self.images.labels[index]
        x = self.images.batch(index, view)
        logits, terms = self.run.method.loss(self._student, x, labels, targets)
        self.optimizer.zero_grad()
        self.scaler.scale(terms["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.cursor += 1
        hits = (logits.detach().argmax(1) == labels).float().mean()
        for name, term in {**terms, "top1": 100 * hits}.items():
            if name not in self.meter:
                self.meter[name] = torch.zeros((), device=self.device)
            self.meter[name] += term.detach()

    def _student(self, x: Tensor) -> Tensor:
        """The student's logits in float32: half precision is for networks, never for losses.

        Entered inside the step, so that the cache of cast weights belongs to the graph.
        """
        with half_precision(self.device, self.dtype):
            return self.model(x).float()

    def end_epoch(self) -> dict:
        """Read the meters once, evaluate, keep what is to be kept, and return the epoch's row."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        train = {f"train_{name}": total.item() / self.steps for name, total in self.meter.items()}
        for term, value in train.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{term} of {self.run} is {value} in epoch {self.epoch + 1}. The run stopped; "
                    f"its last saved epoch stays in {store.folder(self.run)}. It will not get "
                    f"past this point: describe another run, with a lower learning rate, say."
                )
        row = {"epoch": self.epoch + 1, "lr": self.run.recipe.lr_at(self.epoch), **train}
        row |= self._evaluate()
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.log.append(row)
        self.epoch += 1
        if self.epoch in self.kept_epochs:
            weights = self.model.state_dict()
            self.weights[str(self.epoch)] = store.save_weights(self.run, self.epoch, weights)
        if not self.finished:
            self._save_state()
        return row

    @property
    def kept_epochs(self) -> set[int]:
        return {*self.run.keep, self.run.recipe.epochs}

    @property
    def finished(self) -> bool:
        return self.epoch == self.run.recipe.epochs

    def close(self) -> None:
        """Write the record of a finished run and drop its resume state."""
        closing = {
            "weights": self.weights,
            "teachers": self.teachers,
            "seconds": round(sum(row["seconds"] for row in self.log), 1),
            "environment": environment(self.device, self.dtype),
        }
        store.write_record(self.run, self.log, closing)
        self._state_path.unlink(missing_ok=True)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """On the test set: accuracy in %, mean cross-entropy, mean KL to this epoch's teacher."""
        self.model.eval()
        bank = self._bank(self.test)
        sums = torch.zeros(3, device=self.device)
        for index in torch.arange(len(self.test), device=self.device).split(
            EVAL_CHUNK[self.device.type]
        ):
            labels = self.test.labels[index]
            logits = self._student(self.test.batch(index))
            sums[0] += (logits.argmax(1) == labels).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
            if bank:
                taught = bank.targets(index, torch.full_like(index, self.test.centre))
                sums[2] += len(index) * losses.kd(logits, taught.float(), temperature=1)
        top1, ce, kl = (sums / len(self.test)).tolist()
        row = {"test_top1": 100 * top1, "test_ce": ce}
        return row | {"test_kl": kl} if bank else row

    def _bank(self, images: Images) -> LabelBank | None:
        """The bank of this epoch's labeller for these images."""
        anchor = self.run.method.labeller(self.epoch)
        if anchor is None:
            return None
        teacher, epoch = anchor
        name = f"{teacher.id}@{epoch}"
        known = self.teachers.setdefault(name, store.saved_fingerprint(teacher, epoch))

        def make() -> LabelBank:
            model, found = store.load_checkpoint(teacher, epoch)
            if found != known:
                raise store.StoreError(
                    f"{teacher} was trained anew while {self.run} learned from it: train it again."
                )
            return LabelBank(model, images)

        return self.banks.get((known, self.run.data, images.split, len(images)), make)

    # --- capture ----------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Record the step as a graph, leaving weights, statistics and momentum as they were.

        Every graph has a memory pool of its own: graphs that replay at the same time must not
        share one. Warm-up runs on the stream that is captured, where library handles live.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            before = {name: t.clone() for name, t in self.model.state_dict().items()}
            scaling = self.scaler.state_dict()
            resumed = {p: s["momentum_buffer"].clone() for p, s in self.optimizer.state.items()}
            for _ in range(3):  # allocates momentum and meters, fills library caches
                self.cursor.zero_()
                self.step()
            self.cursor.zero_()
            # Gradients are allocated inside the graph; outside it zero_grad is never called again.
            self.optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step()
            load_weights(self.model, before)
            for p, state in self.optimizer.state.items():
                # For a new run zero: a zero buffer updates as the rule of the first step does.
                state["momentum_buffer"].copy_(resumed.get(p, torch.zeros_like(p)))
            if scaling:
                self.scaler.load_state_dict(scaling)
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
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if buffer := self.optimizer.state[parameter]:
                tensors[f"momentum.{name}"] = buffer["momentum_buffer"]
        about = {
            "log": self.log,
            "weights": self.weights,
            "teachers": self.teachers,
            "scaler": self.scaler.state_dict(),
        }
        store.save_tensors(self._state_path, tensors, about)
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
        for teacher, epoch in self.run.method.anchors(self.run.recipe.epochs):
            before = about["teachers"].get(f"{teacher.id}@{epoch}")
            if before and before != store.saved_fingerprint(teacher, epoch):
                return  # the teacher moved: what was learned from it does not count
        passed = {str(epoch) for epoch in self.run.keep if epoch <= len(about["log"])}
        if not passed <= about["weights"].keys():
            return  # a checkpoint is asked for now that was not kept then
        split = {"model": {}, "momentum": {}}
        for name, tensor in tensors.items():
            part, _, name = name.partition(".")
            split[part][name] = tensor
        load_weights(self.model, split["model"])
        parameters = dict(self.model.named_parameters())
        for name, momentum in split["momentum"].items():  # none where there is no momentum
            buffer = torch.empty_like(parameters[name]).copy_(momentum)
            self.optimizer.state[parameters[name]]["momentum_buffer"] = buffer
        if about["scaler"]:
            self.scaler.load_state_dict(about["scaler"])
        self.log, self.weights = about["log"], about["weights"]
        self.teachers, self.epoch = about["teachers"], len(about["log"])
