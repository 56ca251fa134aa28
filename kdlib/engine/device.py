"""Which device, which precision."""

import contextlib
import ctypes
import platform
import resource
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; for None a GPU if there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def keep_large_blocks() -> None:
    """Let glibc keep freed blocks of any size instead of mapping each large activation anew.

    On a CPU this halves the time of evaluation and of a large teacher's sweep. Elsewhere nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def training_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU; on a GPU bfloat16, or float16 where bfloat16 is only emulated (T4)."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def half_precision(device: torch.device, dtype: torch.dtype):
    """Autocast on a GPU; nothing on a CPU, where half-precision convolutions have been slower than
    float32 and at times wrong (pytorch issues 183815, 163347, 169688)."""
    if device.type != "cuda" or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype)


class InFloat32:
    """A network that computes in half precision on a GPU and answers in float32.

    Half precision is for networks, never for losses. It is entered at each call, inside the step,
    so that the cache of cast weights belongs to the graph.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype):
        self.network, self.device, self.dtype = network, device, dtype

    def __call__(self, x: Tensor) -> Tensor:
        return self._float32(self.network, x)

    def features(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.features``."""
        with half_precision(self.device, self.dtype):
            features = self.network.features(x)
        return [feature.float() for feature in features]

    def stages(self, x: Tensor) -> list[Tensor]:
        """As ``Staged.stages``."""
        with half_precision(self.device, self.dtype):
            features = self.network.stages(x)
        return [feature.float() for feature in features]

    def layers(self, x: Tensor) -> list[list[Tensor]]:
        """As ``Staged.layers``."""
        with half_precision(self.device, self.dtype):
            stages = self.network.layers(x)
        return [[feature.float() for feature in layers] for layers in stages]

    def until(self, stage: int, x: Tensor) -> Tensor:
        """As ``Staged.until``."""
        return self._float32(self.network.until, stage, x)

    def resume(self, stage: int, feature: Tensor) -> Tensor:
        """As ``Staged.resume``."""
        return self._float32(self.network.resume, stage, feature)

    def with_weights(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Called with these in place of its parameters of the same names."""
        return self._float32(functional_call, self.network, weights, (x,))

    def head(self, feature: Tensor) -> Tensor:
        """Logits from the last stage's feature."""
        return self._float32(self.network.head, feature)

    def _float32(self, function, *arguments) -> Tensor:
        with half_precision(self.device, self.dtype):
            return function(*arguments).float()


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What a record says of the machine: versions, device, threads, precision, peak memory."""
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if gpu else _peak_resident_bytes()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "peak_memory_mb": round(peak / 2**20),
    }


def _peak_resident_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
