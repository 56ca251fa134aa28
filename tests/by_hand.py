"""Formulas and training loops in plain PyTorch, for comparison with the methods."""

import torch
from helpers import batches, gradients
from torch.nn import functional as F

from kdlib import Recipe, build_model, load_data
from kdlib.engine.plan import mix

WITH_KD = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
# The student's epochs and batch count, whatever this recipe says.
SECOND_RECIPE = Recipe(9, 9, lr=0.02, milestones=(1,), decay=0.5, momentum=0.8, weight_decay=1e-4)


# --- formulas -------------------------------------------------------------------------------------


def kl(teacher, student, temperature=1.0):
    """T²·KL(teacher ‖ student) of logits; the teacher gets no gradient."""
    p = (teacher.detach() / temperature).softmax(1)
    log_q = (student / temperature).log_softmax(1)
    return temperature**2 * (p * (p.log() - log_q)).sum(1).mean()


def on_logits(step, ce_weight=1.0, kd_weight=0.0, temperature=4.0):
    """ce_weight·CE + kd_weight·T²·KL of the networks of a step."""
    own, taught = (network(step.x) for network in (step.student, step.teacher))
    ce = (own.logsumexp(1) - own.gather(1, step.labels[:, None]).squeeze(1)).mean()
    return ce_weight * ce + kd_weight * kl(taught, own, temperature)


def pooled(feature, size):
    """Mean of equal squares, ``[b, c, h, w]`` to ``[b, c, size, size]``."""
    b, c, h, _ = feature.shape
    return feature.reshape(b, c, size, h // size, size, h // size).mean((3, 5))


def to_one_size(first, second):
    size = min(first.shape[2], second.shape[2])
    return pooled(first, size), pooled(second, size)


def stage_outputs(network, x):
    """Outputs of the stem and of every stage."""
    features = [network.stem(x)]
    for stage in network.body:
        features.append(stage(features[-1]))
    return features


def assert_same_with_gradients(got, expected, modules, rtol=1e-10, gradient=1e-7, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)
    for ours, theirs in zip(gradients(got, modules), gradients(expected, modules), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=gradient, atol=atol)


# --- training -------------------------------------------------------------------------------------


def first_student(run):
    """The student before the first step of a run on digits."""
    model = build_model(run.model, 10, 1, seed=mix("weights", run.seed)).train()
    return model.to(memory_format=torch.channels_last)


def seeded(run, make):
    """The result of ``make()`` in the random state of a run's auxiliary modules."""
    with torch.random.fork_rng():
        torch.manual_seed(mix("parts", run.seed))
        return make()


def digits(run):
    return load_data("digits").first(run.images)


def train_by_hand(run, losses, *groups):
    """A plain training loop.

    Args:
        losses: called with images and labels of a step; gives a loss for every optimizer. Each
            optimizer updates before the next loss is asked for.
        groups: a recipe and modules or parameters for every optimizer.
    """
    images, optimizers = digits(run), []
    for recipe, members in groups:
        modules = [m for m in members if isinstance(m, torch.nn.Module)]
        parameters = [m for m in members if isinstance(m, torch.nn.Parameter)]
        parameters += [p for module in modules for p in module.parameters()]
        names = ("momentum", "weight_decay", "nesterov")
        settings = {name: getattr(recipe, name) for name in names}
        optimizers.append(torch.optim.SGD(parameters, recipe.lr, **settings))
    for epoch, index, view in batches(run, images):
        for optimizer, (recipe, _) in zip(optimizers, groups, strict=True):
            falls = sum(epoch >= milestone for milestone in recipe.milestones)
            optimizer.param_groups[0]["lr"] = recipe.lr * recipe.decay**falls
        step = losses(images.batch(index, view), images.labels[index])
        for optimizer, loss in zip(optimizers, step, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def assert_same_weights(got, expected, rtol=1e-5, atol=1e-6):
    """``got`` has the weights and statistics of the module ``expected``."""
    expected = {n: t for n, t in expected.state_dict().items() if "num_batches" not in n}
    got = {n: t for n, t in got.items() if "num_batches" not in n}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=atol, msg=name)


def evaluation(logits, labels, teacher_logits=None):
    """Accuracy in %, cross-entropy, and the divergence from the teacher, as the log names them."""
    found = {
        "top1": 100 * (logits.argmax(1) == labels).float().mean().item(),
        "ce": F.cross_entropy(logits, labels).item(),
    }
    if teacher_logits is not None:
        found["kl"] = kl(teacher_logits, logits).item()
    return found


# --- KR -------------------------------------------------------------------------------------------

# A student and a teacher; in each stage, layers of the student and of the teacher for n = 3.
KR_PAIRS = {
    "equal": ("resnet8-x0.25", "resnet14-x0.25", [(0, (0, 1)), (1, (2, 3))]),
    "other channels": ("resnet8-x0.25", "resnet14-x0.5", [(0, (0, 1)), (1, (2, 3))]),
    "deeper student": ("resnet14-x0.5", "resnet8-x0.25", [(1, (0,)), (3, (1,))]),
}


def prior_by_hand(method, pair, features, adapters, thresholds, first=False):
    """The prior of KR without beta, and the share of residuals beyond their thresholds.

    Args:
        features: of student and teacher, by stage and layer.
        first: set the thresholds to the mean residuals of this batch.
    """
    (ours, theirs), total, shares, k = features, 0, [], 0
    for stage in (1, 2, 3):
        for student, layers in KR_PAIRS[pair][2]:
            targets = torch.stack([theirs[stage][layer] for layer in layers])
            u = adapters[k](ours[stage][student]) - targets
            spreads = torch.stack([target.std() for target in targets])
            weights = spreads / spreads.sum()
            mean = weights @ u.detach().abs().mean((1, 2, 3, 4))
            if first:
                thresholds.data[k] = mean
            t = 0 if method.threshold == "none" else thresholds[k]
            beyond = (u.abs() > t).to(u.dtype)
            penalty = method.gain / 2 * beyond * (u**2 - t**2)
            total = total + weights @ penalty.mean((1, 2, 3, 4))
            if method.threshold == "learned":
                total = total + method.pull * (t - mean) ** 2
            shares.append(beyond.mean())
            k += 1
    return total, sum(shares) / k
