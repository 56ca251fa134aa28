"""TrainState: a student and what its method trains along, with their optimizers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdlib import store
from kdlib.data import Images
from kdlib.engine.device import training_dtype
from kdlib.engine.plan import mix
from kdlib.models import Staged, build_model, load_weights
from kdlib.models.precision import AutocastNetwork
from kdlib.runs import Recipe, Run


class TrainState:
    """Everything that training moves, at fixed addresses.

    Networks without a recipe of their own follow the student's. No parameter is shared, so that one
    backward pass serves all optimizers but those of the method's ``turns``, which move the student
    as well and have a backward pass each.

    Args:
        run: whose student, and whose method's parts.
        images: those it learns from.
        teacher: the first teacher_at, for a method that is ``live``.
        compiled: have whole networks compiled where a step calls them.
    """

    def __init__(self, run: Run, images: Images, teacher: Staged | None, compiled: bool = False):
        self.compiled = compiled
        self.device = images.device
        self.dtype = training_dtype(images.device) if run.method.half else torch.float32
        self.networks = initial_networks(run, images, teacher)
        self.networks.to(self.device, memory_format=torch.channels_last)
        called = {name: self.called(net) for name, net in self.networks.items()}
        self.student, self.parts = called.pop("student"), called
        self.optimizers = run.method.optimizers(self.networks)
        own = {name: r for name, r in run.method.recipes().items() if name in self.networks}
        self.turns = run.method.turns()
        self.recipes = {"student": run.recipe, **own, **self.turns}
        # A tensor rate can change between replays; only the fused SGD takes one without a sync.
        self.rates = {
            name: torch.tensor(r.lr, device=self.device) for name, r in self.recipes.items()
        }
        self.optimizers |= {name: self._optimizer(name, r) for name, r in self.recipes.items()}
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.dtype == torch.float16)

    def called(self, network: nn.Module) -> AutocastNetwork:
        """A network as losses call it, at the precision of this training."""
        compiled = self.compiled and isinstance(network, Staged)
        return AutocastNetwork(network, self.device, self.dtype, compiled)

    def uncompiled(self) -> dict[str, AutocastNetwork]:
        """By name, the networks as evaluations call them, whose shapes are not worth compiling."""
        return {
            name: AutocastNetwork(n, self.device, self.dtype) for name, n in self.networks.items()
        }

    def _optimizer(self, name: str, recipe: Recipe) -> torch.optim.SGD:
        followers = [self.networks[name]]
        if name in self.turns:
            followers.append(self.networks["student"])
        elif name == "student":
            others = self.networks.keys() - self.recipes.keys() - self.optimizers.keys()
            followers += [net for n, net in self.networks.items() if n in others]
        return torch.optim.SGD(
            [parameter for network in followers for parameter in network.parameters()],
            lr=self.rates[name],
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def set_rates(self, epoch: int) -> None:
        for name, recipe in self.recipes.items():
            self.rates[name].fill_(recipe.lr_at(epoch))

    def update(self, loss: Tensor, turn: str | None = None) -> None:
        """Backward pass and one step of the optimizer of a turn; for None, of all others."""
        self.forget_gradients()
        self.scaler.scale(loss).backward()
        for name, optimizer in self.optimizers.items():
            if name == turn or (turn is None and name not in self.turns):
                self.scaler.step(optimizer)
        self.scaler.update()

    def forget_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    # --- state ------------------------------------------------------------------------------------

    def momentum(self) -> dict[tuple[str, nn.Parameter], Tensor]:
        """By name of the optimizer and parameter that it stepped; nothing of one without it."""
        return {
            (name, parameter): state["momentum_buffer"]
            for name, optimizer in self.optimizers.items()
            for parameter, state in optimizer.state.items()
            if state
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights, statistics and momentum by name."""
        tensors = {f"networks.{name}": t for name, t in self.networks.state_dict().items()}
        names = {parameter: name for name, parameter in self.networks.named_parameters()}
        for (optimizer, parameter), buffer in self.momentum().items():
            tensors[f"momentum.{optimizer}.{names[parameter]}"] = buffer
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``tensors`` gave. Raises ValueError where it does not fit."""
        weights, momentum = (store.within(tensors, p) for p in ("networks.", "momentum."))
        names = {parameter: name for name, parameter in self.networks.named_parameters()}
        owned = {
            f"{name}.{names[parameter]}": (optimizer, parameter)
            for name, optimizer in self.optimizers.items()
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if not momentum.keys() <= owned.keys():
            raise ValueError("The momentum does not fit the networks.")
        load_weights(self.networks, weights)
        for name, buffer in momentum.items():
            optimizer, parameter = owned[name]
            state = torch.empty_like(parameter).copy_(buffer)
            optimizer.state[parameter]["momentum_buffer"] = state

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Whatever is trained inside, afterwards all is as it was, at the same addresses."""
        before = {name: t.clone() for name, t in self.networks.state_dict().items()}
        scaling = self.scaler.state_dict()
        momentum = {key: buffer.clone() for key, buffer in self.momentum().items()}
        yield
        load_weights(self.networks, before)
        for key, buffer in self.momentum().items():
            # For a new run zero: a zero buffer updates as the rule of the first step does.
            buffer.copy_(momentum.get(key, torch.zeros_like(buffer)))
        if scaling:
            self.scaler.load_state_dict(scaling)


def initial_networks(run: Run, images: Images, teacher: Staged | None) -> nn.ModuleDict:
    """A run's ``student`` and what its method trains along, as they start.

    Args:
        images: those it learns from.
        teacher: the teacher_at, for a method that is ``live``.
    """
    networks = _random_networks(run, images, teacher)
    if run.start:  # parts of another method stay as they are
        saved = store.load_networks(run.start, run.start.recipe.epochs)
        for name, network in networks.items():
            if own := store.within(saved, f"{name}."):
                load_weights(network, own)
    return networks


def trained_networks(
    run: Run, epoch: int, images: Images, expected: str | None = None
) -> nn.ModuleDict:
    """A run's ``student`` and parts after ``epoch`` epochs, 0 being their start.

    In eval mode and frozen. Raises StoreError where the store has no such weights, or, given an
    ``expected`` fingerprint, others.
    """
    teacher = None
    if run.method.live:
        teacher_at, at = run.method.teacher_at(0)
        if epoch == 0:
            teacher, _ = store.load_checkpoint(teacher_at, at)
        else:  # only its shapes matter
            teacher = build_model(teacher_at.model, images.classes, images.channels, seed=0).eval()
        teacher = teacher.to(images.device)
    if epoch == 0:
        networks = initial_networks(run, images, teacher)
    else:
        networks = _random_networks(run, images, teacher)
        load_weights(networks, store.load_networks(run, epoch, expected))
    return networks.eval().requires_grad_(False)


def _random_networks(run: Run, images: Images, teacher: Staged | None) -> nn.ModuleDict:
    weights = mix("weights", run.seed)
    student = build_model(run.model, images.classes, images.channels, weights).to(images.device)
    x = images.batch(torch.arange(2, device=images.device))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(mix("parts", run.seed))
        parts = run.method.parts(student.eval(), teacher, x)
    return nn.ModuleDict({"student": student, **parts}).to(images.device)
