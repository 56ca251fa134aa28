"""The device of a training: its settings, students in parallel, and compiling."""

import contextlib
import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from functools import cache

import torch

# Hardware queues of a GPU. With fewer queues than streams, students wait for each other. CUDA reads
# the variable when it starts, so it is set before anything asks for a GPU.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

# Students in parallel. One keeps a CPU busy; a step of one small network leaves most of a GPU idle.
PARALLEL = {"cpu": 1, "cuda": 16}
# The lowest compute capability that torch's compiler supports.
COMPILES = (8, 0)
# Steps of one network, over all its runs, from which compiling pays: a layer takes about half a
# second to compile, and then saves some 10 µs in each step.
COMPILED_STEPS = 50_000


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this name; for None a GPU if there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def asked_parallel(parallel: int | None, device: torch.device) -> int:
    """Students in parallel: by the argument, else by ``$KDLIB_PARALLEL``, else by the device.

    Raises ValueError for less than one.
    """
    asked = parallel if parallel is not None else os.environ.get("KDLIB_PARALLEL")
    if asked in (None, ""):
        return PARALLEL[device.type]
    if not (str(asked).isdecimal() and int(asked)):
        raise ValueError(
            f"{asked} students in parallel: give a whole number of at least 1 "
            f"(argument parallel, or KDLIB_PARALLEL)."
        )
    return int(asked)


def prepare(device: torch.device) -> None:
    """Choose the fast settings of torch and of the C library for this process.

    On a GPU, libraries time their kernels and take the fastest, not the same in every run. With
    ``$KDLIB_DETERMINISTIC`` = 1 they always take the same kernels. Then two runs on one machine
    agree in every bit, as they do on a CPU with the same number of threads.

    Raises ValueError for another value of ``$KDLIB_DETERMINISTIC``.
    """
    torch.set_flush_denormal(True)
    keep_large_blocks()
    wish = os.environ.get("KDLIB_DETERMINISTIC") or "0"
    if wish not in ("0", "1"):
        raise ValueError(f"KDLIB_DETERMINISTIC={wish} is not valid: set it to 0 or 1.")
    exact = device.type == "cuda" and wish == "1"
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = exact, not exact
        torch.backends.cudnn.allow_tf32 = False  # float32 is then computed in float32
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if worth_compiling(device, COMPILED_STEPS):
        # One function is compiled for many networks. Beyond the limit torch stops compiling.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096
        torch._inductor.config.deterministic = exact


@contextlib.contextmanager
def beside_students(device: torch.device) -> Iterator[None]:
    """On a GPU: run what is launched inside before steps of students that are waiting.

    The host waits for tests and losses, so they must not queue behind the steps of many students.
    """
    if device.type == "cpu":
        yield
        return
    outside, first = torch.cuda.current_stream(device), _first_stream(device)
    first.wait_stream(outside)
    with torch.cuda.stream(first):
        yield
    outside.wait_stream(first)


@cache
def _first_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-2)


def worth_compiling(device: torch.device, steps: int) -> bool:
    """Whether compiling a network saves more time in so many steps than it costs.

    Only on a GPU: on a CPU compiling takes minutes and saves a tenth. ``$KDLIB_COMPILE`` = never or
    always overrides the answer, on a CPU too.

    Raises ValueError for another value of ``$KDLIB_COMPILE``.
    """
    wish = os.environ.get("KDLIB_COMPILE", "auto")
    if wish not in ("auto", "never", "always"):
        raise ValueError(f"KDLIB_COMPILE={wish} is not valid: set it to auto, never or always.")
    if wish != "auto":
        return wish == "always"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < COMPILES:
        return False
    return steps >= COMPILED_STEPS


def keep_large_blocks(limit: int = 1 << 30) -> None:
    """Let glibc keep freed blocks of up to ``limit`` bytes, and not map each activation again.

    On a CPU this shortens the pass of a large teacher by a third to a half. Without glibc it does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, limit)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 * limit - 1)  # M_TRIM_THRESHOLD


def environment(
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    labels: torch.dtype | None = None,
) -> dict[str, str | int | bool | None]:
    """The machine for a record: versions, device, its vector instructions, threads, precision, peak
    memory in MiB.

    Args:
        dtype: of the networks in training.
        labels: of the teacher that labels the images, if there is one.
    """
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if gpu else _peak_resident_bytes()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine() + " CPU",
        "instructions": None if gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": _name(dtype),
        "label_precision": labels and _name(labels),
        "compiled": compiled,
        "peak_memory_mb": round(peak / 2**20),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _peak_resident_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
