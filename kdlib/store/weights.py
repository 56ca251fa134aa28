"""Weights and logits of runs as safetensors files, each with a fingerprint of its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdlib import files
from kdlib.errors import StoreError
from kdlib.models import Staged, build_model, load_weights
from kdlib.runs import Run

# In a checkpoint, stands before the names of auxiliary modules.
AUX = "part:"


def folder(run: Run) -> Path:
    return files.home() / run.id


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Hold the lock of a run. Raises Timeout where another process holds it."""
    try:
        folder(run).mkdir(parents=True, exist_ok=True)
        held = FileLock(folder(run) / "lock").acquire(blocking=False)
    except Timeout:
        raise
    except OSError as error:
        raise StoreError(
            f"Cannot write {files.home()}: {error.strerror}. Make it writable, or name another "
            f"folder with KDLIB_HOME."
        ) from error
    with held:
        yield


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Hash of every bit of a model's state."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Save tensors together with ``about``, which must be plain JSON."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.replacing(path) as temporary:
        save_file(plain, temporary, {"about": json.dumps(about)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and their ``about``. Raises StoreError where the file is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["about"])
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} does not exist. `train([run], weights=True)` makes it, given its epoch in the "
            f"run's `keep`."
        ) from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}). Train the run again to repair it."
        ) from error


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``; it is removed from their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# --- checkpoints ----------------------------------------------------------------------------------


def state_path(run: Run) -> Path:
    """The file with which an unfinished run continues."""
    return folder(run) / "state.safetensors"


def weights_path(run: Run, epoch: int) -> Path:
    return folder(run) / f"epoch-{epoch:04d}.safetensors"


def save_modules(run: Run, epoch: int, state: dict[str, Tensor]) -> str:
    """Save a checkpoint: the state of ``student`` and of the auxiliary modules.

    Returns its fingerprint.
    """
    student = select(state, "student.")
    aux = {f"{AUX}{n}": t for n, t in state.items() if not n.startswith("student.")}
    return _save_checked(weights_path(run, epoch), run, epoch, student | aux)


def load_modules(run: Run, epoch: int, expected: str | None = None) -> dict[str, Tensor]:
    """The state of a checkpoint; names begin with ``student.`` or the name of a module.

    Raises StoreError where the checkpoint is absent or damaged, or has another fingerprint than
    ``expected``.
    """
    tensors, found = _load_checked(weights_path(run, epoch))
    if expected not in (None, found):
        raise StoreError(
            f"{weights_path(run, epoch)} does not hold the expected weights of {run}. "
            f"`train([run], weights=True)` makes the weights and their record again."
        )
    student = {f"student.{n}": t for n, t in tensors.items() if not n.startswith(AUX)}
    return student | select(tensors, AUX)


def load_checkpoint(run: Run, epoch: int) -> tuple[Staged, str]:
    """A run's model after ``epoch`` epochs, in eval mode and frozen, and its fingerprint."""
    tensors, found = _load_checked(weights_path(run, epoch))
    weights = {name: t for name, t in tensors.items() if not name.startswith(AUX)}
    linear = [name for name, tensor in weights.items() if tensor.ndim == 2]
    classifier = max(linear, key=lambda name: (len(name), name))  # head.10 comes after head.6
    classes, channels = len(weights[classifier]), weights["stem.0.weight"].shape[1]
    network = build_model(run.model, classes, channels, seed=0)
    load_weights(network, weights)
    return network.eval().requires_grad_(False), found


def saved_fingerprint(run: Run, epoch: int) -> str | None:
    """The fingerprint in the header of a checkpoint; None without a checkpoint."""
    return _saved_fingerprint(weights_path(run, epoch))


def holds_weights(trained, epochs) -> bool:
    """Whether the store has these checkpoints of a trained run, as its record names them.

    Where a run ended before its recipe did, only the epochs that it had, and its last, count.
    """
    named, last = trained.summary["weights"], trained.run.recipe.epochs
    return all(
        str(epoch) in named and named[str(epoch)] == saved_fingerprint(trained.run, epoch)
        for epoch in epochs
        if epoch <= trained.epochs or epoch == last
    )


# --- logits of the validation images --------------------------------------------------------------


def _logits_path(run: Run, epoch: int) -> Path:
    return folder(run) / f"logits-{epoch:04d}.safetensors"


def save_logits(run: Run, epoch: int, logits: Tensor) -> str:
    """Save the logits of the validation images in half precision. Returns their fingerprint."""
    return _save_checked(_logits_path(run, epoch), run, epoch, {"logits": logits.half()})


def load_logits(trained, epoch: int) -> Tensor:
    """Float32 ``[validation images, classes]`` after ``epoch`` epochs, of a run that saved logits.

    Raises StoreError where they are absent or damaged, or not the logits that the record names.
    """
    path = _logits_path(trained.run, epoch)
    tensors, found = _load_checked(path)
    if found != trained.summary.get("logits", {}).get(str(epoch)):
        raise StoreError(
            f"{path} does not hold the logits that the record of {trained.run} names. "
            f"`train([run], weights=True)` with the run's `save_logits` set makes both again."
        )
    return tensors["logits"].float()


def holds_logits(trained) -> bool:
    """Whether the store has the logits of every epoch."""
    named = trained.summary.get("logits", {})
    return all(
        str(e) in named and named[str(e)] == _saved_fingerprint(_logits_path(trained.run, e))
        for e in range(1, trained.epochs + 1)
    )


# --- files with fingerprints ----------------------------------------------------------------------


def _save_checked(path: Path, run: Run, epoch: int, tensors: dict[str, Tensor]) -> str:
    about = {"run": run.id, "epoch": epoch, "fingerprint": fingerprint(tensors)}
    save_tensors(path, tensors, about)
    return about["fingerprint"]


def _load_checked(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors with the content that was saved, and their fingerprint.

    A damaged file is renamed, so that it is made again.
    """
    try:
        tensors, about = load_tensors(path)
        if (found := fingerprint(tensors)) != about["fingerprint"]:
            raise StoreError(
                f"{path} is damaged (its content changed). Train the run again to repair it."
            )
    except StoreError:
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_suffix(".damaged"))
        raise
    return tensors, found


def _saved_fingerprint(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])["fingerprint"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
