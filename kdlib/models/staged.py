"""Staged: a network as stem, stages and head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a layer is not done with.
INCOMPLETE = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


class Staged(nn.Module):
    """A classifier that can stop after a stage, resume from one, and report every stage's output.

    Stages count from 1; stage 0 is the stem's output. For every stage k,
    ``resume(k, until(k, x))`` is ``forward(x)``, operation by operation.

    Input ``[b, channels, height, width]``, output logits ``[b, classes]``.
    """

    def __init__(self, stem: nn.Module, body: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.stem = stem
        self.body = nn.ModuleList(body)
        self.head = head

    def until(self, stage: int, x: Tensor) -> Tensor:
        """The feature ``[b, c, h, w]`` after the first ``stage`` stages."""
        x = self.stem(x)
        for part in self.body[:stage]:
            x = part(x)
        return x

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        """Logits from the feature that stage ``stage`` put out."""
        for part in self.body[stage:]:
            feature = part(feature)
        return self.head(feature)

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of the stem and of every stage, first to last."""
        features = [self.stem(x)]
        for part in self.body:
            features.append(part(features[-1]))
        return features

    def stages(self, x: Tensor) -> list[Tensor]:
        """The output of every stage, first to last."""
        return self.features(x)[1:]

    def layers(self, x: Tensor) -> list[list[Tensor]]:
        """The outputs of every stage's layers, the stem's alone as those of stage 0.

        The last of a stage is what the stage puts out. A block is a layer, or several where it says
        so (``layer_outputs``); outside of blocks, an activation ends one.
        """
        x = self.stem(x)
        found = [[x]]
        for part in self.body:
            outputs = []
            for module in part:
                if hasattr(module, "layer_outputs"):
                    outputs += module.layer_outputs(x)
                    x = outputs[-1]
                else:
                    x = module(x)
                    outputs += [] if isinstance(module, INCOMPLETE) else [x]
            found.append(outputs if outputs and outputs[-1] is x else [*outputs, x])
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.resume(0, self.until(0, x))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with constant momentum.

    Its counter of batches is dropped: nothing reads it at constant momentum, and it would cost a
    kernel per layer and step.
    """
    norm = nn.BatchNorm2d(channels)
    norm.num_batches_tracked = None
    return norm


def adapter(ours: Tensor, theirs: Tensor) -> nn.Module:
    """From one feature's shape ``[b, c, h, w]`` to another's: to its size by average pooling or
    nearest upsampling, then a 1x1 convolution with batch norm; the identity where they agree."""
    if ours.shape[1:] == theirs.shape[1:]:
        return nn.Identity()
    size = theirs.shape[2:]
    resize = nn.AdaptiveAvgPool2d(size) if ours.shape[2] > size[0] else nn.Upsample(size)
    layers = [conv(ours.shape[1], theirs.shape[1], 1), batch_norm(theirs.shape[1])]
    return nn.Sequential(*([] if ours.shape[2:] == size else [resize]), *layers)


def initialise(model: Staged) -> Staged:
    """He et al.'s normal weights for every convolution, by its outputs; their biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class PoolAndClassify(nn.Sequential):
    """Global average pooling and one linear layer."""

    def __init__(self, channels: int, classes: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Classifier(channels, classes))


class Classifier(nn.Linear):
    """A linear layer that in eval mode gives an image the same bits at any place of a batch.

    What a label bank relies on. On a CPU a matrix product with rows of other than a multiple of 64
    bytes rounds them by where they lie; a convolution does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.in_features % 16 == 0:
            return super().forward(x)
        return F.conv2d(x[:, :, None, None], self.weight[:, :, None, None], self.bias).flatten(1)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights in place, so that captured graphs and optimizers keep their addresses.

    Raises ValueError where names or shapes differ.
    """
    own = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        odd = sorted(
            set(own) ^ set(weights) or {n for n in own if own[n].shape != weights[n].shape}
        )
        raise ValueError(f"The weights do not fit the model: {', '.join(odd[:3])} …")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
