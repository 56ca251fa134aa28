"""Cost of a network: parameters, multiply-accumulates, FLOPs by RCO's rule."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one image.

    Attributes:
        params: trainable parameters.
        macs: multiply-accumulates of convolutions and linear layers.
        norms: output elements of batch norms.
        layers: the multiply-accumulates of each convolution and linear layer, by its name.
    """

    params: int
    macs: int
    norms: int
    layers: dict[str, int] = field(repr=False, compare=False)

    @property
    def flops(self) -> int:
        """2·MACs + 2·batch-norm outputs, the rule that reproduces RCO's Table 3."""
        return 2 * self.macs + 2 * self.norms


def count_cost(model: nn.Module, image_size: int, channels: int | None = None) -> Cost:
    """Count the cost from the shapes alone, on a copy of the model on the meta device.

    PyTorch's own counter ignores groups in the backward pass of depthwise convolutions.

    Args:
        image_size: height and width of the square image.
        channels: of the image; None takes the input channels of the model's first convolution.
    """
    if channels is None:
        channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    shapes = copy.deepcopy(model).to("meta").eval()
    layers, norms = Counter(), Counter()

    def add(name: str, module: nn.Module, _: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers[name] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.BatchNorm2d):
            norms[name] += output.numel()

    for name, module in shapes.named_modules():
        module.register_forward_hook(partial(add, name))
    with torch.no_grad():
        shapes(torch.empty(1, channels, image_size, image_size, device="meta"))
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(params, layers.total(), norms.total(), dict(layers))
