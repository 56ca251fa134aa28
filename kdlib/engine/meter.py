"""Meter: sums of named terms over the steps of an epoch."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Sums on the device, at fixed addresses, so that no step waits for a number."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=self.device)
            self.sums[name] += term.detach()

    def means(self, steps: int) -> dict[str, float]:
        """Means over so many steps; the host waits for them."""
        return {name: total.item() / steps for name, total in self.sums.items()}

    def zero(self) -> None:
        for total in self.sums.values():
            total.zero_()

    def set(self, sums: Mapping[str, float]) -> None:
        """Make the sums equal to these; those that are missing become zero."""
        self.zero()
        self.add({name: torch.tensor(total, device=self.device) for name, total in sums.items()})
