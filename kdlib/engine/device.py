"""Which device, which precision."""

import contextlib
import ctypes
import os
import platform
import resource
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


def half_precision(device: torch.device, dtype: torch.dtype):
    """Autocast on a GPU; nothing on a CPU, where half-precision convolutions have at times been
    wrong, or much slower than float32 (pytorch issues 183815, 163347, 169688)."""
    if device.type != "cuda" or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype)


class InFloat32:
    """A network that computes in half precision on a GPU and answers in float32.

    Half precision is for networks, never for losses. It is entered at each call, inside the step,
    so that the cache of cast weights belongs to the graph.

    Args:
        compiled: compile what is called, each method when it is called first.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        self.network, self.device, self.dtype = network, device, dtype
        self.compiled = compiled
        self.prepared: dict[str, Callable] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self._answer("__call__", x)

    def features(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.features``."""
        return self._answer("features", x)

    def stages(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.stages``."""
        return self._answer("stages", x)

    def layers(self, x: Tensor) -> list[list[Tensor]]:
        """As ``Staged.layers``."""
        return self._answer("layers", x)

    def until(self, stage: int, x: Tensor) -> Tensor:
        """As ``Staged.until``."""
        return self._answer("until", stage, x)

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        """As ``Staged.resume``."""
        return self._answer("resume", stage, feature)

    def head(self, feature: Tensor) -> Tensor:
        """Logits from the last stage's feature."""
        return self._answer("head", feature)

    def with_weights(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Called with these in place of its parameters of the same names."""
        return self._answer("with_weights", weights, x)

    def _answer(self, name: str, *arguments):
        if name not in self.prepared:
            self.prepared[name] = self._prepare(name)
        with half_precision(self.device, self.dtype):
            return self._float32(self.prepared[name](*arguments))

    def _prepare(self, name: str) -> Callable:
        """A method of the network, compiled at its first call where that is wanted."""
        if name == "with_weights":
            method = partial(_with_weights, self.network)
        else:
            method = getattr(self.network, name)
        # Shapes never change, and a step that leaves the graph could not be captured.
        return torch.compile(method, dynamic=False, fullgraph=True) if self.compiled else method

    def _float32(self, answer):
        if isinstance(answer, Tensor):
            return answer.float()
        return [self._float32(part) for part in answer]


def _with_weights(network: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(network, weights, (x,))


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
