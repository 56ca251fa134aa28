"""VGG-13 with batch norm for small images (Simonyan & Zisserman 2015)."""

from torch import nn

from kdlib.models.staged import Classifier, Staged, batch_norm, initialise

WIDTHS = (64, 128, 256, 512, 512)


def vgg13(classes: int, channels: int, scale: float = 1.0) -> Staged:
    """Five stages of two convolutions with bias, a max-pooling after each, and a linear layer.

    The first convolution is the stem. A pooling belongs to the next stage or to the head, so the
    stages of 32x32 images have outputs of 32, 16, 8, 4 and 2 pixels a side. Poolings round sizes
    up, so smaller images keep at least one pixel.
    """
    stem, first, *widths = (max(1, round(width * scale)) for width in (WIDTHS[0], *WIDTHS))
    body, inputs = [nn.Sequential(*_layer(stem, first))], first
    for width in widths:
        body.append(nn.Sequential(_pool(), *_layer(inputs, width), *_layer(width, width)))
        inputs = width
    head = nn.Sequential(
        _pool(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Classifier(inputs, classes)
    )
    return initialise(Staged(nn.Sequential(*_layer(channels, stem)), body, head))


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), batch_norm(outputs), nn.ReLU(True)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(2, ceil_mode=True)
