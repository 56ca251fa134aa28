"""Functions that several test files use."""

import os

import torch
from torch.nn import BatchNorm2d

from kdlib import build_model, load_data, store, train
from kdlib.engine.cache_pool import CachePool
from kdlib.engine.plan import plan
from kdlib.engine.state import trained_modules
from kdlib.engine.teachers import Teachers
from kdlib.engine.trainer import Trainer
from kdlib.methods import Step
from kdlib.models.precision import AutocastNetwork, InFloat32
from kdlib.store import fingerprint

# --- trained runs ---------------------------------------------------------------------------------


def final_weights(trained):
    """The fingerprint of the last weights."""
    return trained.summary["weights"][str(trained.run.recipe.epochs)]


def same_log(first, second):
    """Whether two logs are equal but for the seconds."""
    return first.log.drop(columns="seconds").equals(second.log.drop(columns="seconds"))


def aux_of(trained, epoch=None):
    """The tensors of all auxiliary modules, by name."""
    tensors = store.load_modules(trained.run, epoch or trained.run.recipe.epochs)
    return {name: t for name, t in tensors.items() if not name.startswith("student.")}


def aux_fingerprint(trained, epoch=None):
    return fingerprint(aux_of(trained, epoch))


def peer_of(trained, epoch=None):
    """The auxiliary module ``peer``."""
    run = trained.run
    images = load_data(run.data).first(run.images)
    return trained_modules(run, epoch or run.recipe.epochs, images)["peer"]


def replace_weights(run, other):
    """Give a trained run the weights of another, as training on another machine may.

    Returns their fingerprint.
    """
    weights = train([other])[0].model()
    trained, last = train([run])[0], run.recipe.epochs
    new = store.save_modules(run, last, torch.nn.ModuleDict({"student": weights}).state_dict())
    trained.summary["weights"][str(last)] = new
    store.write_record(run, trained.rows, trained.summary)
    return new


# --- training -------------------------------------------------------------------------------------


def new_trainer(run):
    """A trainer of a run of ``tiny``, at its beginning or where its resume state is."""
    images = load_data(run.data).first(run.images)
    return Trainer(run, images, load_data(run.data, "test"), CachePool())


def watch_teachers(monkeypatch):
    """The list of all teachers and pretrained modules that steps use from now on."""
    watched = []
    for name in ("load_network", "load_pretrained"):
        original = getattr(Teachers, name)

        def note(teachers, *arguments, original=original):
            original(teachers, *arguments)
            networks = (teachers.network, *teachers.pretrained.values())
            watched.extend(network for network in networks if network is not None)

        monkeypatch.setattr(Teachers, name, note)
    return watched


def batches(run, images):
    """(epoch, image indices, views) of every step of a run, computed from the plans.

    A batch belongs to the epoch of its last image.
    """
    n, batch, before = len(images), run.recipe.batch, run.epochs_before
    plans = [plan(run.seed, e, n, images.views) for e in range(before + run.recipe.epochs)]
    order, views = (torch.cat(parts) for parts in zip(*plans, strict=True))
    for step in range(before * n // batch, len(order) // batch):
        rows = slice(step * batch, (step + 1) * batch)
        yield (rows.stop - 1) // n - before, order[rows], views[rows]


# --- one step -------------------------------------------------------------------------------------


class Called(AutocastNetwork):
    """A network as a loss calls it, but in its own precision."""

    def __init__(self, network):
        super().__init__(network, torch.device("cpu"), torch.float32)

    def _float32(self, output):
        return output


def step_in_float64(method, student, teacher, size=8, pretrained=None):
    """A step of four random images, with networks in float64 that are called directly."""
    generator = torch.manual_seed(0)
    x = torch.randn(4, 1, size, size, dtype=torch.float64)
    labels = torch.tensor([1, 0, 4, 2])
    student, teacher = (
        build_model(name, 5, 1, seed=k).double() for k, name in enumerate((student, teacher))
    )
    for module in teacher.modules():
        if isinstance(module, BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    teacher.eval().requires_grad_(False)
    with torch.no_grad():
        aux = method.aux_modules(student.eval(), teacher, x)
        teacher_logits = teacher(x)
    aux = {name: module.double() for name, module in aux.items()}
    return Step(x, labels, teacher_logits, student.train(), teacher, aux, pretrained or {})


def called(step):
    """The step with networks as a trainer calls them, and with random ``uniform`` inputs."""
    aux = {
        name: module if isinstance(module, InFloat32) else Called(module)
        for name, module in step.aux.items()
    }
    teacher = step.teacher and Called(step.teacher)
    uniform = torch.rand(4, 2, 5, generator=torch.manual_seed(1), dtype=torch.float64)
    inputs = {"uniform": uniform}
    return step._replace(student=Called(step.student), teacher=teacher, aux=aux, inputs=inputs)


def layers_by_hand(network, x):
    """The stem's output, then the outputs of all convolutions of each stage.

    Of a ResNet of basic blocks; computed without the methods of ``Staged`` and ``Block``.
    """
    x = network.stem(x)
    found = [[x]]
    for stage in network.body:
        outputs = []
        for block in stage:
            inner = block.norms[0](block.convs[0](x)).relu()
            x = (block.norms[1](block.convs[1](inner)) + block.shortcut(x)).relu()
            outputs += [inner, x]
        found.append(outputs)
    return found


def gradients(value, modules):
    """The gradients of all parameters of these modules; zeros where the value ignores one."""
    weights = [weight for module in modules for weight in module.parameters()]
    return torch.autograd.grad(
        value, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )


# --- damaged files --------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def garble(path):
    path.write_bytes(b"no tensors at all")
