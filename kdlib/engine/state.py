"""TrainState: the networks that a training updates, with their optimizers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdlib import store
from kdlib.data import Images
from kdlib.engine.plan import mix
from kdlib.engine.precision import training_dtype
from kdlib.models import Staged, build_model, load_weights
from kdlib.models.precision import AutocastNetwork, InFloat32
from kdlib.runs import SGD, Run


class TrainState:
    """Everything that training changes, at fixed addresses.

    No parameter belongs to two modules, so one backward pass of the loss serves all optimizers. An
    extra update of the method has a backward pass of its own.

    Args:
        run: the run in training.
        images: the images that it learns from.
        teacher: the first teacher, for a method with ``needs_teacher``.
        compiled: compile whole networks, and modules in float32, where a step calls them.
    """

    def __init__(self, run: Run, images: Images, teacher: Staged | None, compiled: bool = False):
        self.run, self.compiled = run, compiled
        self.device = images.device
        exact = run.method.reads_gradients
        chosen = training_dtype(images.device, run.model, images.size)
        self.dtype = torch.float32 if exact else chosen
        self.modules = initial_modules(run, images, teacher)
        self.modules.to(self.device, memory_format=torch.channels_last)
        called = {name: self.called(module) for name, module in self.modules.items()}
        self.student, self.aux = called.pop("student"), called
        self._add_optimizers()
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)
        # Sums of the method's curve, by bin, and the number of steps. The last bin is for the rest.
        bins = run.method.curve.bins + 1 if run.method.curve else 0
        self.curve = torch.zeros(bins, device=self.device)
        self.curve_steps = torch.zeros(1, dtype=torch.int64, device=self.device)

    def called(self, module: nn.Module) -> AutocastNetwork | nn.Module:
        """A module as a step calls it, in the precision of this training."""
        if isinstance(module, InFloat32):
            # Compiled as a wrapper: the module's weights keep their names.
            return torch.compile(module, dynamic=False, fullgraph=True) if self.compiled else module
        compiled = self.compiled and isinstance(module, Staged)
        return AutocastNetwork(module, self.device, self.dtype, compiled)

    def plain(self, module: nn.Module) -> AutocastNetwork | nn.Module:
        """A module as an evaluation calls it: its shapes are not worth compiling."""
        if isinstance(module, InFloat32):
            return module
        return AutocastNetwork(module, self.device, self.dtype)

    def uncompiled(self) -> dict[str, AutocastNetwork | nn.Module]:
        return {name: self.plain(module) for name, module in self.modules.items()}

    # --- updates ----------------------------------------------------------------------------------

    def _add_optimizers(self) -> None:
        """The student's optimizer updates all modules without an optimizer of their own."""
        own = self.run.method.optimizers(self.modules)
        sgd = {name: o for name, o in own.items() if isinstance(o, SGD)}
        self.optimizers = {name: o for name, o in own.items() if not isinstance(o, SGD)}
        taken = {*self.optimizers, *(m for o in sgd.values() for m in o.modules)} - {"student"}
        rest = tuple(name for name in self.modules if name not in taken)
        sgd |= {"student": SGD(self.run.recipe, rest)}
        self.recipes = {name: o.recipe for name, o in sgd.items()}
        # A tensor rate can change between replays; only the fused SGD takes one without a wait.
        self.rates = {
            name: torch.tensor(r.lr, device=self.device) for name, r in self.recipes.items()
        }
        for name, (recipe, modules) in sgd.items():
            self.optimizers[name] = torch.optim.SGD(
                [p for module in modules for p in self.modules[module].parameters()],
                lr=self.rates[name],
                momentum=recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.nesterov,
                fused=True,
            )

    def set_rates(self, epoch: int) -> None:
        for name, recipe in self.recipes.items():
            self.rates[name].fill_(recipe.lr_at(epoch))

    def update(self, loss: Tensor, optimizers: set[str]) -> None:
        """Backward pass of a loss, and one step of these optimizers."""
        self.forget_gradients()
        self.scaler.scale(loss).backward()
        for name, optimizer in self.optimizers.items():
            if name in optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()

    def forget_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def add_to_curve(self, terms: dict[str, Tensor]) -> None:
        """Add this step's value to the method's curve, without a wait for the host."""
        if curve := self.run.method.curve:
            bin_ = (self.curve_steps // curve.every).clamp(max=curve.bins)
            self.curve.index_add_(0, bin_, terms[curve.term].detach().view(1))
            self.curve_steps += 1

    def curve_means(self) -> dict:
        """The curve for the record: means of all complete bins."""
        if not (curve := self.run.method.curve):
            return {}
        complete = min(curve.bins, int(self.curve_steps) // curve.every)
        means = (self.curve[:complete] / curve.every).tolist()
        return {"curve": {"every": curve.every, curve.term: means}}

    # --- saving and restoring ---------------------------------------------------------------------

    def _slots(self) -> dict[str, tuple[torch.optim.Optimizer, nn.Parameter]]:
        """By ``<optimizer>.<parameter>``, every optimizer and each parameter that it updates."""
        names = {parameter: name for name, parameter in self.modules.named_parameters()}
        return {
            f"{name}.{names[parameter]}": (optimizer, parameter)
            for name, optimizer in self.optimizers.items()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def momentum(self) -> dict[str, Tensor]:
        """Momentum by ``<optimizer>.<parameter>``; only of parameters that have had an update."""
        return {
            slot: optimizer.state[parameter]["momentum_buffer"]
            for slot, (optimizer, parameter) in self._slots().items()
            if optimizer.state.get(parameter)
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights, statistics, momentum and the curve by name."""
        tensors = {f"networks.{name}": t for name, t in self.modules.state_dict().items()}
        tensors |= {f"momentum.{slot}": buffer for slot, buffer in self.momentum().items()}
        return tensors | {"curve.sums": self.curve, "curve.steps": self.curve_steps}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of ``tensors``. Raises ValueError where it does not fit."""
        weights, momentum, curve = (
            store.select(tensors, prefix) for prefix in ("networks.", "momentum.", "curve.")
        )
        slots = self._slots()
        if not momentum.keys() <= slots.keys():
            raise ValueError("The momentum does not fit the networks.")
        if curve.keys() != {"sums", "steps"} or curve["sums"].shape != self.curve.shape:
            raise ValueError("The curve does not fit the method.")
        load_weights(self.modules, weights)
        for slot, buffer in momentum.items():
            optimizer, parameter = slots[slot]
            state = torch.empty_like(parameter).copy_(buffer)
            optimizer.state[parameter]["momentum_buffer"] = state
        self.curve.copy_(curve["sums"])
        self.curve_steps.copy_(curve["steps"])

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo all training that happens inside; addresses stay the same."""
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        scaling = self.scaler.state_dict()
        try:
            yield
        finally:
            for name, tensor in self.tensors().items():
                # New momentum becomes zero: an update with zero equals the rule of the first step.
                tensor.copy_(before.get(name, torch.zeros_like(tensor)))
            if scaling:
                self.scaler.load_state_dict(scaling)
                self.scaler._per_optimizer_states.clear()  # of a step that was cut off


def initial_modules(run: Run, images: Images, teacher: Staged | None) -> nn.ModuleDict:
    """A run's ``student`` and auxiliary modules before its first step.

    Args:
        images: the images that it learns from.
        teacher: the first teacher, for a method with ``needs_teacher``.
    """
    modules = _random_modules(run, images, teacher)
    if run.start:  # modules that the start does not have keep their random weights
        saved = store.load_modules(run.start, run.start.recipe.epochs)
        for name, module in modules.items():
            if own := store.select(saved, f"{name}."):
                load_weights(module, own)
    return modules


def trained_modules(
    run: Run, epoch: int, images: Images, expected: str | None = None
) -> nn.ModuleDict:
    """A run's ``student`` and auxiliary modules after ``epoch`` epochs; 0 is the start.

    In eval mode and frozen. Raises StoreError where the store has no such weights, or, given an
    ``expected`` fingerprint, other weights.
    """
    teacher = None
    if run.method.needs_teacher:
        checkpoint = run.method.teacher_at(0)
        if epoch == 0:
            teacher, _ = store.load_checkpoint(*checkpoint)
        else:  # only its shapes matter
            model = checkpoint.run.model
            teacher = build_model(model, images.classes, images.channels, seed=0).eval()
        teacher = teacher.to(images.device)
    if epoch == 0:
        modules = initial_modules(run, images, teacher)
    else:
        modules = _random_modules(run, images, teacher)
        load_weights(modules, store.load_modules(run, epoch, expected))
    return modules.eval().requires_grad_(False)


def lent_module(lender: Run, name: str, images: Images, expected: str) -> nn.Module:
    """The module that a run lends to another run's method; see ``Method.pretrained``."""
    modules = trained_modules(lender, lender.recipe.epochs, images, expected)
    return modules[name if name in modules else "student"]


def _random_modules(run: Run, images: Images, teacher: Staged | None) -> nn.ModuleDict:
    weights = mix("weights", run.seed)
    student = build_model(run.model, images.classes, images.channels, weights).to(images.device)
    x = images.batch(torch.arange(2, device=images.device))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(mix("parts", run.seed))
        aux = run.method.aux_modules(student.eval(), teacher, x)
    return nn.ModuleDict({"student": student, **aux}).to(images.device)
