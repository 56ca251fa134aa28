"""Wide residual networks (Zagoruyko & Komodakis 2016): wrn-16-1 … wrn-46-4."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, batch_norm, blocks, conv, initialise


class Block(nn.Module):
    """Pre-activation block: batch norm and ReLU before each of two convolutions, and a shortcut.

    The shortcut is a 1x1 convolution of the activated input if the shape changes, else the
    identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = batch_norm(inputs), conv(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = batch_norm(outputs), conv(outputs, outputs, 3)
        changes = inputs != outputs or stride != 1
        self.shortcut = conv(inputs, outputs, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x), inplace=True)
        out = self.conv2(F.relu(self.norm2(self.conv1(active)), inplace=True))
        return out + (self.shortcut(active) if self.shortcut else x)


def wide_resnet(depth: int, width: int, classes: int, channels: int, scale: float = 1.0) -> Staged:
    """``depth = 6n + 4``: a stem of 16 channels and three stages of n blocks, without dropout.

    The stages have ``width`` times 16, 32 and 64 channels. The output of a stage is the sum at the
    end of its last block, before batch norm and ReLU.
    """
    stem, *widths = (max(1, round(c * scale)) for c in (16, 16 * width, 32 * width, 64 * width))
    count, ends = (depth - 4) // 6, zip([stem, *widths], widths, (1, 2, 2), strict=False)
    body = [blocks(Block, inputs, outputs, count, stride) for inputs, outputs, stride in ends]
    inputs = widths[-1]
    head = nn.Sequential(batch_norm(inputs), nn.ReLU(True), PoolAndClassify(inputs, classes))
    return initialise(Staged(nn.Sequential(conv(channels, stem, 3)), body, head))
