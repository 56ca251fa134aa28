"""Networks that compute in half precision and return float32."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call


def half_precision(device: torch.device, dtype: torch.dtype):
    """Autocast to ``dtype``, or nothing where that is float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class InFloat32(nn.Module):
    """Base of modules that a loss uses as they are, in float32 on every device."""


class AutocastNetwork:
    """A network that computes in the precision ``dtype`` and returns float32.

    It is called like the network itself, and has the methods of ``Staged``. Autocast begins and
    ends with each call, inside the step, so that its cache of converted weights belongs to the
    captured graph.

    Args:
        compiled: compile every method at its first call.
    """

    METHODS = ("features", "stages", "layers", "until", "resume", "head")

    def __init__(
        self, network: nn.Module, device: torch.device, dtype: torch.dtype, compiled: bool = False
    ):
        self.network, self.device, self.dtype = network, device, dtype
        self.compiled = compiled
        self._prepared: dict[str, Callable] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self._run("__call__", x)

    def __getattr__(self, name: str) -> Callable:
        if name in ("named_parameters", "get_submodule"):
            return getattr(self.network, name)
        if name not in self.METHODS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return partial(self._run, name)

    def with_weights(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The network's output with these tensors in place of its parameters of the same names."""
        return self._run("with_weights", weights, x)

    def _run(self, name: str, *arguments):
        if name not in self._prepared:
            self._prepared[name] = self._prepare(name)
        with half_precision(self.device, self.dtype):
            return self._float32(self._prepared[name](*arguments))

    def _prepare(self, name: str) -> Callable:
        if name == "with_weights":
            method = partial(_with_weights, self.network)
        else:
            method = getattr(self.network, name)
        # Shapes never change. A step that leaves the compiled graph could not be captured.
        return torch.compile(method, dynamic=False, fullgraph=True) if self.compiled else method

    def _float32(self, output):
        if isinstance(output, Tensor):
            return output.float()
        return [self._float32(part) for part in output]


def _with_weights(network: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(network, weights, (x,))
