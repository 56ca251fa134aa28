"""LeNet-5 (LeCun et al. 1998), with ReLU and max-pooling, for images of any size."""

from collections.abc import Callable

from torch import nn

from kdlib.models.staged import Classifier, Staged

POOLED = 5  # pixels a side that LeNet-5 flattens


def he(weight) -> None:
    """Normal weights of deviation sqrt(2 / inputs)."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def glorot(weight) -> None:
    """Uniform weights within ±sqrt(6 / (inputs + outputs))."""
    nn.init.xavier_uniform_(weight)


def lenet(
    classes: int, channels: int, scale: float = 1.0, initialise: Callable[..., None] = he
) -> Staged:
    """Convolutions 5x5 of 6 and 16 channels, linear layers of 120 and 84, a classifier.

    Padded by 2, and pooled to 5x5 before the linear layers, so that images need not be 28x28. The
    first convolution and its pooling are the stem; biases start at 0.
    """
    first, second, third, fourth = (max(1, round(width * scale)) for width in (6, 16, 120, 84))
    stem = nn.Sequential(nn.Conv2d(channels, first, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2))
    stage = nn.Sequential(
        nn.Conv2d(first, second, 5, padding=2), nn.ReLU(True), nn.AdaptiveMaxPool2d(POOLED)
    )
    head = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(second * POOLED**2, third), nn.ReLU(True)),
        *(nn.Linear(third, fourth), nn.ReLU(True)),
        Classifier(fourth, classes),
    )
    model = Staged(stem, [stage], head)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            initialise(module.weight)
            nn.init.zeros_(module.bias)
    return model
