"""LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling, for images of any size."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from kdlib.models.staged import Classifier, Staged

POOLED = 5  # height and width of the features that LeNet-5 flattens

# Normal weights of deviation sqrt(2 / inputs).
he = partial(nn.init.kaiming_normal_, nonlinearity="relu")


def lenet(
    classes: int,
    channels: int,
    scale: float = 1.0,
    initialise: Callable[[Tensor], object] = he,
) -> Staged:
    """Two 5x5 convolutions of 6 and 16 channels, linear layers of 120 and 84, a classifier.

    The first convolution and its pooling are the stem. A padding of 2 and a pooling to 5x5 before
    the linear layers allow images of other sizes than 28x28. Biases start at 0.
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
