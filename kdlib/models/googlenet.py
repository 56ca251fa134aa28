"""GoogLeNet with batch norm for small images (Szegedy et al. 2015), of any width."""

import torch
from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, batch_norm, conv, initialise

STEM = 192
# Of each inception block: 1x1; 3x3 after its reduction; 5x5, as two 3x3, after its; after pooling.
# Blocks of one resolution make a stage.
STAGES = (
    ((64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64)),
    (
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    ((256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128)),
)


class Inception(nn.Module):
    """Four branches side by side, concatenated."""

    def __init__(self, inputs: int, single: int, three, five, pooled: int):
        super().__init__()
        (reduce3, three), (reduce5, five) = three, five
        self.branches = nn.ModuleList(
            [
                _layers((inputs, single, 1)),
                _layers((inputs, reduce3, 1), (reduce3, three, 3)),
                _layers((inputs, reduce5, 1), (reduce5, five, 3), (five, five, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), _layers((inputs, pooled, 1))),
            ]
        )
        self.outputs = single + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet(classes: int, channels: int, scale: float = 1.0) -> Staged:
    """A 3x3 stem at full resolution, nine inception blocks in stages of 2, 5 and 2, a max-pooling
    before each stage but the first."""

    def wide(width):
        return tuple(map(wide, width)) if isinstance(width, tuple) else max(1, round(width * scale))

    inputs = wide(STEM)
    stem = _layers((channels, inputs, 3))
    body = []
    for k, stage in enumerate(STAGES):
        parts: list[nn.Module] = [nn.MaxPool2d(3, 2, padding=1)] if k > 0 else []
        for widths in stage:
            parts.append(Inception(inputs, *wide(widths)))
            inputs = parts[-1].outputs
        body.append(nn.Sequential(*parts))
    return initialise(Staged(stem, body, PoolAndClassify(inputs, classes)))


def _layers(*layers: tuple[int, int, int]) -> nn.Sequential:
    """Convolutions of (inputs, outputs, kernel), each with batch norm and ReLU."""
    parts: list[nn.Module] = []
    for inputs, outputs, kernel in layers:
        parts += [conv(inputs, outputs, kernel), batch_norm(outputs), nn.ReLU(True)]
    return nn.Sequential(*parts)
