"""Cost of a network: parameters, multiply-accumulates, FLOPs by RCO's rule."""

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
    """Count the cost from the shapes in a forward pass of one image.

    Not on the meta device, whose batch norm loads PyTorch's compiler, for seconds. PyTorch's own
    counter ignores groups in the backward pass of depthwise convolutions.

    Args:
        image_size: height and width of the square image.
        channels: of the image; None takes the input channels of the model's first convolution.
    """
    if channels is None:
        channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    layers, norms = Counter(), Counter()

    def add(name: str, module: nn.Module, _: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers[name] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.BatchNorm2d):
            norms[name] += output.numel()

    own, modes = next(model.parameters()), {m: m.training for m in model.modules()}
    hooks = [m.register_forward_hook(partial(add, name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model.eval()(own.new_zeros(1, channels, image_size, image_size))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(params, layers.total(), norms.total(), dict(layers))
