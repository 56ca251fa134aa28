"""Networks that compute in half precision on a GPU and return float32."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call


def half_precision(device: torch.device, dtype: torch.dtype):
    """Autocast to ``dtype`` on a GPU. On a CPU it does nothing: half-precision convolutions there
    can be wrong, or much slower than float32 (pytorch issues 183815, 163347, 169688)."""
    if device.type != "cuda" or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype)


class AutocastNetwork:
    """A network that computes in half precision on a GPU and returns float32.

    Losses compute in float32. Each call enters autocast anew, so that the cache of cast weights
    belongs to the CUDA graph of the step.

    Args:
        network: a ``Staged``, or another module of which only ``__call__`` is used.
        dtype: of the computation, e.g. ``torch.bfloat16``.
        compiled: compile every method at its first call.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        self.network, self.device, self.dtype = network, device, dtype
        self.compiled = compiled
        self._methods: dict[str, Callable] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self._call("__call__", x)

    def features(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.features``."""
        return self._call("features", x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.stages``."""
        return self._call("stages", x)

    def layers(self, x: Tensor) -> list[list[Tensor]]:
        """As ``Staged.layers``."""
        return self._call("layers", x)

    def until(self, stage: int, x: Tensor) -> Tensor:
        """As ``Staged.until``."""
        return self._call("until", stage, x)

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        """As ``Staged.resume``."""
        return self._call("resume", stage, feature)

    def head(self, feature: Tensor) -> Tensor:
        """Logits from the output of the last stage."""
        return self._call("head", feature)

    def with_weights(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The output for ``x`` with ``weights`` in place of the parameters of the same names."""
        return self._call("with_weights", weights, x)

    def _call(self, name: str, *arguments):
        if name not in self._methods:
            self._methods[name] = self._prepare(name)
        with half_precision(self.device, self.dtype):
            return self._float32(self._methods[name](*arguments))

    def _prepare(self, name: str) -> Callable:
        if name == "with_weights":
            method = partial(_with_weights, self.network)
        else:
            method = getattr(self.network, name)
        # Shapes never change. A step with a graph break could not be captured as a CUDA graph.
        return torch.compile(method, dynamic=False, fullgraph=True) if self.compiled else method

    def _float32(self, output):
        if isinstance(output, Tensor):
            return output.float()
        return [self._float32(part) for part in output]


def _with_weights(network: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(network, weights, (x,))
