"""One small network of every family."""

import pytest
import torch

from kdlib import build_model

FAMILIES = [
    "resnet8",
    "resnet14-x0.5",
    "resnet50-x0.125",
    "mobilenetv2-t4-w0.35",
    "wrn-10-1",
    "wrn-16-2-x0.25",
    "vgg13-x0.125",
    "densenet-bc-22-4",
    "googlenet-x0.0625",
    "shufflenetv2-x0.125",
    "lenet",
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def network(family):
    return build_model(family, classes=7, seed=0)


@pytest.fixture
def x():
    return torch.randn(4, 3, 16, 16, generator=torch.manual_seed(0))
