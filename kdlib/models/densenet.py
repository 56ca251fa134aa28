"""DenseNet-BC for small images (Huang et al. 2017): densenet-bc-100-12 and smaller ones."""

import torch
from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, batch_norm, conv, initialise

BLOCKS = 3


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 convolution; batch norm, ReLU, 3x3 convolution.

    The 1x1 convolution has four times the growth rate as outputs, the 3x3 convolution the growth
    rate. These are concatenated to the layer's input.
    """

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = batch_norm(inputs), conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = batch_norm(4 * growth), conv(4 * growth, growth, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.conv1(self.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(narrow)))], 1)


def densenet_bc(depth: int, growth: int, classes: int, channels: int, scale: float = 1.0) -> Staged:
    """A stem of twice the growth rate and three blocks of floor((depth - 4) / 6) dense layers.

    A transition halves the channels and the resolution before the second and the third block. It
    belongs to the stage of the block after it, so the output of a stage is the whole concatenation
    of its block.
    """
    growth = max(1, round(growth * scale))
    inputs = 2 * growth
    stem = nn.Sequential(conv(channels, inputs, 3))
    body = []
    for block in range(BLOCKS):
        layers: list[nn.Module] = []
        if block > 0:
            layers += _transition(inputs, inputs // 2)
            inputs //= 2
        for _ in range((depth - 4) // (2 * BLOCKS)):
            layers.append(DenseLayer(inputs, growth))
            inputs += growth
        body.append(nn.Sequential(*layers))
    head = nn.Sequential(batch_norm(inputs), nn.ReLU(True), PoolAndClassify(inputs, classes))
    return initialise(Staged(stem, body, head))


def _transition(inputs: int, outputs: int) -> list[nn.Module]:
    relu, pool = nn.ReLU(inplace=True), nn.AvgPool2d(2, ceil_mode=True)
    return [batch_norm(inputs), relu, conv(inputs, outputs, 1), pool]
