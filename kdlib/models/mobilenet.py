"""MobileNetV2 exactly as RCO sized it: its 16 FLOPs counts come out to the printed digit."""

import math

from torch import Tensor, nn

from kdlib.models.staged import PoolAndClassify, Staged, batch_norm, conv

# (expanded by T?, channels, blocks, stride of the first block), grouped into stages by resolution.
STAGES = (
    ((False, 16, 1, 1), (True, 24, 2, 1)),
    ((True, 32, 3, 2),),
    ((True, 64, 4, 2), (True, 96, 3, 1)),
    ((True, 160, 3, 2), (True, 320, 1, 1)),
)
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection; the expansion stands even at ratio 1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *(conv(inputs, hidden, 1), batch_norm(hidden), nn.ReLU(True)),
            *(conv(hidden, hidden, 3, stride, groups=hidden), batch_norm(hidden), nn.ReLU(True)),
            *(conv(hidden, outputs, 1), batch_norm(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _scaled(channels: int, width: float) -> int:
    return max(1, int(channels * width))


def mobilenetv2(
    expansion: int,
    width: float,
    classes: int,
    channels: int,
    scale: float = 1.0,
    stem_stride: int = 2,
) -> Staged:
    """MobileNetV2 with expansion ratio T and width multiplier W.

    Stem of stride 2 (1 in the version usual on CIFAR), widths truncated (not rounded to multiples
    of 8), ReLU, the last 1x1 convolution 1,280 wide at every W ≤ 1, no dropout.
    """
    width *= scale
    inputs = _scaled(32, width)
    stem = nn.Sequential(conv(channels, inputs, 3, stem_stride), batch_norm(inputs), nn.ReLU(True))
    body = []
    for groups in STAGES:
        blocks = []
        for expanded, outputs, count, stride in groups:
            for k in range(count):
                block = InvertedResidual(
                    inputs,
                    _scaled(outputs, width),
                    stride if k == 0 else 1,
                    expansion if expanded else 1,
                )
                blocks.append(block)
                inputs = _scaled(outputs, width)
        body.append(nn.Sequential(*blocks))
    last = int(LAST_CHANNELS * max(1.0, width))
    head = nn.Sequential(
        *(conv(inputs, last, 1), batch_norm(last), nn.ReLU(True)),
        PoolAndClassify(last, classes),
    )
    model = Staged(stem, body, head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    return model
