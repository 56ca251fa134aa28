"""A capture that fails costs one run its graph, and nothing else. No GPU is needed here."""

import pytest
import torch

from kdlib.engine import capture as capture_module
from kdlib.engine.capture import capture, out_of_memory, wants_capture

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def graph(monkeypatch):
    """The calls of a graph whose capture CUDA made invalid, and of the allocator."""
    calls = []

    class Graph:
        def capture_begin(self, capture_error_mode):
            calls.append(f"begin {capture_error_mode}")

        def capture_end(self):
            calls.append("end")
            raise RuntimeError("operation failed due to a previous error during capture")

        def pool(self):
            return (0, 1)

    def end_allocating(device, pool):
        calls.append(f"allocator of {device} leaves {pool}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating, raising=False)
    return calls


def test_a_step_that_cannot_be_captured_is_named_and_the_allocator_is_released(graph):
    def step():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(UserWarning, match="not permitted.*trains without a graph"):
        assert capture(step, DEVICE) is None
    assert graph == ["begin thread_local", "end", "allocator of 0 leaves (0, 1)"]


def test_a_lack_of_memory_in_a_capture_is_raised(graph):
    def step():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        capture(step, DEVICE)
    assert graph[-1].startswith("allocator")


def test_the_environment_may_forbid_capture(monkeypatch):
    monkeypatch.delenv("KDLIB_CAPTURE", raising=False)
    assert wants_capture()
    monkeypatch.setenv("KDLIB_CAPTURE", "never")
    assert not wants_capture()
    monkeypatch.setenv("KDLIB_CAPTURE", "no")
    with pytest.raises(ValueError, match="KDLIB_CAPTURE=no is not valid: set it to auto or never"):
        wants_capture()


def test_errors_of_libraries_count_as_a_lack_of_memory():
    assert out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(RuntimeError("size mismatch"))
    assert capture_module.NO_MEMORY
