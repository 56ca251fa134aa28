"""Capture a step as a CUDA graph."""

import contextlib
import os
import warnings
from collections.abc import Callable

import torch

# Words in errors that report a lack of memory, besides torch.OutOfMemoryError.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")


def out_of_memory(error: RuntimeError) -> bool:
    named = isinstance(error, torch.OutOfMemoryError)
    return named or any(words in str(error) for words in NO_MEMORY)


def wants_capture() -> bool:
    """Whether steps are captured on a GPU. ``$KDLIB_CAPTURE`` = never forbids it.

    Raises ValueError for another value than auto and never.
    """
    wish = os.environ.get("KDLIB_CAPTURE") or "auto"
    if wish not in ("auto", "never"):
        raise ValueError(f"KDLIB_CAPTURE={wish} is not valid: set it to auto or never.")
    return wish == "auto"


def capture(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """The step as a graph; None, with a warning, where it cannot be captured.

    Call it on the stream of the step. ``torch.cuda.graph`` would wait for all work of the device
    before it begins, also for that of other students. Raises RuntimeError for a lack of memory.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA at the same time.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        step()
        graph.capture_end()
        return graph
    except RuntimeError as error:
        _abandon(graph, device)
        if out_of_memory(error):
            raise
        warnings.warn(
            f"A step cannot be captured as a CUDA graph: {error} The run trains without a graph, "
            f"more slowly. KDLIB_CAPTURE=never captures nothing.",
            stacklevel=2,
        )
    return None


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    """End a capture that failed. Otherwise the allocator would go on to serve the graph."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()  # does nothing more where the step made the capture invalid
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device.index, graph.pool())
