"""Residual networks for small images (He et al. 2016): resnet8 … resnet110, and resnet50."""

from collections import deque
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.models.staged import (
    PoolAndClassify,
    Staged,
    batch_norm,
    blocks,
    conv,
    conv_norm_relu,
    initialise,
)


class Block(nn.Module):
    """Residual block: convolutions with batch norm, a shortcut, ReLU.

    The shortcut is a 1x1 convolution if the shape changes ("option B"), else the identity.
    """

    def __init__(self, inputs: int, layers: list[tuple[int, int, int]]):
        """``layers``: (outputs, kernel, stride) of each convolution."""
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels, total_stride = inputs, 1
        for outputs, kernel, stride in layers:
            self.convs.append(conv(channels, outputs, kernel, stride))
            self.norms.append(batch_norm(outputs))
            channels, total_stride = outputs, total_stride * stride
        self.shortcut = nn.Identity()
        if inputs != channels or total_stride != 1:
            self.shortcut = nn.Sequential(
                conv(inputs, channels, 1, total_stride), batch_norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        (out,) = deque(self.layer_outputs(x), maxlen=1)  # frees every output but the last
        return out

    def layer_outputs(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs of the convolutions that are as wide as the block; last, of the block."""
        out, last = x, self.norms[-1]
        for convolution, norm in zip(self.convs, self.norms, strict=True):
            out = norm(convolution(out))
            if norm is last:
                yield F.relu(out + self.shortcut(x), inplace=True)
            else:
                out = F.relu(out, inplace=True)
                if norm.num_features == last.num_features:
                    yield out


def basic(inputs: int, outputs: int, stride: int) -> Block:
    return Block(inputs, [(outputs, 3, stride), (outputs, 3, 1)])


def bottleneck(inputs: int, outputs: int, stride: int) -> Block:
    return Block(inputs, [(outputs // 4, 1, 1), (outputs // 4, 3, stride), (outputs, 1, 1)])


def cifar_resnet(depth: int, classes: int, channels: int, scale: float = 1.0) -> Staged:
    """``depth = 6n + 2``: three stages of n basic blocks with 16, 32 and 64 channels."""
    widths = [max(1, round(width * scale)) for width in (16, 32, 64)]
    return _resnet(basic, widths, 1, ((depth - 2) // 6,) * 3, classes, channels)


def resnet50(classes: int, channels: int, scale: float = 1.0) -> Staged:
    """ResNet-50 with a 3x3 stem of stride 1 and without max-pooling: the teacher of RCO."""
    widths = [max(1, round(width * scale)) for width in (64, 128, 256, 512)]
    return _resnet(bottleneck, widths, 4, (3, 4, 6, 3), classes, channels)


def _resnet(make: Callable, widths, expansion: int, depths, classes: int, channels: int) -> Staged:
    inputs, body = widths[0], []
    stem = nn.Sequential(*conv_norm_relu(channels, inputs, 3))
    for width, depth in zip(widths, depths, strict=True):
        outputs = expansion * width
        body.append(blocks(make, inputs, outputs, depth, stride=2 if body else 1))
        inputs = outputs
    return initialise(Staged(stem, body, PoolAndClassify(inputs, classes)))
