"""Small functions that several test files use."""

import os

import torch
from torch.func import functional_call

from kdlib import build_model, load_data, store, train
from kdlib.engine.logit_cache import CachePool
from kdlib.engine.plan import plan
from kdlib.engine.state import trained_networks
from kdlib.engine.teachers import Teachers
from kdlib.engine.trainer import Trainer
from kdlib.methods import Step
from kdlib.store import fingerprint


def final_weights(trained):
    return trained.summary["weights"][str(trained.run.recipe.epochs)]


def same_log(first, second):
    return first.log.drop(columns="seconds").equals(second.log.drop(columns="seconds"))


def interrupted(lane):
    raise KeyboardInterrupt


def move(run, other):
    """Give a trained run the weights of another, as training on another machine might."""
    weights = train([other])[0].model().state_dict()
    record, last = train([run])[0], run.recipe.epochs
    record.summary["weights"][str(last)] = store.save_weights(run, last, weights)
    store.write_record(run, record.log.to_dict("records"), record.summary)
    return record.summary["weights"][str(last)]


def new_trainer(run):
    """A lane at the start of a run of ``tiny`` or where its saved state is."""
    images = load_data(run.data).first(run.images)
    return Trainer(run, images, load_data(run.data, "test"), CachePool())


def peer_of(trained, epoch=None):
    """The peer's network, the run's method naming it."""
    run = trained.run
    images = load_data(run.data).first(run.images)
    return trained_networks(run, epoch or run.recipe.epochs, images)["peer"]


def parts_of(trained, epoch=None):
    """Tensors of all that was trained along, by name."""
    tensors = store.load_networks(trained.run, epoch or trained.run.recipe.epochs)
    return {name: t for name, t in tensors.items() if not name.startswith("student.")}


def parts_fingerprint(trained, epoch=None):
    """Of all that was trained along."""
    return fingerprint(parts_of(trained, epoch))


def batches(run, images):
    """(epoch, image indices, views) of every step of a run, from the plans themselves.

    A batch belongs to the epoch in which its last image comes.
    """
    n, batch, before = len(images), run.recipe.batch, run.epochs_before
    plans = [plan(run.seed, e, n, images.views) for e in range(before + run.recipe.epochs)]
    order, views = (torch.cat(parts) for parts in zip(*plans, strict=True))
    for step in range(before * n // batch, len(order) // batch):
        rows = slice(step * batch, (step + 1) * batch)
        yield (rows.stop - 1) // n - before, order[rows], views[rows]


def step_in_float64(method, student, teacher, size=8, frozen=None):
    """A batch of four images and what a lane would hand the loss, all of it in float64."""
    generator = torch.manual_seed(0)
    x = torch.randn(4, 1, size, size, dtype=torch.float64)
    labels = torch.tensor([1, 0, 4, 2])
    student, teacher = (
        build_model(name, 5, 1, seed=k).double() for k, name in enumerate((student, teacher))
    )
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    teacher.eval().requires_grad_(False)
    with torch.no_grad():
        parts = method.parts(student.eval(), teacher, x)
        targets = teacher(x)
    parts = {name: part.double() for name, part in parts.items()}
    return Step(x, labels, targets, student.train(), teacher, parts, frozen or {})


class Called:
    """A network as losses call it, at the precision that it has."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *inputs):
        return self.network(*inputs)

    def __getattr__(self, name):
        return getattr(self.network, name)

    def with_weights(self, weights, x):
        return functional_call(self.network, weights, (x,))


def called(step):
    """A step whose networks are as a lane hands them over; what ``noise`` asks for is drawn."""
    parts = {name: Called(part) for name, part in step.parts.items()}
    teacher = step.teacher and Called(step.teacher)
    uniform = torch.rand(4, 2, 5, generator=torch.manual_seed(1), dtype=torch.float64)
    return step._replace(student=Called(step.student), teacher=teacher, parts=parts, noise=uniform)


def layers_by_hand(network, x):
    """Of a ResNet of basic blocks, computed without what ``Staged`` and ``Block`` offer: the stem's
    output, then the outputs of every convolution, stage by stage."""
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
    """Of all parameters of these modules, 0 for those that the value does not depend on."""
    weights = [weight for module in modules for weight in module.parameters()]
    return torch.autograd.grad(
        value, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def watch_teachers(monkeypatch):
    """The list of all networks that teach runs from now on, as steps use them."""
    watched = []
    for name in ("enliven", "borrow"):
        original = getattr(Teachers, name)

        def note(teachers, *arguments, original=original):
            original(teachers, *arguments)
            watched.extend(n for n in (teachers.live, *teachers.frozen.values()) if n is not None)

        monkeypatch.setattr(Teachers, name, note)
    return watched


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def garble(path):
    path.write_bytes(b"no tensors at all")
