"""Residual networks for small images (He et al. 2016): resnet8 … resnet110, and resnet50."""

from collections import deque
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, batch_norm, conv, initialise


class Block(nn.Module):
    """Residual block: convolutions with batch norm, a shortcut, ReLU.

    The shortcut is a 1x1 convolution where shapes change ("option B"), else the identity.
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
        (out,) = deque(self.layer_outputs(x), maxlen=1)  # none is kept longer than it is needed
        return out

    def layer_outputs(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs of those convolutions that are as wide as the block, the block's own last."""
        out, last = x, self.norms[-1]
        for convolution, norm in zip(self.convs, self.norms, strict=True):
            out = norm(convolution(out))
            if norm is last:
                yield F.relu(out + self.shortcut(x), inplace=True)
            else:
                out = F.relu(out, inplace=True)
                if norm.num_features == last.num_features:
                    yield out


def basic(inputs: int, width: int, stride: int) -> tuple[Block, int]:
    return Block(inputs, [(width, 3, stride), (width, 3, 1)]), width


def bottleneck(inputs: int, width: int, stride: int) -> tuple[Block, int]:
    return Block(inputs, [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]), 4 * width


def cifar_resnet(depth: int, classes: int, channels: int, scale: float = 1.0) -> Staged:
    """``depth = 6n + 2``: three stages of n basic blocks, 16, 32 and 64 channels wide."""
    return _resnet(basic, (16, 32, 64), ((depth - 2) // 6,) * 3, classes, channels, scale)


def resnet50(classes: int, channels: int, scale: float = 1.0) -> Staged:
    """ResNet-50 with a 3x3 stem of stride 1 and no max-pooling: RCO's teacher."""
    return _resnet(bottleneck, (64, 128, 256, 512), (3, 4, 6, 3), classes, channels, scale)


def _resnet(make, widths, depths, classes: int, channels: int, scale: float) -> Staged:
    widths = [max(1, round(width * scale)) for width in widths]
    stem = nn.Sequential(conv(channels, widths[0], 3), batch_norm(widths[0]), nn.ReLU(True))
    body, inputs = [], widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks = []
        for k in range(depth):
            block, inputs = make(inputs, width, stride=2 if stage > 0 and k == 0 else 1)
            blocks.append(block)
        body.append(nn.Sequential(*blocks))
    return initialise(Staged(stem, body, PoolAndClassify(inputs, classes)))
