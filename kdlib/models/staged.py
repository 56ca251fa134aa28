"""Staged: a network as stem, stages and head."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Modules after which a layer is not complete: an activation follows.
INCOMPLETE = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


class Staged(nn.Module):
    """A classifier in stages: a forward pass can stop after a stage and resume from it.

    Stages count from 1; stage 0 is the stem. For every stage k, ``resume(k, until(k, x))`` is
    ``forward(x)``, operation by operation.

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
        """Logits from the output of stage ``stage``."""
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
        """The outputs of the layers of every stage; for stage 0, the output of the stem alone.

        The last output of a stage is the output of its last layer. A block is one layer, or several
        if it has ``layer_outputs``; outside of blocks, a layer ends with its activation.
        """
        x = self.stem(x)
        found = [[x]]
        for part in self.body:
            outputs = []
            for module in part:
                if hasattr(module, "layer_outputs"):
                    outputs += list(module.layer_outputs(x))  # torch 2.11 compiles no other form
                    x = outputs[-1]
                else:
                    x = module(x)
                    outputs += [] if isinstance(module, INCOMPLETE) else [x]
            found.append(outputs if outputs and outputs[-1] is x else [*outputs, x])
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.resume(0, self.until(0, x))


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias; at stride 1 it keeps the image size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm with constant momentum, without the counter of batches.

    The counter has no effect at constant momentum, and costs one GPU kernel per layer and step.
    """
    norm = nn.BatchNorm2d(channels)
    norm.num_batches_tracked = None
    return norm


def conv_norm_relu(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution, batch norm and ReLU."""
    return [conv(inputs, outputs, kernel, stride, groups), batch_norm(outputs), nn.ReLU(True)]


def blocks(make: Callable, inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    """``count`` blocks ``make(inputs, outputs, stride)``; only the first changes the shape."""
    rest = (make(outputs, outputs, 1) for _ in range(count - 1))
    return nn.Sequential(make(inputs, outputs, stride), *rest)


def adapter(ours: Tensor, theirs: Tensor) -> nn.Module:
    """A module from the shape of one feature ``[b, c, h, w]`` to the shape of another.

    Average pooling or nearest upsampling changes the size, a 1x1 convolution with batch norm the
    channels. Equal shapes need no module: the identity.
    """
    if ours.shape[1:] == theirs.shape[1:]:
        return nn.Identity()
    size = theirs.shape[2:]
    resize = nn.AdaptiveAvgPool2d(size) if ours.shape[2] > size[0] else nn.Upsample(size)
    layers = [conv(ours.shape[1], theirs.shape[1], 1), batch_norm(theirs.shape[1])]
    return nn.Sequential(*([] if ours.shape[2:] == size else [resize]), *layers)


def initialise(model: Staged) -> Staged:
    """Draw the weights of every convolution as He et al. do, by its outputs; set biases to 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class PoolAndClassify(nn.Sequential):
    """Global average pooling and a linear layer."""

    def __init__(self, channels: int, classes: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Classifier(channels, classes))


class Classifier(nn.Linear):
    """A linear layer; in eval mode an image has the same logits, bit by bit, anywhere in a batch.

    The cache of the teacher's logits needs this. On a CPU, the rounding of a matrix product depends
    on the row's place in the batch unless a row has a multiple of 64 bytes; the rounding of a
    convolution does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.in_features % 16 == 0:
            return super().forward(x)
        return F.conv2d(x[:, :, None, None], self.weight[:, :, None, None], self.bias).flatten(1)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights in place: captured CUDA graphs and optimizers refer to the old memory.

    Raises ValueError if names or shapes differ.
    """
    own = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        odd = set(own) ^ set(weights) or {n for n in own if own[n].shape != weights[n].shape}
        raise ValueError(f"The weights do not fit the model: {', '.join(sorted(odd)[:3])} …")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
