"""The precision in which networks compute: bfloat16 where it is faster, else float32."""

import csv
import os
from functools import cache
from pathlib import Path

import torch

# Ratios of images/s, bfloat16 to float32, on a CPU that multiplies in bfloat16. Written by
# `python -m benchmarks.layouts --write`.
SPEEDS = Path(__file__).with_name("bfloat16.csv")
# Where bfloat16 is less than this much faster, float32 is used.
WORTH = 1.1
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_dtype(device: torch.device, model: str = "", side: int = 0) -> torch.dtype:
    """The precision in which a network computes in training and evaluation.

    On a GPU bfloat16, or float16 where bfloat16 is only emulated (T4). On a CPU as ``SPEEDS`` says.

    Args:
        side: height and width of the images in pixels.

    Raises ValueError as ``asked_precision``, which overrides the choice.
    """
    if wish := asked_precision(device.type == "cuda"):
        return wish
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return _cpu_dtype(model, side, "training")


def label_dtype(device: torch.device, model: str, side: int) -> torch.dtype:
    """The precision in which a frozen teacher labels images; on a GPU float16.

    Arguments and errors as ``training_dtype``.
    """
    wish = asked_precision(device.type == "cuda")
    if device.type == "cuda":
        return torch.float32 if wish == torch.float32 else torch.float16
    return wish or _cpu_dtype(model, side, "labels")


def _cpu_dtype(model: str, side: int, work: str) -> torch.dtype:
    faster = multiplies_bfloat16() and speed(model, side, work) >= WORTH
    return torch.bfloat16 if faster else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def speed(model: str, side: int, work: str) -> float:
    """The ratio in ``SPEEDS`` of a network's family, at the largest measured side up to ``side``.

    0 where there is none.
    """
    measured = {
        int(row["side"]): float(row[work])
        for row in _speeds()
        if model.startswith(row["family"]) and int(row["side"]) <= side
    }
    return measured[max(measured)] if measured else 0.0


@cache
def _speeds() -> list[dict[str, str]]:
    with SPEEDS.open(newline="") as file:
        return [*csv.DictReader(file)]


def asked_precision(gpu: bool) -> torch.dtype | None:
    """The precision that ``$KDLIB_PRECISION`` names; None without it.

    Raises ValueError for an unknown one, and for float16 on a CPU: the loss is not scaled there, so
    small gradients would become 0.
    """
    wish = os.environ.get("KDLIB_PRECISION") or "auto"
    if wish not in ("auto", *PRECISIONS):
        raise ValueError(
            f"KDLIB_PRECISION={wish} is not valid: set it to {', '.join(PRECISIONS)} or auto."
        )
    if wish == "float16" and not gpu:
        raise ValueError("KDLIB_PRECISION=float16 needs a GPU. On a CPU set it to bfloat16.")
    return PRECISIONS.get(wish)
