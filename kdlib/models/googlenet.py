"""GoogLeNet with batch norm for small images (Szegedy et al. 2015), of any width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, conv_norm_relu, initialise

STEM = 192
# Six widths for each inception block: the 1x1 branch; the 3x3 branch (1x1, then 3x3); the branch of
# two 3x3, which replaces 5x5 (1x1, then both 3x3); the pooling branch. One row for each stage.
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
    """Four parallel branches; their outputs are concatenated."""

    def __init__(self, inputs: int, widths: Sequence[int]):
        super().__init__()
        one, before3, three, before5, five, pooled = widths
        self.branches = nn.ModuleList(
            [
                _layers((inputs, one, 1)),
                _layers((inputs, before3, 1), (before3, three, 3)),
                _layers((inputs, before5, 1), (before5, five, 3), (five, five, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), _layers((inputs, pooled, 1))),
            ]
        )
        self.outputs = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet(classes: int, channels: int, scale: float = 1.0) -> Staged:
    """A 3x3 stem at full resolution and nine inception blocks in stages of 2, 5 and 2.

    A max-pooling comes before the second and the third stage.
    """
    inputs = max(1, round(STEM * scale))
    stem, body = _layers((channels, inputs, 3)), []
    for stage in STAGES:
        parts: list[nn.Module] = [nn.MaxPool2d(3, 2, padding=1)] if body else []
        for widths in stage:
            parts.append(Inception(inputs, [max(1, round(width * scale)) for width in widths]))
            inputs = parts[-1].outputs
        body.append(nn.Sequential(*parts))
    return initialise(Staged(stem, body, PoolAndClassify(inputs, classes)))


def _layers(*shapes: tuple[int, int, int]) -> nn.Sequential:
    """Convolutions of (inputs, outputs, kernel), each with batch norm and ReLU."""
    return nn.Sequential(*(module for shape in shapes for module in conv_norm_relu(*shape)))
