"""What a network costs: parameters, multiply-accumulates, FLOPs by RCO's rule."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one image.

    Attributes:
        params: trainable parameters.
        macs: multiply-accumulates of convolutions and linear layers.
        norms: output elements of batch normalisations.
    """

    params: int
    macs: int
    norms: int

    @property
    def flops(self) -> int:
        """2·MACs + 2·batch-norm outputs, the rule that reproduces RCO's Table 3."""
        return 2 * self.macs + 2 * self.norms


def count_cost(model: nn.Module, image_size: int, channels: int | None = None) -> Cost:
    """Count by shapes alone, on a copy without storage: no arithmetic is done.

    Forward only; torch's own counter ignores groups in the backward of depthwise convolutions.

    Args:
        image_size: height and width of the square image.
        channels: of the image; None takes those of the model's first convolution.
    """
    if channels is None:
        channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    shape = copy.deepcopy(model).to("meta").eval()
    count = {"macs": 0, "norms": 0}

    def add(module: nn.Module, _: tuple, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            count["macs"] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            count["macs"] += output.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm2d):
            count["norms"] += output.numel()

    for module in shape.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        shape(torch.empty(1, channels, image_size, image_size, device="meta"))
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(params=params, **count)
