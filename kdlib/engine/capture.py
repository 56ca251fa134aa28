"""Capture a step as a CUDA graph."""

import contextlib
import os
import warnings
from collections.abc import Callable

import torch

# Words in errors that report a lack of memory, besides torch.OutOfMemoryError.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
# Graphs whose capture failed. They stay, since torch's allocator may still ask them.
_FAILED: list[torch.cuda.CUDAGraph] = []


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
    free, total = torch.cuda.mem_get_info(device)
    if free < total // 4:  # within a capture no cached memory can be given back
        torch.cuda.empty_cache()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    # Other threads may use CUDA at the same time.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        step()
        graph.capture_end()
        return graph
    except BaseException as error:
        _abandon(graph, pool, device)
        if not isinstance(error, RuntimeError) or out_of_memory(error):
            raise
        warnings.warn(
            f"A step cannot be captured as a CUDA graph: {error} The run trains without a graph, "
            f"more slowly. KDLIB_CAPTURE=never captures nothing.",
            stacklevel=2,
        )
    return None


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """End a capture that failed, and release the allocator, which would serve the graph for good.

    ``capture_end`` raises before it does so where the step has made the capture invalid.
    """
    _FAILED.append(graph)
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError):  # raised where ``capture_end`` has done it
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
