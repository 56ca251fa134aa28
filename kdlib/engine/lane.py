"""Lane: one student in training. Everything a step reads stays at a fixed address."""

import math
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import losses, store
from kdlib.data import Images
from kdlib.engine.bank import LabelBank, Shelf
from kdlib.engine.device import environment, half_precision, training_dtype
from kdlib.engine.plan import epoch_batches, mix, validation
from kdlib.errors import NotFinite
from kdlib.methods import Step
from kdlib.models import Staged, build_model, load_weights
from kdlib.runs import Recipe, Run

# Images an evaluation takes at a time: what fits a CPU's cache, what fills a GPU.
EVAL_CHUNK = {"cpu": 128, "cuda": 2000}
# Saving the resume state may take at most this share of the time spent training: every epoch where
# epochs are long, every few where they are not.
SAVING_SHARE = 0.05


class InFloat32:
    """A network that computes in half precision on a GPU and answers in float32.

    Half precision is for networks, never for losses. It is entered at each call, inside the step,
    so that the cache of cast weights belongs to the graph.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype):
        self.network, self.device, self.dtype = network, device, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self._float32(self.network, x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.stages``."""
        with half_precision(self.device, self.dtype):
            features = self.network.stages(x)
        return [feature.float() for feature in features]

    def until(self, stage: int, x: Tensor) -> Tensor:
        """As ``Staged.until``."""
        return self._float32(self.network.until, stage, x)

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        """As ``Staged.resume``."""
        return self._float32(self.network.resume, stage, feature)

    def head(self, feature: Tensor) -> Tensor:
        """Logits from the last stage's feature."""
        return self._float32(self.network.head, feature)

    def _float32(self, function, *arguments) -> Tensor:
        with half_precision(self.device, self.dtype):
            return function(*arguments).float()


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
        # Fingerprints: of weights and logits kept, by epoch, and of the teachers, by id@epoch.
        self.weights: dict[str, str] = {}
        self.logits: dict[str, str] = {}
        self.teachers: dict[str, str] = {}
        self.networks = self._build()
        self.parts = {name: self._in_float32(network) for name, network in self.networks.items()}
        self.student = self.parts.pop("student")
        self.teacher: Staged | None = None  # only where the method is live
        self.taught_by: str | None = None
        self.recipes = {"student": run.recipe, **run.method.recipes()}
        # A tensor rate can change between replays; only the fused SGD takes one without a sync.
        self.rates = {
            name: torch.tensor(r.lr, device=self.device) for name, r in self.recipes.items()
        }
        self.optimizers = {name: self._optimizer(name, r) for name, r in self.recipes.items()}
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
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.graph = None
        self.capturing = capture and self.stream is not None
        self._resume()

    # --- networks and optimizers ------------------------------------------------------------------

    def _build(self) -> nn.ModuleDict:
        """The student, as its run starts, and what its method trains along."""
        run, images, seed = self.run, self.images, self.run.seed
        student = build_model(run.model, images.classes, images.channels, mix("weights", seed))
        teacher = self._checkpoint(*run.method.labeller(0)) if run.method.live else None
        x = images.batch(torch.arange(2, device=self.device)).cpu()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(mix("parts", seed))
            parts = run.method.parts(student.eval(), teacher, x)
        networks = nn.ModuleDict({"student": student, **parts})
        if run.start:
            last = run.start.recipe.epochs
            self._note(run.start, last)
            load_weights(networks, store.load_networks(run.start, last))
        return networks.to(self.device, memory_format=torch.channels_last)

    def _optimizer(self, owner: str, recipe: Recipe) -> torch.optim.SGD:
        """For the networks that follow this recipe: those without one follow the student's."""
        owned = [
            name for name in self.networks if (name if name in self.recipes else "student") == owner
        ]
        return torch.optim.SGD(
            [p for name in owned for p in self.networks[name].parameters()],
            lr=self.rates[owner],
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def _in_float32(self, network: nn.Module) -> InFloat32:
        return InFloat32(network, self.device, self.dtype)

    # --- one epoch --------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Put the epoch's plan, labels and learning rate where the step reads them."""
        self.started = time.perf_counter()
        run, images = self.run, self.images
        index, view = epoch_batches(
            run.seed, run.epochs_before + self.epoch, len(images), images.views, run.recipe.batch
        )
        self.steps = len(index)
        self.index[: self.steps].copy_(index)
        self.view[: self.steps].copy_(view)
        if run.method.live:
            self._load_teacher()
        elif bank := self._bank(self.images):
            # Copied here, not indexed in the step: a graph would keep one bank's address for good.
            flat = bank.targets(
                self.index[: self.steps].flatten(), self.view[: self.steps].flatten()
            )
            self.targets[: self.steps].copy_(flat.view(self.steps, run.recipe.batch, -1))
        for name, recipe in self.recipes.items():
            self.rates[name].fill_(recipe.lr_at(self.epoch))
        self.cursor.zero_()
        for total in self.meter.values():
            total.zero_()
        self.networks.train()
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
        labels = self.images.labels[index]
        logits, terms = self.run.method.loss(
            Step(
                x=self.images.batch(index, view),
                labels=labels,
                targets=self.targets.index_select(0, self.cursor)[0],
                student=self.student,
                teacher=self.teacher and self._in_float32(self.teacher),
                parts=self.parts,
            )
        )
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.scaler.scale(terms["loss"]).backward()
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        self.cursor += 1
        hits = (logits.detach().argmax(1) == labels).float().mean()
        for name, term in {**terms, "top1": 100 * hits}.items():
            if name not in self.meter:
                self.meter[name] = torch.zeros((), device=self.device)
            self.meter[name] += term.detach()

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
            self.weights[str(self.epoch)] = store.save_networks(
                self.run, self.epoch, self.networks.state_dict()
            )
        if self.run.route:
            self._keep_logits()
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
            **({"logits": self.logits} if self.run.route else {}),
            "seconds": round(sum(row["seconds"] for row in self.log), 1),
            "environment": environment(self.device, self.dtype),
        }
        store.write_record(self.run, self.log, closing)
        self._state_path.unlink(missing_ok=True)

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """On the test set: accuracy in %, mean cross-entropy, mean KL to this epoch's teacher."""
        self.networks.eval()
        bank = self._bank(self.test)
        whole = {n: self._in_float32(m) for n, m in self.networks.items() if isinstance(m, Staged)}
        sums = torch.zeros(len(whole), 3, device=self.device)
        for index in torch.arange(len(self.test), device=self.device).split(
            EVAL_CHUNK[self.device.type]
        ):
            x, labels = self.test.batch(index), self.test.labels[index]
            for total, network in zip(sums, whole.values(), strict=True):
                logits = network(x)
                total[0] += (logits.argmax(1) == labels).sum()
                total[1] += F.cross_entropy(logits, labels, reduction="sum")
                if bank:
                    taught = bank.targets(index, torch.full_like(index, self.test.centre))
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
        index = validation(len(self.images)).to(self.device)
        chunks = index.split(EVAL_CHUNK[self.device.type])
        logits = torch.cat([self.student(self.images.batch(i)) for i in chunks])
        self.logits[str(self.epoch)] = store.save_logits(self.run, self.epoch, logits)

    def _bank(self, images: Images) -> LabelBank | None:
        """The bank of this epoch's labeller for these images."""
        anchor = self.run.method.labeller(self.epoch)
        if anchor is None:
            return None
        known = self._note(*anchor)
        key = (known, self.run.data, images.split, len(images))
        return self.banks.get(key, lambda: LabelBank(self._checkpoint(*anchor), images))

    def _note(self, teacher: Run, epoch: int) -> str:
        """Fingerprint of a checkpoint this run learns from, told in its record from now on."""
        name = f"{teacher.id}@{epoch}"
        return self.teachers.setdefault(name, store.saved_fingerprint(teacher, epoch))

    def _checkpoint(self, teacher: Run, epoch: int) -> Staged:
        model, found = store.load_checkpoint(teacher, epoch)
        if found != self._note(teacher, epoch):
            raise store.StoreError(
                f"{teacher} was trained anew while {self.run} learned from it: train it again."
            )
        return model

    def _load_teacher(self) -> None:
        """This epoch's labeller itself, at the address that a captured step reads."""
        teacher, epoch = self.run.method.labeller(self.epoch)
        if self.taught_by == (name := self._note(teacher, epoch)):
            return
        model, self.taught_by = self._checkpoint(teacher, epoch), name
        if self.teacher is None:
            self.teacher = model.to(self.device, memory_format=torch.channels_last)
        else:
            load_weights(self.teacher, model.state_dict())

    # --- capture ----------------------------------------------------------------------------------

    def _capture(self) -> None:
        """Record the step as a graph, leaving weights, statistics and momentum as they were.

        Every graph has a memory pool of its own: graphs that replay at the same time must not
        share one. Warm-up runs on the stream that is captured, where library handles live.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            before = {name: t.clone() for name, t in self.networks.state_dict().items()}
            scaling = self.scaler.state_dict()
            resumed = {p: s["momentum_buffer"].clone() for p, s in self._momentum()}
            for _ in range(3):  # allocates momentum and meters, fills library caches
                self.cursor.zero_()
                self.step()
            self.cursor.zero_()
            # Gradients are allocated inside the graph; outside it zero_grad is never called again.
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.step()
            load_weights(self.networks, before)
            for p, state in self._momentum():
                # For a new run zero: a zero buffer updates as the rule of the first step does.
                state["momentum_buffer"].copy_(resumed.get(p, torch.zeros_like(p)))
            if scaling:
                self.scaler.load_state_dict(scaling)
            self.cursor.zero_()
            for total in self.meter.values():
                total.zero_()

    def _momentum(self) -> list[tuple[Tensor, dict]]:
        """Every parameter's optimizer state."""
        return [pair for optimizer in self.optimizers.values() for pair in optimizer.state.items()]

    # --- resuming ---------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return store.folder(self.run) / "state.safetensors"

    def _save_state(self) -> None:
        """Weights, momentum and log in one file, so that no crash can tear them apart."""
        now = time.perf_counter()
        if now - self.last_saved < self.saving_cost / SAVING_SHARE:
            return
        tensors = {f"networks.{name}": t for name, t in self.networks.state_dict().items()}
        states = dict(self._momentum())
        for name, parameter in self.networks.named_parameters():
            if buffer := states.get(parameter):
                tensors[f"momentum.{name}"] = buffer["momentum_buffer"]
        about = {
            "log": self.log,
            "weights": self.weights,
            "logits": self.logits,
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
        for teacher, epoch in self.run.parents:
            before = about["teachers"].get(f"{teacher.id}@{epoch}")
            if before and before != store.saved_fingerprint(teacher, epoch):
                return  # the teacher moved: what was learned from it does not count
        epochs = len(about["log"])
        passed = {str(epoch) for epoch in self.run.keep if epoch <= epochs}
        if not passed <= about["weights"].keys():
            return  # a checkpoint is asked for now that was not kept then
        if self.run.route and len(about["logits"]) < epochs:
            return
        split = {"networks": {}, "momentum": {}}
        for name, tensor in tensors.items():
            part, _, name = name.partition(".")
            split[part][name] = tensor
        load_weights(self.networks, split["networks"])
        parameters = dict(self.networks.named_parameters())
        optimizers = {p: o for o in self.optimizers.values() for p in o.param_groups[0]["params"]}
        for name, momentum in split["momentum"].items():  # none where there is no momentum
            parameter = parameters[name]
            buffer = torch.empty_like(parameter).copy_(momentum)
            optimizers[parameter].state[parameter]["momentum_buffer"] = buffer
        if about["scaler"]:
            self.scaler.load_state_dict(about["scaler"])
        self.log, self.epoch = about["log"], epochs
        self.weights, self.logits = about["weights"], about["logits"]
        self.teachers = about["teachers"]
