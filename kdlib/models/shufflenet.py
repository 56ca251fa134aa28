"""ShuffleNetV2 for small images (Ma et al. 2018), of any width."""

import torch
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

STEM, LAST = 24, 1024
# (channels, units) at width 1; the first unit of a stage halves the resolution.
STAGES = ((116, 4), (232, 8), (464, 4))


class Unit(nn.Module):
    """Half of the channels pass through 1x1, depthwise 3x3 and 1x1 convolutions; then a shuffle.

    A unit of stride 2 does not split the channels: both branches convolve all of them.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.splits = stride == 1
        half = outputs // 2
        entering = half if self.splits else inputs
        self.main = nn.Sequential(
            *conv_norm_relu(entering, half, 1),
            *(conv(half, half, 3, stride, groups=half), batch_norm(half)),
            *conv_norm_relu(half, half, 1),
        )
        self.beside = nn.Identity()
        if not self.splits:
            self.beside = nn.Sequential(
                *(conv(inputs, inputs, 3, stride, groups=inputs), batch_norm(inputs)),
                *conv_norm_relu(inputs, half, 1),
            )

    def forward(self, x: Tensor) -> Tensor:
        passing, entering = x.chunk(2, 1) if self.splits else (x, x)
        out = torch.cat([self.beside(passing), self.main(entering)], 1)
        return nn.functional.channel_shuffle(out, 2)


def shufflenetv2(classes: int, channels: int, scale: float = 1.0) -> Staged:
    """A 3x3 stem at full resolution, three stages, a 1x1 convolution to 1,024 channels.

    Stem and last convolution keep their width, as in the paper at widths up to 1.5.
    """
    inputs, body = STEM, []
    stem = nn.Sequential(*conv_norm_relu(channels, inputs, 3))
    for width, units in STAGES:
        outputs = 2 * max(1, round(width * scale / 2))
        body.append(blocks(Unit, inputs, outputs, units, stride=2))
        inputs = outputs
    head = nn.Sequential(*conv_norm_relu(inputs, LAST, 1), PoolAndClassify(LAST, classes))
    return initialise(Staged(stem, body, head))
