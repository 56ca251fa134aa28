"""MobileNetV2 in the sizes of RCO: all 16 FLOPs counts of its Table 3 agree to the last digit."""

from functools import partial

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

# (expanded by T?, channels, blocks, stride of the first block), one row per stage.
STAGES = (
    ((False, 16, 1, 1), (True, 24, 2, 1)),
    ((True, 32, 3, 2),),
    ((True, 64, 4, 2), (True, 96, 3, 1)),
    ((True, 160, 3, 2), (True, 320, 1, 1)),
)
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion (even at ratio 1), 3x3 depthwise convolution, 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *conv_norm_relu(inputs, hidden, 1),
            *conv_norm_relu(hidden, hidden, 3, stride, groups=hidden),
            *(conv(hidden, outputs, 1), batch_norm(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenetv2(
    expansion: int,
    width: float,
    classes: int,
    channels: int,
    scale: float = 1.0,
    stem_stride: int = 2,
) -> Staged:
    """MobileNetV2 with expansion ratio T and width multiplier W.

    The stem has stride 2 (on CIFAR usually 1). Widths are truncated, not rounded to multiples of 8.
    The last 1x1 convolution has 1,280 channels at every W ≤ 1. Activations are ReLU; no dropout.
    """
    width *= scale
    inputs = max(1, int(32 * width))
    stem = nn.Sequential(*conv_norm_relu(channels, inputs, 3, stem_stride))
    body = []
    for groups in STAGES:
        stage = []
        for expanded, outputs, count, stride in groups:
            make = partial(InvertedResidual, expansion=expansion if expanded else 1)
            outputs = max(1, int(outputs * width))
            stage += blocks(make, inputs, outputs, count, stride)
            inputs = outputs
        body.append(nn.Sequential(*stage))
    last = int(LAST_CHANNELS * max(1.0, width))
    head = nn.Sequential(*conv_norm_relu(inputs, last, 1), PoolAndClassify(last, classes))
    model = initialise(Staged(stem, body, head))
    classifier = head[-1][-1]
    nn.init.normal_(classifier.weight, 0.0, 0.01)
    nn.init.zeros_(classifier.bias)
    return model
