"""Networks by name: ``resnet20``, ``wrn-16-2``, ``mobilenetv2-t6-w0.5``, ``resnet50-x0.25``."""

import re
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import nn

from kdlib.errors import UnknownName
from kdlib.models.architecture import MARK, load_architecture
from kdlib.models.densenet import densenet_bc
from kdlib.models.googlenet import googlenet
from kdlib.models.lenet import lenet
from kdlib.models.mobilenet import mobilenetv2
from kdlib.models.resnet import cifar_resnet, resnet50
from kdlib.models.shufflenet import shufflenetv2
from kdlib.models.staged import Staged
from kdlib.models.vgg import vgg13
from kdlib.models.wide_resnet import wide_resnet

FIXED = {
    "resnet50": resnet50,
    "vgg13": vgg13,
    "googlenet": googlenet,
    "lenet": lenet,
    "lenet-glorot": partial(lenet, initialise=nn.init.xavier_uniform_),
    "shufflenetv2": shufflenetv2,
    "mobilenetv2": partial(mobilenetv2, 6, 1.0, stem_stride=1),
}
RESNET_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
NUMBER = r"\d*\.?\d+"
# A pattern for the name, the function that builds the network, and the valid sizes.
FAMILIES = (
    (r"resnet(\d+)", cifar_resnet, lambda depth: depth in RESNET_DEPTHS),
    (r"wrn-(\d+)-(\d+)", wide_resnet, lambda depth, k: depth > 4 and depth % 6 == 4 and k > 0),
    (r"densenet-bc-(\d+)-(\d+)", densenet_bc, lambda depth, growth: depth >= 10 and growth > 0),
    (rf"mobilenetv2-t(\d+)-w({NUMBER})", mobilenetv2, lambda t, w: t > 0 and w > 0),
)
EXAMPLES = [
    *(f"resnet{depth}" for depth in RESNET_DEPTHS),
    *(f"wrn-{sizes}" for sizes in ("16-1", "16-2", "40-1", "46-4")),
    *(f"densenet-bc-{sizes}" for sizes in ("100-12", "50-12", "75-9", "100-7")),
    *FIXED,
    *(f"mobilenetv2-t{t}-w{w}" for t in (4, 6, 8, 10) for w in (0.35, 0.5, 0.75, 1.0)),
]


def build_model(name: str, classes: int, channels: int = 3, seed: int | None = None) -> Staged:
    """A network with random weights, in float32 on the CPU.

    Args:
        name: ``resnet8|14|20|26|32|44|56|110``, ``resnet50``, ``wrn-<depth>-<width>`` with a depth
            of 6n + 4, ``densenet-bc-<depth>-<growth rate>``, ``vgg13``, ``googlenet``,
            ``shufflenetv2``, ``mobilenetv2-t<T>-w<W>``, ``mobilenetv2`` (T = 6, W = 1, a stem of
            stride 1), ``lenet``, or ``lenet-glorot`` (other random weights). The suffix
            ``-x<width>`` multiplies every width. The suffix ``@<hash>`` is an architecture that a
            search found inside the network.
        classes: number of logits.
        channels: of the images.
        seed: of the random weights; the caller's random state does not change. None draws the
            weights from the caller's random state.

    Raises:
        UnknownName: the name is unknown; the message has the closest known names.
        StoreError: the file of a found architecture is missing or damaged.
    """
    build = builder(name)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return build(classes=classes, channels=channels)


def check_model(name: str) -> None:
    """Raise UnknownName for an unknown model; no file is read.

    For a found architecture ``base@hash`` only the base is checked.
    """
    builder(name.partition(MARK)[0])


def builder(name: str) -> Callable[..., Staged]:
    """The function of ``classes`` and ``channels`` that builds a model.

    Raises the errors of ``build_model``.
    """
    if MARK in name:
        architecture = load_architecture(name)
        build = builder(architecture.base)
        return lambda classes, channels: architecture.build(build(classes, channels))
    base, separator, suffix = name.partition("-x")
    scale = _number(suffix) if separator else 1.0
    if not scale or not (family := _family(base)):
        raise UnknownName("model", name, EXAMPLES)
    return lambda classes, channels: family(classes=classes, channels=channels, scale=scale)


@lru_cache
def count_stages(name: str) -> int:
    """The number of stages of a model, from its name alone: no weights, no file.

    A found architecture has the stages of its base. Raises UnknownName.
    """
    with torch.device("meta"):
        return len(builder(name.partition(MARK)[0])(classes=2, channels=1).body)


def _family(base: str) -> Callable[..., Staged] | None:
    for pattern, family, valid in FAMILIES:
        if match := re.fullmatch(pattern, base):
            sizes = [_number(text) for text in match.groups()]
            if valid(*sizes):
                return partial(family, *sizes)
    return FIXED.get(base)


def _number(text: str) -> float | None:
    """The number that a text is, or None."""
    if not re.fullmatch(NUMBER, text):
        return None
    return int(text) if text.isdigit() else float(text)
