"""The order and the views of an epoch's images, as a pure function of seed and epoch."""

import hashlib

import torch
from torch import Tensor


def mix(*parts: int | str) -> int:
    """A 63-bit seed from its parts; unlike sums, different parts give different seeds."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def plan(seed: int, epoch: int, n: int, views: int) -> tuple[Tensor, Tensor]:
    """Every image once, in random order, each in a random view: two int64 ``[n]`` on the CPU.

    ``epoch`` counts from 0. Resuming needs no random state, and every device uses the same plan.
    """
    generator = torch.Generator().manual_seed(mix("plan", seed, epoch))
    order = torch.randperm(n, generator=generator)
    return order, torch.randint(views, (n,), generator=generator)


def epoch_batches(seed: int, epoch: int, n: int, views: int, batch: int) -> tuple[Tensor, Tensor]:
    """Image indices and views of an epoch's steps, each ``[steps, batch]``.

    The images that do not fill a batch come first in the next epoch. So every batch has one shape,
    and E epochs have floor(E·n / batch) steps, as RCO counts.

    Raises ValueError where a batch is larger than the data set.
    """
    if batch > n:
        raise ValueError(f"A batch of {batch} is larger than the data set of {n} images.")
    order, view = plan(seed, epoch, n, views)
    if left_over := epoch * n % batch:
        previous_order, previous_view = plan(seed, epoch - 1, n, views)
        order = torch.cat([previous_order[-left_over:], order])
        view = torch.cat([previous_view[-left_over:], view])
    end = len(order) // batch * batch
    return order[:end].view(-1, batch), view[:end].view(-1, batch)


def validation(n: int) -> Tensor:
    """A fixed random fifth of n training images, in order: RCO's X', which stays in training."""
    generator = torch.Generator().manual_seed(mix("validation", n))
    return torch.randperm(n, generator=generator)[: n // 5].sort().values
