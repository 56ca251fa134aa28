"""The store: weights, resume states and records of runs; JSON and safetensors only.

``$KDLIB_HOME/<id>/`` holds a run's weights and its record; a record is a JSON line of description,
one line per epoch, and a summary line. Exhibits copy the records they used to
``results/<profile>/records/``, where a clone without a store finds them.
"""

import contextlib
import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kdlib import files
from kdlib.errors import StoreError
from kdlib.models import Staged, build_model, load_weights
from kdlib.models.architecture import MARK, file_of, load_architecture
from kdlib.runs import ENGINE_VERSION, Run

# In a checkpoint, before the names of what was trained along.
PART = "part:"


def folder(run: Run) -> Path:
    return files.home() / run.id


@contextlib.contextmanager
def lock(run: Run) -> Iterator[None]:
    """Hold the lock on a run, or raise Timeout where another process does."""
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


# --- weights --------------------------------------------------------------------------------------


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Hash of every bit of a model's state: equal only if nothing moved."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.replacing(path) as temporary:
        save_file(plain, temporary, {"about": json.dumps(about)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and what was said about them. Raises StoreError where absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["about"])
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is not there. `train([run], weights=True)` makes it, given its epoch in the "
            f"run's `keep`."
        ) from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}); training the run again mends it."
        ) from error


def weights_path(run: Run, epoch: int) -> Path:
    return folder(run) / f"epoch-{epoch:04d}.safetensors"


def save_weights(
    run: Run, epoch: int, weights: dict[str, Tensor], parts: dict[str, Tensor] | None = None
) -> str:
    """Save a student's checkpoint, with what was trained along, and return its fingerprint."""
    tensors = weights | {f"{PART}{name}": tensor for name, tensor in (parts or {}).items()}
    about = {"run": run.id, "epoch": epoch, "fingerprint": fingerprint(tensors)}
    save_tensors(weights_path(run, epoch), tensors, about)
    return about["fingerprint"]


def save_networks(run: Run, epoch: int, networks: nn.ModuleDict) -> str:
    """``save_weights`` of a trainee's networks."""
    state = networks.state_dict()
    parts = {name: t for name, t in state.items() if not name.startswith("student.")}
    return save_weights(run, epoch, within(state, "student."), parts)


def load_networks(run: Run, epoch: int, expected: str | None = None) -> dict[str, Tensor]:
    """The state of a trainee's networks: names begin with ``student.`` or the name of a part.

    Raises StoreError where they are absent, damaged, or have another fingerprint than ``expected``.
    """
    tensors, found = _load_checked(weights_path(run, epoch))
    if expected not in (None, found):
        raise StoreError(
            f"{weights_path(run, epoch)} are not the weights that were expected of {run}; "
            f"`train([run], weights=True)` makes them and their record anew."
        )
    student = {f"student.{n}": t for n, t in tensors.items() if not n.startswith(PART)}
    return student | within(tensors, PART)


def load_checkpoint(run: Run, epoch: int) -> tuple[Staged, str]:
    """A run's model after ``epoch`` epochs, in eval mode and frozen, and its fingerprint."""
    tensors, found = _load_checked(weights_path(run, epoch))
    student = {name: t for name, t in tensors.items() if not name.startswith(PART)}
    return _frozen(run.model, student), found


def _frozen(model: str, weights: dict[str, Tensor]) -> Staged:
    linear = [name for name, tensor in weights.items() if tensor.ndim == 2]
    classifier = max(linear, key=lambda name: (len(name), name))  # head.10 comes after head.6
    classes, channels = len(weights[classifier]), weights["stem.0.weight"].shape[1]
    network = build_model(model, classes, channels, seed=0)
    load_weights(network, weights)
    return network.eval().requires_grad_(False)


def within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _load_checked(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors that are those that were saved, and their fingerprint.

    A damaged file is put aside, so that it is made again.
    """
    try:
        tensors, about = load_tensors(path)
        if (found := fingerprint(tensors)) != about["fingerprint"]:
            raise StoreError(
                f"{path} is damaged (its content changed); training the run again mends it."
            )
    except StoreError:
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_suffix(".damaged"))
        raise
    return tensors, found


# --- logits along a route -------------------------------------------------------------------------


def logits_path(run: Run, epoch: int) -> Path:
    return folder(run) / f"logits-{epoch:04d}.safetensors"


def save_logits(run: Run, epoch: int, logits: Tensor) -> str:
    """Save the logits of the validation images in half precision; return their fingerprint."""
    tensors = {"logits": logits.half()}
    about = {"run": run.id, "epoch": epoch, "fingerprint": fingerprint(tensors)}
    save_tensors(logits_path(run, epoch), tensors, about)
    return about["fingerprint"]


def load_logits(trained: "Trained", epoch: int) -> Tensor:
    """Float32 ``[validation images, classes]`` after ``epoch`` epochs of a run with a ``route``.

    Raises StoreError where they are absent, damaged or not those of the record.
    """
    path = logits_path(trained.run, epoch)
    tensors, found = _load_checked(path)
    if found != trained.summary.get("logits", {}).get(str(epoch)):
        raise StoreError(
            f"{path} are not the logits that the record of {trained.run} tells of; "
            f"`train([run], weights=True)` with the run's `route` set makes both anew."
        )
    return tensors["logits"].float()


def holds_logits(trained: "Trained") -> bool:
    """Whether the logits of every epoch are there."""
    told = trained.summary.get("logits", {})
    epochs = range(1, trained.epochs + 1)
    paths = ((str(e), logits_path(trained.run, e)) for e in epochs)
    return all(e in told and told[e] == _saved_fingerprint(path) for e, path in paths)


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained run, as its record tells.

    Attributes:
        log: one row per epoch: learning rate, mean training terms, test accuracy in %, …
        summary: weights' fingerprints by epoch, teachers' fingerprints, environment, time.
    """

    run: Run
    log: pd.DataFrame
    summary: dict

    @property
    def epochs(self) -> int:
        """How many it took, fewer than its recipe's where its method ended it; one begun counts."""
        return len(self.log)

    @property
    def passes(self) -> float:
        """Epochs used, the last counted by the share of its steps."""
        return self.summary.get("arrived", self.epochs)

    @property
    def final(self) -> dict:
        """The last epoch's row, and its ``test_error`` in %."""
        row = self.log.iloc[-1].to_dict()
        return row | {"test_error": 100 - row["test_top1"]}

    def model(self, epoch: int | None = None) -> Staged:
        """The network after ``epoch`` epochs (None: at the end), in eval mode, on the CPU.

        Raises StoreError where the store has no such weights, or damaged ones; where only a record
        is there, ``train([run], weights=True)`` makes them. Raises ValueError where the network is
        nothing without what was trained along, as that of a search.
        """
        if not self.run.method.whole:
            raise ValueError(
                f"The student of {self.run} is no network by itself: kdlib.chains.found.extract "
                f"gives the one that was found."
            )
        epoch = self.run.recipe.epochs if epoch is None else epoch
        model, found = load_checkpoint(self.run, epoch)
        if found != self.summary["weights"].get(str(epoch)):
            raise StoreError(
                f"{weights_path(self.run, epoch)} are not the weights that the record of "
                f"{self.run} tells of; `train([run], weights=True)` makes both anew."
            )
        return model


def write_record(run: Run, log: list[dict], summary: dict) -> None:
    head = {"id": run.id, "engine": ENGINE_VERSION, "run": run.description}
    lines = [json.dumps(line) for line in (head, *log, {"summary": summary})]
    files.write_atomic(folder(run) / "record.jsonl", "\n".join(lines) + "\n")


def find_record(run: Run) -> Trained | None:
    """A run's record from the store, else from any profile's committed records.

    A damaged record is named in a warning and passed over, so that the run is trained again.
    """
    committed = files.results().glob(f"*/records/{run.id}.jsonl")
    for path in (folder(run) / "record.jsonl", *committed):
        if path.exists():
            try:
                return _read_record(run, path)
            except (ValueError, KeyError, TypeError, OSError) as error:
                warnings.warn(
                    f"The record {path} is damaged ({error}). It is ignored; without another "
                    f"copy the run is trained again.",
                    stacklevel=2,
                )
    return None


def _read_record(run: Run, path: Path) -> Trained:
    head, *log, last = map(json.loads, path.read_text().splitlines())
    if head["run"] != json.loads(json.dumps(run.description)):
        raise ValueError("it describes another run")
    whole = math.ceil(last["summary"].get("arrived", run.recipe.epochs))
    if [row["epoch"] for row in log] != list(range(1, whole + 1)):
        raise ValueError("epochs are missing")
    return Trained(run, pd.DataFrame(log), last["summary"])


def copy_record(run: Run, destination: Path) -> None:
    """Copy a run's record and measurements from the store to a profile's records, and where its
    model is an architecture that was found, that."""
    if MARK in run.model:
        found = load_architecture(run.model)
        files.write_atomic(destination / file_of(run.model), found.text)
    for path in folder(run).glob("measure-*.json"):
        files.write_atomic(destination / f"{run.id}.{path.name}", path.read_bytes())
    if (record := folder(run) / "record.jsonl").exists():
        files.write_atomic(destination / f"{run.id}.jsonl", record.read_bytes())


def saved_fingerprint(run: Run, epoch: int) -> str | None:
    """What a checkpoint says its fingerprint is, without reading the weights; None without one."""
    return _saved_fingerprint(weights_path(run, epoch))


def _saved_fingerprint(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])["fingerprint"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def holds_weights(trained: Trained, epochs: Iterable[int]) -> bool:
    """Whether the store has these checkpoints, and they are those that the record tells of.

    Of a run that ended before its recipe did, those of epochs that it had, and its last.
    """
    told, last = trained.summary["weights"], trained.run.recipe.epochs
    return all(
        str(epoch) in told and told[str(epoch)] == saved_fingerprint(trained.run, epoch)
        for epoch in epochs
        if epoch <= trained.epochs or epoch == last
    )


def kept_epochs(run: Run) -> tuple[int, ...]:
    """The checkpoints that the run's record in the store tells of."""
    trained = _stored(run)
    return tuple(map(int, trained.summary["weights"])) if trained else ()


def kept_logits(run: Run) -> bool:
    """Whether the run's record in the store tells of logits along its route."""
    trained = _stored(run)
    return bool(trained and trained.summary.get("logits"))


def _stored(run: Run) -> Trained | None:
    return find_record(run) if (folder(run) / "record.jsonl").exists() else None


# --- measurements ---------------------------------------------------------------------------------


def measure(
    trained: Trained | Sequence[Trained], fn: Callable[..., pd.DataFrame], **options
) -> pd.DataFrame:
    """``fn(trained, **options)``, a small table, computed once and kept beside the run's record.

    The key is the function's source, its options, the run's last weights and its teachers': change
    one and it is computed again; what the function calls is not looked at. Options must be plain
    JSON. That of several runs, ``fn(first, second, …, **options)``, is kept beside the first.
    """
    several = [trained] if isinstance(trained, Trained) else list(trained)
    weights = [
        [t.summary["weights"][str(t.run.recipe.epochs)], t.summary["teachers"]] for t in several
    ]
    key = [inspect.getsource(fn), options, weights]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name, first = f"measure-{fn.__name__}-{digest}.json", several[0].run
    committed = files.results().glob(f"*/records/{first.id}.{name}")
    own = folder(first) / name
    for path in (own, *committed):
        try:
            return _read_table(path.read_text())
        except (OSError, ValueError, KeyError, TypeError):
            continue  # absent or damaged: computed again
    text = json.dumps(fn(*several, **options).to_dict(orient="split", index=False))
    files.write_atomic(own, text)
    return _read_table(text)


def _read_table(text: str) -> pd.DataFrame:
    content = json.loads(text)
    return pd.DataFrame(content["data"], columns=content["columns"])
