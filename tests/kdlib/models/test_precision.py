"""AutocastNetwork: all that a network offers, in float32."""

import pytest
import torch

from kdlib import build_model
from kdlib.models.precision import AutocastNetwork, half_precision

CPU = torch.device("cpu")


class InHalf(torch.nn.Module):
    """A network whose outputs are in half precision, as they are under autocast on a GPU."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def __getattr__(self, name):
        if name == "inner":
            return super().__getattr__(name)
        method = getattr(self.inner, name)
        return lambda *inputs: halved(method(*inputs))

    def forward(self, x):
        return halved(self.inner(x))


def halved(output):
    return output.bfloat16() if isinstance(output, torch.Tensor) else list(map(halved, output))


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
    wrapped = AutocastNetwork(InHalf(network), CPU, torch.bfloat16)
    got, expected = (flat(getattr(n, method)(*arguments)) for n in (wrapped, network))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16().float())


def test_weights_can_be_replaced_for_one_call(x):
    network, other = (build_model("resnet8-x0.25", 5, seed=seed).eval() for seed in (0, 1))
    wrapped = AutocastNetwork(network, CPU, torch.float32)
    before = wrapped(x)
    assert torch.equal(wrapped.with_weights(dict(other.named_parameters()), x), other(x))
    assert torch.equal(wrapped(x), before)


def test_a_cpu_computes_in_float32(x):
    with half_precision(CPU, torch.bfloat16):
        assert build_model("resnet8-x0.25", 5, seed=0)(x).dtype == torch.float32
