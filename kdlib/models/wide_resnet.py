"""Wide residual networks (Zagoruyko & Komodakis 2016): wrn-16-1 … wrn-46-4."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, batch_norm, conv, initialise


class Block(nn.Module):
    """Pre-activation block: batch norm and ReLU before each of two convolutions, a shortcut.

    Where shapes change the shortcut is a 1x1 convolution of the activated input, else the identity.
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
    """``depth = 6n + 4``: a stem of 16 channels, three stages of n blocks ``width`` times as wide
    as 16, 32 and 64, no dropout.

    A stage puts out the sum of its last block, before batch norm and ReLU.
    """
    stem, *widths = (max(1, round(c * scale)) for c in (16, 16 * width, 32 * width, 64 * width))
    body, inputs = [], stem
    for stage, outputs in enumerate(widths):
        blocks = []
        for k in range((depth - 4) // 6):
            stride = 2 if stage > 0 and k == 0 else 1
            blocks.append(Block(inputs, outputs, stride))
            inputs = outputs
        body.append(nn.Sequential(*blocks))
    head = nn.Sequential(batch_norm(inputs), nn.ReLU(True), PoolAndClassify(inputs, classes))
    return initialise(Staged(nn.Sequential(conv(channels, stem, 3)), body, head))
