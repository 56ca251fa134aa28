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
        def capture_begin(self, pool, capture_error_mode):
            calls.append(f"begin in {pool}, {capture_error_mode}")

        def capture_end(self):
            calls.append("end")
            raise RuntimeError("operation failed due to a previous error during capture")

        def pool(self):
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    def note(name):
        return lambda device, pool: calls.append(f"{name} {pool} of {device}")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80, 100))
    for name in ("endAllocateToPool", "releasePool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", note(name), raising=False)
    return calls


def test_a_step_that_cannot_be_captured_is_named_and_the_allocator_is_released(graph):
    def step():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(UserWarning, match="not permitted.*trains without a graph"):
        assert capture(step, DEVICE) is None
    assert graph == [
        "begin in (0, 1), thread_local",
        "end",
        "endAllocateToPool (0, 1) of 0",
        "releasePool (0, 1) of 0",
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, TypeError])
def test_other_errors_in_a_capture_are_raised(graph, error):
    def step():
        raise error

    with pytest.raises(error):
        capture(step, DEVICE)
    assert graph[-1].startswith("releasePool")


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
