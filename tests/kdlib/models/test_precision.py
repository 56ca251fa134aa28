"""AutocastNetwork: all that a network offers, in float32."""

import pytest
import torch

from kdlib import build_model
from kdlib.models.precision import AutocastNetwork

CPU = torch.device("cpu")


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output for tensor in flat(part)]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("__call__", ("x",)),
        ("features", ("x",)),
        ("stages", ("x",)),
        ("layers", ("x",)),
        ("until", (2, "x")),
        ("resume", (1, "feature")),
        ("head", ("last",)),
    ],
)
def test_every_method_returns_what_the_network_does_in_float32(method, arguments, x):
    network = build_model("resnet8-x0.25", 5, seed=0).eval()
    inputs = {"x": x, "feature": network.until(1, x), "last": network.until(3, x)}
    arguments = [inputs.get(argument, argument) for argument in arguments]
    got = flat(getattr(AutocastNetwork(network, CPU, torch.bfloat16), method)(*arguments))
    exact = flat(getattr(network, method)(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        half = flat(getattr(network, method)(*arguments))
    for ours, rounded, theirs in zip(got, half, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, rounded.float())
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.03)


def test_weights_can_be_replaced_for_one_call(x):
    network, other = (build_model("resnet8-x0.25", 5, seed=seed).eval() for seed in (0, 1))
    wrapped = AutocastNetwork(network, CPU, torch.float32)
    before = wrapped(x)
    assert torch.equal(wrapped.with_weights(dict(other.named_parameters()), x), other(x))
    assert torch.equal(wrapped(x), before)
