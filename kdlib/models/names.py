"""Networks by name: ``resnet20``, ``wrn-16-2``, ``mobilenetv2-t6-w0.5``, ``resnet50-x0.25``."""

import re
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from kdlib.errors import UnknownName
from kdlib.models.architecture import MARK, Architecture, load_architecture
from kdlib.models.densenet import densenet_bc
from kdlib.models.googlenet import googlenet
from kdlib.models.lenet import glorot, lenet
from kdlib.models.mobilenet import mobilenetv2
from kdlib.models.resnet import cifar_resnet, resnet50
from kdlib.models.shufflenet import shufflenetv2
from kdlib.models.staged import Staged
from kdlib.models.vgg import vgg13
from kdlib.models.wide_resnet import wide_resnet

WHOLE = {
    "resnet50": resnet50,
    "vgg13": vgg13,
    "googlenet": googlenet,
    "lenet": lenet,
    "lenet-glorot": partial(lenet, initialise=glorot),
    "shufflenetv2": shufflenetv2,
    "mobilenetv2": partial(mobilenetv2, 6, 1.0, stem_stride=1),
}
RESNET_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
EXAMPLES = [
    *(f"resnet{depth}" for depth in RESNET_DEPTHS),
    *(f"wrn-{depth}-{width}" for depth, width in ((16, 1), (16, 2), (40, 1), (46, 4))),
    *(
        f"densenet-bc-{depth}-{growth}"
        for depth, growth in ((100, 12), (50, 12), (75, 9), (100, 7))
    ),
    *WHOLE,
    *(f"mobilenetv2-t{t}-w{w}" for t in (4, 6, 8, 10) for w in (0.35, 0.5, 0.75, 1.0)),
]


def build_model(name: str, classes: int, channels: int = 3, seed: int | None = None) -> Staged:
    """A freshly initialised network in float32 on the CPU.

    Args:
        name: ``resnet8|14|20|26|32|44|56|110``, ``resnet50``, ``wrn-<depth>-<width>`` of a depth
            6n + 4, ``densenet-bc-<depth>-<growth rate>``, ``vgg13``, ``googlenet``,
            ``shufflenetv2``, ``mobilenetv2-t<T>-w<W>`` or ``mobilenetv2``, which is T = 6, W = 1
            with a stem of stride 1, ``lenet`` or, started otherwise, ``lenet-glorot``; a suffix
            ``-x<width>`` multiplies every width; what follows an ``@`` names an architecture that
            a search found inside the network before it.
        classes: number of logits.
        channels: of the images.
        seed: of the initial weights; the caller's random state is left alone. None draws from it.

    Raises:
        UnknownName: with the closest known names.
        StoreError: for a found architecture that is not there or damaged.
    """
    build = builder(name)
    if seed is None:
        return build(classes=classes, channels=channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(classes=classes, channels=channels)


def builder(name: str) -> Callable[..., Staged]:
    """What ``build_model`` calls for a name, with ``classes`` and ``channels``."""
    if MARK in name:
        return partial(_found, load_architecture(name))
    base, separator, suffix = name.partition("-x")
    scale = _number(suffix) if separator else 1.0
    family = _family(base)
    if family is None or scale is None:
        raise UnknownName("model", name, EXAMPLES)
    return partial(family, scale=scale)


def _found(architecture: Architecture, classes: int, channels: int) -> Staged:
    return architecture.build(builder(architecture.base)(classes=classes, channels=channels))


def check_model(name: str) -> None:
    builder(name.partition(MARK)[0])


@lru_cache
def count_stages(name: str) -> int:
    """How many stages a network has; nothing is computed for it."""
    with torch.device("meta"):
        return len(builder(name.partition(MARK)[0])(classes=2, channels=1).body)


def _family(base: str) -> Callable[..., Staged] | None:
    if base in WHOLE:
        return WHOLE[base]
    if match := re.fullmatch(r"resnet(\d+)", base):
        depth = int(match[1])
        if depth in RESNET_DEPTHS:
            return partial(cifar_resnet, depth)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", base):
        depth, width = int(match[1]), int(match[2])
        if depth > 4 and depth % 6 == 4 and width:
            return partial(wide_resnet, depth, width)
    if match := re.fullmatch(r"densenet-bc-(\d+)-(\d+)", base):
        depth, growth = int(match[1]), int(match[2])
        if depth >= 10 and growth:
            return partial(densenet_bc, depth, growth)
    if match := re.fullmatch(r"mobilenetv2-t(\d+)-w([\d.]+)", base):
        expansion, width = int(match[1]), _number(match[2])
        if expansion and width:
            return partial(mobilenetv2, expansion, width)
    return None


def _number(text: str) -> float | None:
    """A positive width, or None."""
    return float(text) if re.fullmatch(r"\d*\.?\d+", text) and float(text) > 0 else None
