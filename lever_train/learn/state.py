"""The state of a training: saved whole, refused where it does not fit, continued bit for bit.

In goes everything the next step depends on; out comes ``state.pt``, written to a temporary name,
flushed and renamed. The order of the data is a pure function of (seed, epoch) and the dropout
noise of (seed, step), so the position is two integers and no generator is kept. "Bit for bit" is a
promise for one kind of processor: another may have other instructions to sum with.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lever_data.errors import LeverError, shorten
from lever_data.store.files import write_atomic
from lever_train.learn.data import TrainingData
from lever_train.learn.log import Log
from lever_train.options.train import TrainConfig

VERSION = 2
STATE = "state.pt"
PROCESSES, THREADS = "processes", "[run] threads"
# They change no result. Threads do: more of them sum in another order. Their number in effect is
# compared, not the option, whose default is what the machine has.
_FREE = {"threads", "save_every", "tensorboard", "trackio", "memory_limit"}


class StateError(LeverError):
    """A saved state is damaged, of another version, or that of another training."""


@dataclass
class State:
    """Where a training stands.

    ``phase`` counts the stages that are done; ``epoch`` those done within it; ``groups`` those
    seen of the running epoch; ``step`` the batches seen in the phase. ``beta`` is the KL weight of
    the next GRPO step. ``best`` is the best epoch so far, by its checkpoint. ``replaces`` names the
    files of an earlier training in the folder that are still to be deleted.
    """

    fingerprint: dict[str, str]
    phase: int = 0
    epoch: int = 0
    groups: int = 0
    step: int = 0
    beta: float = 0.0
    best: tuple[str, float] | None = None
    log: Log = field(default_factory=Log)
    selector: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    references: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaces: list[str] = field(default_factory=list)


def save_state(folder: Path, state: State) -> None:
    """Write ``state.pt``; a crash leaves the old one or the new one."""
    content = {**vars(state), "version": VERSION, "log": state.log.state()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        write_atomic(folder / STATE, buffer.getvalue())
    except OSError as error:
        raise LeverError(
            f"the state cannot be written ({error.strerror})", where=str(folder / STATE)
        ) from error


def load_state(folder: Path, fingerprint: Mapping[str, str], phases: int) -> State:
    """Read ``state.pt`` and check that it continues this very training, of ``phases`` phases.

    Before the first step and after the last one other numbers of threads and processes are exact
    too: nothing was summed yet, or nothing will be.

    Raises:
        LeverError: there is none.
        StateError: it cannot be read, or it belongs to another version, config, data or view; both
            values are named.
    """
    path = folder / STATE
    if not path.exists():
        raise LeverError(
            "there is no training here to resume",
            where=str(path),
            hint="leave --resume out; --overwrite replaces checkpoints that lie there",
        )
    try:
        if not zipfile.is_zipfile(path):
            raise EOFError("it is not a whole torch file")
        content = torch.load(path, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise StateError(
            f"the state cannot be read ({str(error).splitlines()[0]})", where=str(path)
        ) from None
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != VERSION:
        raise StateError(
            f"the state is of version {version}, this lever reads {VERSION}", where=str(path)
        )
    saved = content["fingerprint"]
    if content["phase"] in (0, phases) and not content["step"]:
        saved = saved | {name: fingerprint[name] for name in (PROCESSES, THREADS)}
    _require_same(saved, fingerprint, path)
    content["fingerprint"] = dict(fingerprint)
    content["log"] = Log.of(content["log"])
    return State(**content)


def fingerprint(config: TrainConfig, data: TrainingData, threads: Sequence[int]) -> dict[str, str]:
    """What must be the same for a resumed training to end as the uninterrupted one would.

    Args:
        threads: torch's threads in every process, by rank.
    """
    counts = threads[:1] if len(set(threads)) == 1 else threads
    found = {PROCESSES: str(len(threads)), THREADS: ", ".join(map(str, counts))}
    for section, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            if name not in _FREE:
                found[f"[{section}] {name}"] = repr(value)
    # what the files hold is compared below and as pool_sha256, by names that say which differs
    known = {name: value for name, value in data.provenance.items() if name != "inputs"}
    found |= {name: repr(value) for name, value in known.items()}
    for name in ("queries", "candidates"):
        vectors = memoryview(getattr(data, name).numpy()).cast("B")  # hashed without a copy
        found[f"sha256 of the {name}' vectors"] = hashlib.sha256(vectors).hexdigest()
    return found


def _require_same(saved: Mapping[str, str], wanted: Mapping[str, str], path: Path) -> None:
    """Check that a saved training is the wanted one.

    Raises:
        StateError: it is another; it names the first difference with both values.
    """
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise StateError(
                f"the state belongs to another training: {name} was "
                f"{shorten(saved.get(name))}, now it is {shorten(wanted.get(name))}",
                where=str(path),
                hint=_way_on(name, saved),
            )


def _way_on(name: str, saved: Mapping[str, str]) -> str:
    """What to do where ``name`` is not what was saved."""
    if name == THREADS and saved[name].isdecimal():
        return f"--threads {saved[name]} goes on; another number of threads rounds differently"
    if name == PROCESSES:
        count = saved[name]
        start = "lever train" if count == "1" else f"torchrun --nproc-per-node {count} -m lever_cli"
        return (
            f"`{start} … --resume` with {count} in all goes on; another number of processes sums "
            "in another order and draws other noise"
        )
    return "resume with what it was started with, or start anew in another --out"
