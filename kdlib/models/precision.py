"""Networks that compute in half precision on a GPU and return float32."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call


def half_precision(device: torch.device, dtype: torch.dtype):
    """Autocast on a GPU; nothing on a CPU, where half-precision convolutions have at times been
    wrong, or much slower than float32 (pytorch issues 183815, 163347, 169688)."""
    if device.type != "cuda" or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype)


class AutocastNetwork:
    """A network that computes in half precision on a GPU and answers in float32.

    Half precision is for networks, never for losses. It is entered at each call, inside the step,
    so that the cache of cast weights belongs to the graph.

    Args:
        compiled: compile what is called, each method when it is called first.
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
        self.prepared: dict[str, Callable] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self._answer("__call__", x)

    def features(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.features``."""
        return self._answer("features", x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.stages``."""
        return self._answer("stages", x)

    def layers(self, x: Tensor) -> list[list[Tensor]]:
        """As ``Staged.layers``."""
        return self._answer("layers", x)

    def until(self, stage: int, x: Tensor) -> Tensor:
        """As ``Staged.until``."""
        return self._answer("until", stage, x)

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        """As ``Staged.resume``."""
        return self._answer("resume", stage, feature)

    def head(self, feature: Tensor) -> Tensor:
        """Logits from the last stage's feature."""
        return self._answer("head", feature)

    def with_weights(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Called with these in place of its parameters of the same names."""
        return self._answer("with_weights", weights, x)

    def _answer(self, name: str, *arguments):
        if name not in self.prepared:
            self.prepared[name] = self._prepare(name)
        with half_precision(self.device, self.dtype):
            return self._float32(self.prepared[name](*arguments))

    def _prepare(self, name: str) -> Callable:
        """A method of the network, compiled at its first call where that is wanted."""
        if name == "with_weights":
            method = partial(_with_weights, self.network)
        else:
            method = getattr(self.network, name)
        # Shapes never change, and a step that leaves the graph could not be captured.
        return torch.compile(method, dynamic=False, fullgraph=True) if self.compiled else method

    def _float32(self, answer):
        if isinstance(answer, Tensor):
            return answer.float()
        return [self._float32(part) for part in answer]


def _with_weights(network: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(network, weights, (x,))
