"""Which device, which precision."""

import contextlib
import ctypes
import os
import platform
import resource

import torch

# Compute capability from which torch's compiler has a backend.
COMPILES = (8, 0)
# A layer takes about half a second to compile and then saves some 10 µs a step.
COMPILED_STEPS = 50_000


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; for None a GPU if there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def prepare(device: torch.device) -> None:
    """Set what makes training fast in this process.

    On a GPU libraries try their kernels and take the fastest, not the same ones in every run.
    ``$KDLIB_DETERMINISTIC`` = 1 has them take the same ones always, so that two runs agree in every
    bit on one machine, as they do on a CPU with as many threads.
    """
    torch.set_flush_denormal(True)
    keep_large_blocks()
    wish = os.environ.get("KDLIB_DETERMINISTIC") or "0"
    if wish not in ("0", "1"):
        raise ValueError(f"KDLIB_DETERMINISTIC={wish}: it takes 0 or 1.")
    exact = device.type == "cuda" and wish == "1"
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = exact, not exact
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if worth_compiling(device, COMPILED_STEPS):
        # One function is compiled for many networks; beyond the limit torch gives up.
        torch._dynamo.config.recompile_limit = 1024
        torch._dynamo.config.accumulated_recompile_limit = 4096
        torch._inductor.config.deterministic = exact


def worth_compiling(device: torch.device, steps: int) -> bool:
    """Whether a run of so many steps, first to last, gains more than compiling costs.

    Only on a GPU; on a CPU compiling takes minutes and gains a tenth. Of the run alone, never of
    what else is trained: compiled arithmetic rounds elsewhere, and a run has one result.
    ``$KDLIB_COMPILE`` = never or always overrules it, the latter on a CPU too.
    """
    wish = os.environ.get("KDLIB_COMPILE", "auto")
    if wish not in ("auto", "never", "always"):
        raise ValueError(f"KDLIB_COMPILE={wish}: it takes auto, never or always.")
    if wish != "auto":
        return wish == "always"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < COMPILES:
        return False
    return steps >= COMPILED_STEPS


def keep_large_blocks(limit: int = 1 << 30) -> None:
    """Let glibc keep freed blocks of so many bytes instead of mapping each large activation anew.

    On a CPU this takes a third to a half off a large teacher's sweep. Elsewhere nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, limit)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 * limit - 1)  # M_TRIM_THRESHOLD


def training_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU bfloat16, or float16 where bfloat16 is only emulated (T4)."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def environment(
    device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> dict[str, str | int | bool]:
    """What a record says of the machine: versions, device, threads, precision, peak memory."""
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if gpu else _peak_resident_bytes()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "peak_memory_mb": round(peak / 2**20),
    }


def _peak_resident_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
